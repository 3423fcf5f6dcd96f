//! Whatever ends an attempt that slows the guest brings full speed back: nobody has to remember to.

#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use common::crew::Crew;
use common::{Watchdog, kvm};
use gleaner::gate::StoppedVcpus;
use gleaner::migrate::{MigrationId, Source, Throttle};
use gleaner::service::{Attach, Service, ServiceClient};
use gleaner::{Error, Hooks, LocalSource, Tracker, Tracking};

/// How long progress is looked at, each time: a slice of a guest that rests, or two.
const WHILE: Duration = Duration::from_millis(500);

/// So much that a vCPU which shares its CPU with many others still does far more.
const SLOW: Throttle = Throttle::All { percent: 99 };

/// Devices that may refuse to pause, or panic.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Devices {
    Pause,
    Refuse,
    Panic,
}

impl Hooks for Devices {
    fn pause_devices(&mut self) -> Result<(), String> {
        assert!(*self != Self::Panic, "a hook that panics");
        if *self == Self::Refuse {
            return Err("busy".into());
        }
        Ok(())
    }

    fn save(&mut self, _: &StoppedVcpus) -> Result<Vec<u8>, String> {
        Ok(Vec::new())
    }

    fn resume(&mut self) {}

    fn migrated_away(&mut self) {}
}

/// One way for an attempt to end.
type End = fn(LocalSource);

/// Both vCPUs run: one that comes after a rest was ordered has to take part in the next one only.
fn crew() -> Crew {
    let crew = Crew::start(Tracking::Auto, 2, |b| b, |_, _| ());
    crew.shared.wait_for_progress(&[0, 0]);
    crew
}

fn is_throttled(tracker: &Tracker) -> bool {
    match tracker.throttle(Throttle::Off) {
        Ok(_) => false,
        Err(Error::AlreadyThrottled) => true,
        Err(error) => panic!("{error}"),
    }
}

/// Batches that the guest does in a while.
fn progress(crew: &Crew) -> u64 {
    let count = || crew.shared.exits().iter().sum::<u64>();
    let before = count();
    // Not by spinning: the vCPUs need the CPU.
    std::thread::sleep(WHILE);
    count() - before
}

/// The guest, slowed, does less than a third of what it does once `end` is over.
fn full_speed_after(crew: &Crew, what: &str, end: impl FnOnce()) {
    let tracker = &crew.shared.tracker;
    assert!(is_throttled(tracker), "before: {what}");
    let slow = progress(crew).max(1);
    end();
    // The service hears of an agent's end when it gets to it.
    while is_throttled(tracker) {
        std::thread::yield_now();
    }
    while progress(crew) <= 3 * slow {}
}

fn begin(tracker: &Tracker, devices: Devices) -> LocalSource {
    let mut source = LocalSource::new(tracker, Box::new(devices)).unwrap();
    source.throttle(SLOW).unwrap();
    source
}

#[test]
fn a_guest_that_stays_here_is_at_full_speed_after_any_end() {
    if !kvm() {
        return;
    }
    let _watchdog = Watchdog::new("full speed");
    let ends: [(&str, Devices, End); 8] = [
        ("told so", Devices::Pause, |mut source| {
            source.throttle(Throttle::Off).unwrap();
            std::mem::forget(source);
        }),
        ("dropped", Devices::Pause, drop),
        ("cancelled", Devices::Pause, |mut source| {
            source.resume().unwrap();
            std::mem::forget(source);
        }),
        ("cancelled when stopped", Devices::Pause, |mut source| {
            source.stop().unwrap();
            source.resume().unwrap();
            std::mem::forget(source);
        }),
        ("dropped when stopped", Devices::Pause, |mut source| {
            source.stop().unwrap();
        }),
        ("a stop that fails", Devices::Refuse, |mut source| {
            source.stop().unwrap_err();
            source.resume().unwrap();
            std::mem::forget(source);
        }),
        ("a hook that panics", Devices::Panic, |mut source| {
            let panicked = catch_unwind(AssertUnwindSafe(move || source.stop()));
            assert!(panicked.is_err());
        }),
        (
            "refused by the destination",
            Devices::Pause,
            |mut source| {
                source.stop().unwrap();
                source.relinquish().unwrap();
                source.resume().unwrap();
                std::mem::forget(source);
            },
        ),
    ];
    for (what, devices, end) in ends {
        let crew = crew();
        let source = begin(&crew.shared.tracker, devices);
        full_speed_after(&crew, what, || end(source));
    }
}

#[test]
fn a_guest_that_is_away_or_in_doubt_is_throttled_by_nobody() {
    if !kvm() {
        return;
    }
    let _watchdog = Watchdog::new("a guest that is away");
    for completes in [true, false] {
        let crew = crew();
        let tracker = &crew.shared.tracker;
        let mut source = begin(tracker, Devices::Pause);
        source.stop().unwrap();
        assert!(!is_throttled(tracker));
        assert!(source.throttle(SLOW).is_err(), "a guest that stands still");
        source.relinquish().unwrap();
        if completes {
            source.complete().unwrap();
        }
        drop(source);
        assert!(!is_throttled(tracker));
    }
}

/// An agent in an attempt, which slows the guest.
fn attach(service: &Service) -> ServiceClient {
    let attached = ServiceClient::attach(service.path(), MigrationId([7; 16])).unwrap();
    let Attach::Ready(mut agent) = attached else {
        panic!("{attached:?}");
    };
    agent.throttle(SLOW).unwrap();
    agent
}

#[test]
fn the_services_guest_is_at_full_speed_whoever_ends_the_session() {
    if !kvm() {
        return;
    }
    let _watchdog = Watchdog::new("full speed");
    let crew = crew();
    let place = tempfile::tempdir().unwrap();
    let service = |name: &str| {
        let hooks = || Box::new(Devices::Pause) as Box<dyn Hooks>;
        Service::serve(&crew.shared.tracker, &place.path().join(name), hooks).unwrap()
    };
    let first = service("first");
    let agent = attach(&first);
    full_speed_after(&crew, "the connection ends", || drop(agent));
    let mut agent = attach(&first);
    full_speed_after(&crew, "the agent cancels", || agent.resume().unwrap());
    drop(agent);
    let mut agent = attach(&first);
    full_speed_after(&crew, "gone while stopped", || {
        agent.stop().unwrap();
        drop(agent);
    });
    let mut agent = attach(&first);
    full_speed_after(&crew, "a proven refusal", || {
        agent.stop().unwrap();
        agent.relinquish().unwrap();
        agent.resume().unwrap();
    });
    drop(agent);
    let agent = attach(&first);
    full_speed_after(&crew, "the service ends", || drop(first));
    drop(agent);
}
