//! A migration in one thread and in virtual time is a whole one, and takes the same course each time.

#![allow(clippy::unwrap_used)] // helpers are not known to be tests

mod common;

use std::cell::RefCell;
use std::time::Duration;

use common::*;
use gleaner_bitmap::PageRange;
use gleaner_migrate::wire::Message;
use gleaner_migrate::*;

const PAGES: u64 = 300;

/// Blocks come and go, and pages become zero and stop being it.
fn script(guest: &mut Guest, harvest: u32) {
    let ram = guest.id("ram");
    for page in (0..PAGES).step_by(7) {
        guest.write(ram, page, 0x20);
    }
    match harvest {
        2 => {
            let dimm = guest.add_block("dimm", 20);
            guest.write(dimm, 3, 1);
        }
        3 => guest.zero(ram, 3),
        4 => guest.remove_block("dimm"),
        _ => {}
    }
}

/// What happened, frame by frame, and how it was reported at both ends.
fn run() -> (Vec<String>, String, String) {
    let source = ToySource::scripted(PAGES, script);
    let mut place = ToyDestination::default();
    let there = place.clone();
    let mut options = SenderOptions::new(MigrationId([7; 16]));
    let mut receiver = receiver_options();
    options.clock = Clock::stopped();
    receiver.clock = options.clock.clone();
    let guest = source.clone();
    options.hold = Some(Box::new(move || guest.guest().harvests > 6));
    let clock = options.clock.clone();
    let start = clock.now();
    let frames = RefCell::new(Vec::new());
    let mut wire = MemoryWire::new(&mut place, receiver)
        .latency(Duration::from_micros(300))
        .bandwidth(100 << 20)
        .watch(|way, message| {
            let frame = format!("{:?} {way:?} {message:?}", clock.since(start));
            frames.borrow_mut().push(frame);
            let mut guest = source.guest();
            // The guest writes while its pages are on their way.
            if guest.running && matches!(message, Message::Pages(_)) && guest.harvests < 6 {
                let ram = guest.id("ram");
                guest.write(ram, 100, 0x40);
                guest.write(ram, 0, 0x41);
            }
        });
    let report = Sender::new(&mut source.clone(), options).run_over(&mut wire);
    let received = wire.end();
    assert_eq!(report.status, Status::Completed, "{:?}", report.reason);
    assert_eq!(received.status, Status::Completed, "{:?}", received.reason);
    assert_same(&source, &there);
    assert!(there.place().running && source.guest().no_leases());
    assert_eq!(there.place().state, b"state of the guest");
    assert!(report.rounds > 6, "{report:?}");
    (
        frames.into_inner(),
        serde_json::to_string(&report).unwrap(),
        serde_json::to_string(&received).unwrap(),
    )
}

#[test]
fn both_ends_hold_the_same_and_every_run_takes_the_same_course() {
    let (frames, report, received) = run();
    for kind in [
        "Hello", "Layout", "Pages", "Zeros", "State", "Go", "Running",
    ] {
        let wanted = format!(" {kind}");
        assert!(frames.iter().any(|f| f.contains(&wanted)), "no {kind}");
    }
    assert_eq!(run(), (frames, report, received));
}

#[test]
fn half_a_frame_of_pages_writes_the_first_half_of_them() {
    let source = ToySource::new(4);
    for page in 0..4 {
        source.guest().write(gleaner_bitmap::BlockId(0), page, 0x11);
    }
    let mut place = ToyDestination::default();
    let there = place.clone();
    // Hello, Layout, Pages.
    let mut wire = MemoryWire::new(&mut place, receiver_options()).break_at(Break {
        way: Way::Forth,
        frame: 2,
        cut: Cut::Half,
        silent: false,
    });
    let report = Sender::new(&mut source.clone(), options()).run_over(&mut wire);
    let received = wire.end();
    assert!(matches!(report.error, Some(Error::Closed { .. })));
    assert!(matches!(received.error, Some(Error::Closed { .. })));
    let place = there.place();
    let ram = &place.blocks[&gleaner_bitmap::BlockId(0)].1;
    let written = (0..4).map(|page| {
        let mut text = [0u8; 4096];
        ram.slice(PageRange::new(page, 1))
            .unwrap()
            .copy_to(&mut text);
        text[0x11 * 8] == 0x11
    });
    assert_eq!(written.collect::<Vec<_>>(), [true, true, false, false]);
}

#[test]
fn waiting_costs_virtual_time_alone() {
    // Held back until the time limit, which would be a day.
    let day = Duration::from_secs(24 * 3600);
    let mut options = options();
    let mut receiver = receiver_options();
    options.clock = Clock::stopped();
    receiver.clock = options.clock.clone();
    let (clock, start) = (options.clock.clone(), options.clock.now());
    options.timeout = Some(day);
    let switched = clock.clone();
    options.hold = Some(Box::new(move || {
        switched.sleep(Duration::from_secs(3600));
        false
    }));
    let mut place = ToyDestination::default();
    let mut wire = MemoryWire::new(&mut place, receiver);
    let report = Sender::new(&mut ToySource::new(10), options).run_over(&mut wire);
    assert!(matches!(report.error, Some(Error::GaveUp { .. })));
    assert!(clock.since(start) >= day && report.total_ms >= 86_400_000.0);
    let received = wire.end();
    assert_eq!(received.status, Status::Cancelled);
    assert!(received.total_ms >= 86_400_000.0);
}

#[test]
fn pages_take_the_time_that_the_bandwidth_leaves_them() {
    // 100 pages with contents, which a limit of 1 MiB/s or a wire of 1 MiB/s lets through in 0.39 s.
    for limited in [true, false] {
        let mut options = options();
        let mut receiver = receiver_options();
        options.clock = Clock::stopped();
        receiver.clock = options.clock.clone();
        let mut place = ToyDestination::default();
        let mut wire = MemoryWire::new(&mut place, receiver);
        if limited {
            options.tuning.limit_bandwidth(Some(1 << 20));
        } else {
            wire = wire.bandwidth(1 << 20);
        }
        let report = Sender::new(&mut ToySource::new(300), options).run_over(&mut wire);
        assert_eq!(report.status, Status::Completed, "{:?}", report.reason);
        let seconds = report.total_ms / 1e3;
        let expected = report.bytes_on_wire as f64 / (1u64 << 20) as f64;
        // The last frame paces nobody.
        assert!(expected > 0.39 && (expected - seconds) < 0.06, "{seconds}");
        assert!(seconds <= expected + 1e-6, "{seconds}");
    }
}

/// A guest that dirties nothing more leaves no lease to measure by.
#[test]
fn one_slow_answer_does_not_keep_an_idle_guest_here() {
    let mut options = options();
    let mut receiver = receiver_options();
    options.clock = Clock::stopped();
    receiver.clock = options.clock.clone();
    options.timeout = Some(Duration::from_secs(60));
    let mut applied = 0;
    let mut place = ToyDestination::default();
    let mut wire = MemoryWire::new(&mut place, receiver)
        .latency(Duration::from_millis(1))
        .delay(|answer| {
            applied += u64::from(matches!(answer, Message::Applied(_)));
            Duration::from_millis(if applied == 1 { 200 } else { 0 })
        });
    let report = Sender::new(&mut ToySource::new(10), options).run_over(&mut wire);
    assert_eq!(report.status, Status::Completed, "{:?}", report.reason);
}
