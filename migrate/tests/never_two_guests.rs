//! Wherever the line breaks and whoever fails: the guest never runs at both ends, and the source's report says where it
//! is.

#![allow(clippy::unwrap_used)] // helpers are not known to be tests

mod common;

use std::time::Duration;

use common::*;
use gleaner_migrate::*;

fn small() -> ToySource {
    ToySource::new(12)
}

/// Bytes that a whole migration of [`small`] sends, each way.
fn lengths() -> [u64; 2] {
    let (near, far, line) = line([Fault::default(); 2]);
    let (report, _) = migrate(
        &small(),
        &ToyDestination::default(),
        options(),
        receiver_options(),
        near,
        far,
    );
    assert_eq!(report.status, Status::Completed, "{:?}", report.reason);
    line.map(|thread| thread.join().unwrap())
}

/// Checks both ends after a migration, and returns the source's status.
fn check(
    source: &ToySource,
    place: &ToyDestination,
    report: &Report,
    outcomes: &Outcomes,
) -> Status {
    let there = place.place().running;
    let guest = source.guest();
    assert!(!(guest.running && there), "two guests: {report:?}");
    let relinquished = guest.calls.contains(&"relinquish");
    match report.status {
        Status::Completed => assert!(there && guest.calls.contains(&"complete")),
        Status::Failed | Status::Cancelled => {
            assert!(guest.running && guest.no_leases() && !there, "{report:?}");
            assert!(report.error.is_some());
        }
        Status::InDoubt => {
            assert!(relinquished && !guest.running, "{report:?}");
            assert!(!guest.calls.contains(&"complete") && !guest.calls.contains(&"resume"));
        }
    }
    assert_eq!(
        place.place().aborted,
        !there && report.status != Status::Completed
    );
    let outcome = outcomes.get(report.migration_id);
    if there {
        assert_eq!(outcome, Outcome::Running);
    } else {
        assert_ne!(outcome, Outcome::Running);
    }
    report.status
}

#[test]
fn the_line_breaks_after_any_number_of_bytes() {
    let lengths = lengths();
    let mut seen = [[0; 2]; 2]; // of failed and in-doubt
    for direction in 0..2 {
        let length = lengths[direction];
        // Every byte of frames without pages, and of pages one here and there.
        let last = length.saturating_sub(300);
        let cuts = (0..last)
            .step_by(if direction == 0 { 97 } else { 1 })
            .chain(last..length);
        for cut in cuts {
            let mut faults = [Fault::default(); 2];
            faults[direction].cut = Some(cut);
            let (near, far, threads) = line(faults);
            let (source, place) = (small(), ToyDestination::default());
            let receiver = receiver_options();
            let outcomes = receiver.outcomes.clone();
            let (report, _) = migrate(&source, &place, options(), receiver, near, far);
            for thread in threads {
                thread.join().unwrap();
            }
            // If nothing of a Hello came through there is nothing to abort but the attempt.
            match check(&source, &place, &report, &outcomes) {
                Status::Failed => seen[direction][0] += 1,
                Status::InDoubt => {
                    seen[direction][1] += 1;
                    // Whoever asks learns the truth.
                    let outcome = outcomes.get(report.migration_id);
                    let status = resolve(&mut source.clone(), outcome).unwrap();
                    let here = source.guest().running;
                    assert_ne!(here, place.place().running);
                    assert_eq!(status == Status::Failed, here);
                }
                status => panic!("{status:?} with the line cut after {cut} of {length}"),
            }
        }
    }
    assert!(seen.iter().flatten().all(|n| *n > 0), "{seen:?}");
}

/// As above, at every frame, with what the ends believe of it; and again exactly, since nothing depends on a thread.
#[test]
fn the_line_breaks_before_in_and_after_each_frame() {
    let migrate = |breaks: Option<Break>| {
        let (source, mut place) = (small(), ToyDestination::default());
        let mut options = options();
        let mut receiver = receiver_options();
        options.clock = Clock::stopped();
        receiver.clock = options.clock.clone();
        let outcomes = receiver.outcomes.clone();
        let there = place.clone();
        let mut wire = MemoryWire::new(&mut place, receiver).latency(Duration::from_micros(50));
        if let Some(breaks) = breaks {
            wire = wire.break_at(breaks);
        }
        let report = Sender::new(&mut source.clone(), options).run_over(&mut wire);
        let frames = [Way::Forth, Way::Back].map(|way| wire.frames(way));
        let received = wire.end();
        let status = check(&source, &there, &report, &outcomes);
        assert_eq!(received.status == Status::Completed, there.place().running);
        (source, there, report, outcomes, status, frames)
    };
    let (.., status, frames) = migrate(None);
    assert_eq!(status, Status::Completed);
    let mut seen = Vec::new();
    for (way, frames) in [Way::Forth, Way::Back].into_iter().zip(frames) {
        for frame in 0..frames {
            for cut in [Cut::Before, Cut::Half, Cut::After] {
                let (source, place, report, outcomes, status, _) =
                    migrate(Some(Break { way, frame, cut }));
                seen.push((way, frame + 1 == frames, cut, status));
                if status != Status::InDoubt {
                    continue;
                }
                // Asked over a wire of its own, the destination tells the truth.
                let mut nowhere = ToyDestination::default();
                let receiver = ReceiverOptions {
                    outcomes,
                    ..receiver_options()
                };
                let mut wire = MemoryWire::new(&mut nowhere, receiver);
                let question = wire::Message::Query(report.migration_id);
                wire.send(&question, &wire::Payload::None, &|_| Ok(()))
                    .unwrap();
                let Some(wire::Message::Outcome(outcome)) = wire.answer(Duration::ZERO).unwrap()
                else {
                    panic!("no answer");
                };
                assert!(matches!(wire.end().error, Some(Error::OnlyQuery)));
                resolve(&mut source.clone(), outcome).unwrap();
                assert_ne!(source.guest().running, place.place().running);
            }
        }
    }
    let count = |way, last, cut, status| {
        let case = (way, last, cut, status);
        seen.iter().filter(|one| **one == case).count()
    };
    let [forth, back] = frames.map(|n| usize::try_from(n).unwrap());
    for cut in [Cut::Before, Cut::Half, Cut::After] {
        // Before GO the source takes its guest back. GO is in doubt however much of it came.
        assert_eq!(count(Way::Forth, false, cut, Status::Failed), forth - 1);
        assert_eq!(count(Way::Forth, true, cut, Status::InDoubt), 1);
    }
    for cut in [Cut::Before, Cut::Half] {
        assert_eq!(count(Way::Back, false, cut, Status::Failed), back - 1);
        assert_eq!(count(Way::Back, true, cut, Status::InDoubt), 1);
    }
    // Once READY has come, GO is what gets lost; once RUNNING has, nothing is missing.
    assert_eq!(
        count(Way::Back, false, Cut::After, Status::Failed),
        back - 2
    );
    assert_eq!(count(Way::Back, false, Cut::After, Status::InDoubt), 1);
    assert_eq!(count(Way::Back, true, Cut::After, Status::Completed), 1);
}

#[test]
fn a_doubt_is_resolved_by_asking() {
    let dir = tempfile::tempdir().unwrap();
    let address: Address = format!("unix:{}", dir.path().join("s").display())
        .parse()
        .unwrap();
    let listener = Listener::bind(&address).unwrap();
    let [forth, back] = lengths();
    // GO gets through and RUNNING does not; GO does not get through.
    for (faults, expected) in [
        ([None, Some(back - 1)], Outcome::Running),
        ([Some(forth - 1), None], Outcome::Refused),
    ] {
        let (near, far, _line) = line(faults.map(|cut| Fault { cut, flip: None }));
        let (source, place) = (small(), ToyDestination::default());
        let receiver = receiver_options();
        let outcomes = receiver.outcomes.clone();
        let (report, _) = migrate(&source, &place, options(), receiver, near, far);
        assert_eq!(report.status, Status::InDoubt);
        assert!(
            report
                .reason
                .unwrap()
                .contains(&report.migration_id.to_string())
        );
        let limit = Duration::from_secs(10);
        let outcome = std::thread::scope(|scope| {
            let serving =
                scope.spawn(|| serve_query(listener.accept().unwrap(), &outcomes, limit).unwrap());
            let asked = query(&address, report.migration_id, limit).unwrap();
            assert_eq!(serving.join().unwrap(), asked);
            asked
        });
        assert_eq!(outcome, expected);
        // What proves nothing changes nothing.
        for unclear in [Outcome::Unknown, Outcome::Pending] {
            assert_eq!(
                resolve(&mut source.clone(), unclear).unwrap(),
                Status::InDoubt
            );
            assert!(!source.guest().running);
        }
        resolve(&mut source.clone(), outcome).unwrap();
        assert_eq!(source.guest().running, expected == Outcome::Refused);
        assert_eq!(place.place().running, expected == Outcome::Running);
    }
}

#[test]
fn the_reason_of_a_refusal_is_what_the_source_reports() {
    for call in ["add_block", "layout", "ready", "run"] {
        let (source, place) = (small(), ToyDestination::failing(call));
        let (near, far) = pair();
        let receiver = receiver_options();
        let outcomes = receiver.outcomes.clone();
        let (report, received) = migrate(&source, &place, options(), receiver, near, far);
        assert_eq!(check(&source, &place, &report, &outcomes), Status::Failed);
        let reason = report.reason.unwrap();
        assert_eq!(reason, format!("destination: no {call} on a Sunday"));
        assert_eq!(Some(reason), received.reason);
        assert_eq!(outcomes.get(report.migration_id), Outcome::Refused);
    }
}

#[test]
fn a_source_that_fails_runs_on() {
    for call in [
        "layout",
        "harvest",
        "lease",
        "ack",
        "stop",
        "state",
        "relinquish",
    ] {
        let (source, place) = (small(), ToyDestination::default());
        source.guest().failing = Some(call);
        let (near, far) = pair();
        let receiver = receiver_options();
        let outcomes = receiver.outcomes.clone();
        let (report, received) = migrate(&source, &place, options(), receiver, near, far);
        assert_eq!(
            check(&source, &place, &report, &outcomes),
            Status::Failed,
            "{call}"
        );
        let reason = report.reason.unwrap();
        assert_eq!(reason, format!("source: {call} does not work"));
        // The destination hears why.
        assert_eq!(received.status, Status::Cancelled);
        assert!(received.reason.unwrap().contains(&reason));
    }
}

/// A page that was not re-armed is not leased. It must not be left behind by a switchover.
#[test]
fn pages_that_are_held_back_hold_back_the_switchover() {
    let (source, place) = (small(), ToyDestination::default());
    source.guest().held_back = true;
    let (near, far) = pair();
    let receiver = receiver_options();
    let outcomes = receiver.outcomes.clone();
    let (report, _) = migrate(&source, &place, options(), receiver, near, far);
    assert_eq!(check(&source, &place, &report, &outcomes), Status::Failed);
    assert!(matches!(
        report.error,
        Some(Error::HeldBack {
            leased: 0,
            dirty: 1
        })
    ));
}

#[test]
fn a_source_that_cannot_resume_is_not_said_to_run() {
    let source = small();
    source.guest().failing = Some("resume");
    let (near, far) = pair();
    let place = ToyDestination::failing("ready");
    let (report, _) = migrate(&source, &place, options(), receiver_options(), near, far);
    assert_eq!(report.status, Status::InDoubt);
    assert!(report.reason.unwrap().contains("could not be resumed"));
}

#[test]
fn a_migration_id_serves_once() {
    let receiver = receiver_options();
    let (near, far) = pair();
    let mut first = options();
    let id = first.id;
    first.hold = None;
    let (report, _) = migrate(
        &small(),
        &ToyDestination::default(),
        first,
        receiver.clone(),
        near,
        far,
    );
    assert_eq!(report.status, Status::Completed);
    let (near, far) = pair();
    let mut again = options();
    again.id = id;
    let outcomes = receiver.outcomes.clone();
    let (report, _) = migrate(
        &small(),
        &ToyDestination::default(),
        again,
        receiver,
        near,
        far,
    );
    assert_eq!(report.status, Status::Failed);
    assert!(report.reason.unwrap().contains("used before"));
    assert_eq!(
        outcomes.get(id),
        Outcome::Running,
        "the answer must not change"
    );
}
