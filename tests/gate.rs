//! The gate: nobody inside when it says so, everybody in again when it opens, and no kick is lost on the way.
//!
//! Nothing here is timed. What hangs is ended by a watchdog.

#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::crew::Crew;
use common::faulty::{self, Faults};
use common::{Copy, MODES, Random, Watchdog, kvm};
use gleaner::vmm::guest::HOME;
use gleaner::{Block, Error, PAGE_SIZE, PageRange, Start, Tracker, Tracking};
use vm_memory::GuestAddress;

#[test]
fn no_vcpu_runs_while_a_transaction_is_inside() {
    if !kvm() {
        return;
    }
    let _watchdog = Watchdog::new("a transaction");
    for (mode, tracking) in MODES {
        let crew = Crew::start(tracking, 2, |b| b, |_, _| ());
        for _ in 0..20 {
            // Outside it does change: the vCPUs run.
            let exits = crew.shared.exits();
            assert!(!crew.shared.changes_inside(), "{mode}");
            crew.shared.wait_for_progress(&exits);
        }
    }
}

#[test]
fn stopping_and_going_on_a_thousand_times_loses_no_kick() {
    if !kvm() {
        return;
    }
    let _watchdog = Watchdog::new("a stop, or a vCPU after one");
    let crew = Crew::start(Tracking::Auto, 2, |b| b, |_, _| ());
    for round in 0..1000 {
        let exits = crew.shared.exits();
        let stopped = crew.shared.tracker.stop(|| Ok(())).unwrap();
        assert!(matches!(
            crew.shared.tracker.stop(|| Ok(())),
            Err(Error::AlreadyStopped)
        ));
        if round % 50 == 0 {
            let before = crew.shared.home();
            assert!(crew.shared.home() == before, "the guest runs");
            assert_eq!(stopped.vcpus().save().unwrap().len(), 2);
        }
        drop(stopped);
        // Every other time at once again, before anybody has noticed.
        if round % 2 == 0 {
            crew.shared.wait_for_progress(&exits);
        }
    }
}

#[test]
fn closing_and_opening_a_thousand_times_loses_no_kick() {
    if !kvm() {
        return;
    }
    let _watchdog = Watchdog::new("a transaction, or a vCPU after one");
    let crew = Crew::start(Tracking::Auto, 2, |b| b, |_, _| ());
    for round in 1..=1000 {
        let exits = crew.shared.exits();
        let mut tx = crew.shared.tracker.transaction();
        tx.move_to(1, GuestAddress(HOME + (round % 2) * (8 << 30)));
        tx.commit().unwrap();
        if round % 2 == 0 {
            crew.shared.wait_for_progress(&exits);
        }
    }
}

/// vCPUs that leave `KVM_RUN` only when they are kicked: a kick that is lost is a stop that fails.
#[test]
fn every_kick_arrives_at_vcpus_that_never_leave_by_themselves() {
    if !kvm() {
        return;
    }
    let _watchdog = Watchdog::new("vCPUs that spin");
    let crew = Crew::spin(Tracking::Auto, 2);
    let mut random = Random(0x91c);
    for round in 1..=2000 {
        if round % 16 == 0 {
            let before = crew.shared.spun();
            while crew
                .shared
                .spun()
                .iter()
                .zip(&before)
                .any(|(now, then)| now <= then)
            {
                std::thread::yield_now();
            }
        } else {
            // Somewhere on their way in.
            for _ in 0..random.below(20_000) {
                std::hint::spin_loop();
            }
        }
        if round % 2 == 0 {
            drop(crew.shared.tracker.stop(|| Ok(())).unwrap());
        } else {
            let mut tx = crew.shared.tracker.transaction();
            tx.split(1, 100, 2);
            tx.commit().unwrap();
            let mut tx = crew.shared.tracker.transaction();
            tx.merge(1, 2);
            tx.commit().unwrap();
        }
    }
}

#[test]
fn stops_that_the_devices_refuse_let_the_guest_go_on() {
    if !kvm() {
        return;
    }
    let _watchdog = Watchdog::new("a vCPU after a stop that was refused");
    let crew = Crew::start(Tracking::Auto, 2, |b| b, |_, _| ());
    for _ in 0..50 {
        let exits = crew.shared.exits();
        let refused = crew.shared.tracker.stop(|| Err("busy".into()));
        assert!(refused.unwrap_err().to_string().contains("busy"));
        crew.shared.wait_for_progress(&exits);
    }
}

/// A BAR write is such an exit: the handler moves a slot, while the other vCPU runs, or does the same.
#[test]
fn a_transaction_may_start_in_an_exit_handler_of_any_vcpu() {
    if !kvm() {
        return;
    }
    let _watchdog = Watchdog::new("a transaction in an exit handler");
    for (mode, tracking) in MODES {
        let crew = Crew::start(
            tracking,
            2,
            |b| b,
            |shared, vcpu| {
                if shared.exits()[vcpu] % 5 != 0 {
                    return;
                }
                let slot = 10 + u16::try_from(vcpu).unwrap();
                let place = GuestAddress(HOME + ((20 + vcpu as u64) << 30));
                let alias = shared.ram.extent(PageRange::new(600, 333));
                let mut tx = shared.tracker.transaction();
                if shared.tracker.layout().slot(slot.into()).is_none() {
                    tx.create(slot, place, alias);
                } else {
                    tx.delete(slot);
                }
                tx.commit().unwrap();
            },
        );
        let consumer = crew.shared.tracker.consumer(Start::AllDirty).unwrap();
        let mut copy = Copy::default();
        let before = crew.shared.tracker.transactions();
        for _ in 0..20 {
            let exits = crew.shared.exits();
            crew.shared.wait_for_progress(&exits);
            let stopped = crew.shared.tracker.stop(|| Ok(())).unwrap();
            crew.shared.tracker.harvest().unwrap();
            copy.drain(&consumer);
            assert_eq!(copy.differing(&crew.shared.tracker), [], "{mode}");
            drop(stopped);
        }
        while crew.shared.tracker.transactions() < before + 20 {
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_shutdown_ends_threads_that_run_that_are_parked_and_that_wait_at_a_closed_gate() {
    if !kvm() {
        return;
    }
    let _watchdog = Watchdog::new("a shutdown");
    let crew = Crew::start(Tracking::Auto, 2, |b| b, |_, _| ());
    crew.shared.tracker.shutdown();
    crew.join();

    let crew = Crew::start(Tracking::Auto, 2, |b| b, |_, _| ());
    let exits = crew.shared.exits();
    crew.shared.wait_for_progress(&exits);
    let stopped = crew.shared.tracker.stop(|| Ok(())).unwrap();
    crew.shared.tracker.shutdown();
    crew.join();
    drop(stopped);

    let faults = Faults::default();
    let crew = Crew::start(Tracking::Auto, 2, |b| faults.stand(b), |_, _| ());
    let exits = crew.shared.exits();
    crew.shared.wait_for_progress(&exits);
    faults.fail_from(faulty::CHANGES, 1);
    let mut tx = crew.shared.tracker.transaction();
    tx.split(1, 5, 2);
    let error = tx.commit().unwrap_err();
    assert!(matches!(error, Error::RollbackFailed { .. }), "{error}");
    let before = crew.shared.home();
    assert!(
        crew.shared.home() == before,
        "the guest runs without its slot"
    );
    crew.shared.tracker.shutdown();
    crew.join();
}

#[test]
fn a_vcpu_thread_that_pauses_is_parked_at_once() {
    if !kvm() {
        return;
    }
    let _watchdog = Watchdog::new("a stop while vCPUs pause");
    // Far longer than the watchdog waits.
    let crew = Crew::start(
        Tracking::Auto,
        2,
        |b| b,
        |shared, _| {
            shared.tracker.gate().pause(Duration::from_secs(3600));
        },
    );
    for _ in 0..20 {
        drop(crew.shared.tracker.stop(|| Ok(())).unwrap());
    }
}

/// Makes transactions on a slot of its own.
fn transact(
    tracker: &Tracker,
    block: &Block,
    slot: u16,
    inside: &AtomicBool,
    generations: &Mutex<BTreeSet<u64>>,
) {
    for round in 0..50u64 {
        let mut tx = tracker.transaction();
        let at = GuestAddress(HOME + (u64::from(slot) << 30) + (round % 7) * PAGE_SIZE);
        if round == 0 {
            tx.create(
                slot,
                at,
                block.extent(PageRange::new(u64::from(slot) * 70, 333)),
            );
        } else {
            tx.move_to(slot, at);
        }
        let report = tx
            .commit_with(|_| {
                assert!(!inside.swap(true, Ordering::SeqCst), "two are inside");
                std::thread::yield_now();
                inside.store(false, Ordering::SeqCst);
            })
            .unwrap();
        assert!(generations.lock().unwrap().insert(report.generation.0));
    }
}

#[test]
fn transactions_of_several_threads_come_one_after_the_other() {
    if !kvm() {
        return;
    }
    let _watchdog = Watchdog::new("transactions of several threads");
    for (mode, tracking) in MODES {
        let crew = Crew::start(tracking, 2, |b| b, |_, _| ());
        let shared = &crew.shared;
        let consumer = shared.tracker.consumer(Start::AllDirty).unwrap();
        let (inside, generations) = (AtomicBool::new(false), Mutex::default());
        let first = shared.tracker.layout().generation().0;
        let mut copy = Copy::default();
        std::thread::scope(|s| {
            for slot in 10..14 {
                let (inside, generations) = (&inside, &generations);
                s.spawn(move || transact(&shared.tracker, &shared.ram, slot, inside, generations));
            }
            while shared.tracker.layout().generation().0 < first + 200 {
                shared.tracker.harvest().unwrap();
                copy.drain(&consumer);
            }
        });
        let expected: BTreeSet<u64> = (first + 1..=first + 200).collect();
        assert_eq!(*generations.lock().unwrap(), expected, "{mode}");
        let stopped = shared.tracker.stop(|| Ok(())).unwrap();
        shared.tracker.harvest().unwrap();
        copy.drain(&consumer);
        assert_eq!(copy.differing(&shared.tracker), [], "{mode}");
        drop(stopped);
    }
}
