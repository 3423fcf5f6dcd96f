//! A guest that is throttled: slower, and in nobody's way.
//!
//! How much slower is compared within one run, with wide bounds: what else the machine does slows the guest too.

#![allow(clippy::unwrap_used, clippy::cast_precision_loss)] // helpers of tests; ratios

mod common;

use std::num::NonZeroU64;
use std::time::Duration;

use common::crew::Crew;
use common::{Copy, MODES, Watchdog, kvm};
use gleaner::migrate::{Throttle, Throttles};
use gleaner::vmm::guest::HOME;
use gleaner::{Error, Start, Throttling, Tracker, Tracking};
use vm_memory::GuestAddress;

/// How long progress is looked at, each time.
const WHILE: Duration = Duration::from_millis(150);
/// How long it is for where what a vCPU writes has to be known first: rings that fill slowly are emptied every 100 ms.
const LONGER: Duration = Duration::from_millis(400);
/// Times that it is, with and without in turn.
const TIMES: usize = 5;

const ALMOST_STOPPED: Throttle = Throttle::All { percent: 99 };

fn writers(pages_per_second: u64) -> Throttle {
    Throttle::Writers {
        pages_per_second: NonZeroU64::new(pages_per_second).unwrap(),
    }
}

fn throttle(tracker: &Tracker, throttle: Throttle) -> Throttling {
    tracker.throttle(throttle).unwrap()
}

/// What `count` grows by in some time.
fn progress<const N: usize>(count: &impl Fn() -> [u64; N], time: Duration) -> [u64; N] {
    let before = count();
    // Not by spinning: the vCPUs need the CPU.
    std::thread::sleep(time);
    let mut grown = count();
    grown
        .iter_mut()
        .zip(before)
        .for_each(|(now, then)| *now -= then);
    grown
}

/// Progress while throttled over that at full speed, in turn.
fn slowed<const N: usize>(
    tracker: &Tracker,
    how: Throttle,
    time: Duration,
    count: impl Fn() -> [u64; N],
) -> [f64; N] {
    let mut sums = [[0; N]; 2];
    for _ in 0..TIMES {
        for (sum, throttled) in sums.iter_mut().zip([true, false]) {
            let throttling = throttled.then(|| throttle(tracker, how));
            let grown = progress(&count, time);
            drop(throttling);
            sum.iter_mut().zip(grown).for_each(|(sum, n)| *sum += n);
        }
    }
    let [slow, full] = sums;
    assert!(!full.contains(&0), "a vCPU does not run at all: {full:?}");
    std::array::from_fn(|n| slow[n] as f64 / full[n] as f64)
}

/// Waits until no vCPU gets on: all rest.
fn wait_for_rest(count: impl Fn() -> Vec<u64>) {
    let mut before = count();
    loop {
        std::thread::sleep(Duration::from_millis(3));
        let now = count();
        if now == before {
            return;
        }
        before = now;
    }
}

#[test]
fn every_vcpu_loses_its_share_whether_it_writes_or_not() {
    if !kvm() {
        return;
    }
    for (mode, tracking) in MODES {
        let crew = Crew::spin_some(tracking, 2, |index| index == 1);
        let count = || [crew.shared.exits()[0], crew.shared.spun()[1]];
        let slowed = slowed(
            &crew.shared.tracker,
            Throttle::All { percent: 90 },
            WHILE,
            count,
        );
        assert!(slowed.iter().all(|part| *part < 0.5), "{mode}: {slowed:?}");
    }
}

#[test]
fn only_a_vcpu_that_writes_more_than_it_may_is_slowed() {
    if !kvm() {
        return;
    }
    let crew = Crew::spin_some(Tracking::RING, 2, |index| index == 1);
    let tracker = &crew.shared.tracker;
    let _log = tracker.consumer(Start::Empty).unwrap();
    assert_eq!(tracker.throttles(), Throttles::Writers);
    let count = || [crew.shared.exits()[0], crew.shared.spun()[1]];
    let [writes, counts] = slowed(tracker, writers(100), LONGER, count);
    assert!(writes < 0.5, "the one that sweeps: {writes}");
    assert!(
        counts > 0.5 && writes < counts / 2.0,
        "the one that counts: {counts}"
    );
    // More than it can: nobody is slowed.
    let [writes, _] = slowed(tracker, writers(1 << 40), WHILE, count);
    assert!(writes > 0.5, "{writes}");
}

#[test]
fn who_writes_is_known_with_rings_alone() {
    if !kvm() {
        return;
    }
    for (mode, tracking) in MODES {
        let crew = Crew::start(tracking, 1, |b| b, |_, _| ());
        let tracker = &crew.shared.tracker;
        let is_ring = tracker.throttles() == Throttles::Writers;
        assert_eq!(is_ring, tracking == Tracking::RING, "{mode}");
        for wrong in [0, 100, 255] {
            let percent = Throttle::All { percent: wrong };
            assert!(matches!(
                tracker.throttle(percent),
                Err(Error::BadThrottle { .. })
            ));
        }
        let throttling = tracker.throttle(Throttle::Off).unwrap();
        assert!(matches!(
            tracker.throttle(Throttle::Off),
            Err(Error::AlreadyThrottled)
        ));
        assert_eq!(throttling.set(writers(1)).is_ok(), is_ring, "{mode}");
        drop(throttling);
        assert!(tracker.throttle(ALMOST_STOPPED).is_ok());
    }
}

/// Were each stop and each transaction to wait for a rest, which takes a second, the watchdog would end it.
#[test]
fn stops_and_transactions_wait_for_nobody_who_rests() {
    if !kvm() {
        return;
    }
    let _watchdog = Watchdog::new("a stop or a transaction of a guest that rests");
    for (_, tracking) in MODES {
        let crew = Crew::spin(tracking, 2);
        let tracker = &crew.shared.tracker;
        crew.shared.wait_for_spin();
        let throttling = throttle(tracker, ALMOST_STOPPED);
        for round in 1..=100 {
            wait_for_rest(|| crew.shared.spun());
            let stopped = tracker.stop(|| Ok(())).unwrap();
            assert_eq!(stopped.vcpus().save().unwrap().len(), 2);
            drop(stopped);
            let mut tx = tracker.transaction();
            tx.move_to(1, GuestAddress(HOME + (round % 2) * (8 << 30)));
            tx.commit().unwrap();
        }
        drop(throttling);
    }
}

#[test]
fn all_go_on_at_once_when_it_is_over() {
    // Were each to rest to its end, which takes a second, the watchdog would end it.
    if !kvm() {
        return;
    }
    let _watchdog = Watchdog::new("a vCPU that was throttled");
    let crew = Crew::start(Tracking::Auto, 2, |b| b, |_, _| ());
    for round in 0..150 {
        let throttling = throttle(&crew.shared.tracker, ALMOST_STOPPED);
        wait_for_rest(|| crew.shared.exits());
        let exits = crew.shared.exits();
        if round % 2 == 0 {
            drop(throttling);
        } else {
            throttling.set(Throttle::Off).unwrap();
        }
        crew.shared.wait_for_progress(&exits);
    }
}

#[test]
fn a_guest_that_rests_can_be_ended() {
    if !kvm() {
        return;
    }
    let _watchdog = Watchdog::new("the end of a vCPU that rests");
    for _ in 0..150 {
        let crew = Crew::spin(Tracking::Auto, 2);
        let throttling = throttle(&crew.shared.tracker, ALMOST_STOPPED);
        crew.shared.wait_for_spin();
        wait_for_rest(|| crew.shared.spun());
        crew.shared.tracker.shutdown();
        crew.join();
        drop(throttling);
    }
}

#[test]
fn no_page_is_lost_of_a_vcpu_that_rests() {
    if !kvm() {
        return;
    }
    for (mode, tracking) in MODES {
        let crew = Crew::start(tracking, 2, |b| b, |_, _| ());
        let tracker = &crew.shared.tracker;
        let consumer = tracker.consumer(Start::AllDirty).unwrap();
        let throttling = throttle(tracker, Throttle::All { percent: 80 });
        let mut copy = Copy::default();
        for _ in 0..20 {
            let exits = crew.shared.exits();
            tracker.harvest().unwrap();
            copy.drain(&consumer);
            crew.shared.wait_for_progress(&exits);
        }
        let stopped = tracker.stop(|| Ok(())).unwrap();
        tracker.harvest().unwrap();
        copy.drain(&consumer);
        assert_eq!(copy.differing(tracker), [], "{mode}");
        drop((throttling, stopped));
    }
}
