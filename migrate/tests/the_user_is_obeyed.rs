//! Limits, cancellation, the held switchover, and what is reported of a migration.

#![allow(clippy::unwrap_used)] // helpers are not known to be tests

mod common;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::*;
use gleaner_migrate::*;

/// Every page is written again in each round.
fn busy(guest: &mut Guest, harvest: u32) {
    let block = guest.id("ram");
    for page in 0..guest.blocks[&block].0.pages {
        guest.write(block, page, u8::try_from(harvest % 200).unwrap() + 1);
    }
}

#[test]
fn cancelled_in_the_middle_the_guest_runs_on() {
    let source = ToySource::scripted(500, busy);
    let mut options = options();
    let cancel = options.cancel.clone();
    let rounds = Arc::new(Mutex::new(0));
    let seen = rounds.clone();
    options.hold = Some(Box::new(|| false));
    // However slow the machine: nothing but the hold keeps the guest here.
    options.tuning.limit_downtime(Duration::from_secs(3600));
    options.on_progress = Some(Box::new(move |progress| {
        *seen.lock().unwrap() += 1;
        assert!(progress.reason.starts_with("the switchover is held back"));
        if progress.round == 3 {
            cancel.cancel();
        }
    }));
    let (near, far) = pair();
    let place = ToyDestination::default();
    let (report, received) = migrate(&source, &place, options, receiver_options(), near, far);
    assert_eq!(report.status, Status::Cancelled, "{:?}", report.reason);
    assert_eq!((report.rounds, *rounds.lock().unwrap()), (3, 3));
    assert!(source.guest().running && source.guest().no_leases());
    assert_eq!(report.downtime_ms, 0.0);
    assert_eq!(received.status, Status::Cancelled);
    assert!(received.reason.unwrap().contains("cancelled"));
    assert!(place.place().aborted);
}

#[test]
fn cancelled_while_the_destination_takes_nothing() {
    let (near, _far) = pair();
    let mut options = options();
    options.cancel.cancel();
    options.io_timeout = Duration::from_secs(600);
    let source = ToySource::new(10);
    let report = Sender::new(&mut source.clone(), options).run(near);
    assert_eq!(report.status, Status::Cancelled);
    assert!(source.guest().running);
}

#[test]
fn a_receiver_that_is_cancelled_says_so() {
    let receiver = receiver_options();
    let cancel = receiver.cancel.clone();
    let mut options = options();
    options.hold = Some(Box::new(move || {
        cancel.cancel();
        false
    }));
    let (near, far) = pair();
    let source = ToySource::new(10);
    let place = ToyDestination::default();
    let (report, received) = migrate(&source, &place, options, receiver, near, far);
    assert_eq!(received.status, Status::Cancelled);
    assert_eq!(report.reason.as_deref(), Some("cancelled"));
    assert_eq!(report.status, Status::Failed);
}

#[test]
fn the_time_limit_cancels_or_switches_over() {
    for (on_timeout, status) in [
        (OnTimeout::Cancel, Status::Failed),
        (OnTimeout::Switchover, Status::Completed),
    ] {
        let source = ToySource::scripted(500, busy);
        let mut options = options();
        options.tuning.limit_downtime(Duration::ZERO);
        options.timeout = Some(Duration::from_millis(200));
        options.on_timeout = on_timeout;
        let (near, far) = pair();
        let place = ToyDestination::default();
        let (report, _) = migrate(&source, &place, options, receiver_options(), near, far);
        assert_eq!(report.status, status, "{:?}", report.reason);
        assert!(report.total_ms >= 200.0);
        assert_eq!(source.guest().running, status == Status::Failed);
        if status == Status::Completed {
            assert_same(&source, &place);
        } else {
            assert!(report.reason.unwrap().contains("time limit"));
        }
    }
}

/// So slow that pages are sent for seconds.
const SLOW: u64 = 1 << 20;

#[test]
fn a_round_is_cut_short_when_it_is_time_to_switch_over() {
    let source = ToySource::scripted(10_000, busy); // three leases
    let mut options = options();
    options.tuning.limit_downtime(Duration::ZERO);
    options.tuning.limit_bandwidth(Some(32 * SLOW));
    options.timeout = Some(Duration::from_millis(100));
    options.on_timeout = OnTimeout::Switchover;
    let (near, far) = pair();
    let place = ToyDestination::default();
    let (report, _) = migrate(&source, &place, options, receiver_options(), near, far);
    assert_eq!(report.status, Status::Completed, "{:?}", report.reason);
    assert!(
        report.progress[0].pages_sent < 10_000,
        "{:?}",
        report.progress
    );
    assert_same(&source, &place);
}

#[test]
fn a_guest_faster_than_the_link_is_throttled_and_let_go_again() {
    for (goal, expected) in [
        (ThrottleGoal::Auto, "writers"),
        (ThrottleGoal::Writers, "writers"),
        (ThrottleGoal::All, "all"),
    ] {
        let source = ToySource::scripted(500, busy);
        let mut options = options();
        let cancel = options.cancel.clone();
        let guest = source.clone();
        options.throttle = goal;
        options.tuning.limit_downtime(Duration::from_millis(50));
        options.tuning.limit_bandwidth(Some(16 * SLOW)); // 120 ms for all pages
        options.timeout = Some(Duration::from_secs(30));
        options.on_progress = Some(Box::new(move |progress| {
            let throttle = guest.guest().throttle;
            assert_eq!(progress.throttle, throttle, "{progress:?}");
            let name = format!("{throttle:?}").to_lowercase();
            if name.starts_with(expected) {
                cancel.cancel();
            }
            assert!(name == "off" || name.starts_with(expected), "{name}");
        }));
        let (near, far) = pair();
        let place = ToyDestination::default();
        let (report, _) = migrate(&source, &place, options, receiver_options(), near, far);
        assert_eq!(report.status, Status::Cancelled, "{:?}", report.reason);
        let guest = source.guest();
        assert_eq!(guest.throttle, Throttle::Off);
        // Told, not only let go by the end.
        assert!(
            guest
                .calls
                .iter()
                .filter(|call| **call == "throttle")
                .count()
                >= 2
        );
    }
}

#[test]
fn the_bandwidth_limit_is_kept() {
    let source = ToySource::new(300); // 100 pages with contents: 400 KiB
    let options = options();
    options.tuning.limit_bandwidth(Some(SLOW));
    let (near, far) = pair();
    let place = ToyDestination::default();
    let start = Instant::now();
    let (report, _) = migrate(&source, &place, options, receiver_options(), near, far);
    assert_eq!(report.status, Status::Completed, "{:?}", report.reason);
    assert!(start.elapsed() >= Duration::from_millis(330), "{report:?}");
    assert_same(&source, &place);
}

#[test]
fn limits_that_change_on_the_way_are_obeyed() {
    let source = ToySource::scripted(10_000, busy); // three leases
    let mut options = options();
    let tuning = options.tuning.clone();
    // As it is, it would never end.
    tuning.limit_downtime(Duration::ZERO);
    tuning.limit_bandwidth(Some(32 * SLOW));
    options.on_tick = Some(Box::new(move |tick| {
        assert!(tick.pages_sent > 0 && tick.bytes_on_wire > tick.pages_sent * 4096);
        tuning.limit_bandwidth(None);
        tuning.limit_downtime(Duration::from_secs(3600));
    }));
    options.timeout = Some(Duration::from_secs(60));
    let (near, far) = pair();
    let place = ToyDestination::default();
    let (report, _) = migrate(&source, &place, options, receiver_options(), near, far);
    assert_eq!(report.status, Status::Completed, "{:?}", report.reason);
    assert_same(&source, &place);
}

#[test]
fn the_report_has_the_keys_that_scripts_read() {
    let (near, far) = pair();
    let source = ToySource::new(30);
    let place = ToyDestination::default();
    let (report, received) = migrate(&source, &place, options(), receiver_options(), near, far);
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["status"], "completed");
    // Ten pages have contents, and page 1 after the state was saved; all pages but those are zero.
    assert_eq!(
        (&json["pages_sent"], &json["zero_pages"]),
        (&11.into(), &20.into())
    );
    assert_eq!(json["transactions"], 2);
    for key in [
        "reason",
        "rounds",
        "bytes_on_wire",
        "total_ms",
        "downtime_ms",
        "first_round_bytes_per_second",
        "migration_id",
    ] {
        assert!(json.get(key).is_some(), "{key}");
    }
    assert_eq!(json["progress"].as_array().unwrap().len(), 2);
    assert_eq!(json["progress"][0]["decision"], "switch-over");
    let json = serde_json::to_value(&received).unwrap();
    assert_eq!(
        (&json["status"], &json["blocks"]),
        (&"completed".into(), &1.into())
    );
    assert_eq!(
        (&json["pages"], &json["zero_pages"]),
        // The destination's memory was zero, so it needn't hear of zeros.
        (&11.into(), &0.into())
    );
    assert_eq!(serde_json::to_value(Status::InDoubt).unwrap(), "in-doubt");
}
