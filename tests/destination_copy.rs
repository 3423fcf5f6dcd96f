//! No page is lost: whatever the slots do, a destination that copies what it is given, when it is given it, has every page.
//!
//! Stronger than the kernel's own test of the dirty log: there is no tolerance. After each transaction the guest is stopped,
//! harvested, copied, and *all* pages are compared.

#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)] // helpers of tests

mod common;

use std::time::Duration;

use common::{Copy, MODES, Random, kvm, let_run, machine};
use gleaner::vmm::churn::{Kind, Shuffle};
use gleaner::vmm::guest::Workload;
use gleaner::{Fault, Mode, Slot, SlotKey, Start, Tracker, Tracking};

/// What a run found.
#[derive(Debug, Default)]
struct Outcome {
    transactions: u64,
    /// Pages that differed, over all comparisons.
    lost: u64,
    /// Comparisons with any such page.
    bad: u64,
    copied: u64,
}

fn run(tracking: Tracking, transactions: u64, workload: Workload, seed: u64) -> Outcome {
    let mut machine = machine(tracking, 8 << 20, workload, seed);
    let tracker = machine.tracker().clone();
    let mut shuffle = Shuffle::new(machine.ram().clone(), Kind::ALL.to_vec(), seed);
    let mut random = Random(seed);
    let consumer = tracker.consumer(Start::AllDirty).unwrap();
    let mut copy = Copy::default();
    let mut outcome = Outcome::default();
    machine.start();
    while outcome.transactions < transactions {
        let_run(&mut random, 1500);
        if random.below(2) == 0 {
            // A copy while the guest runs: the page may be written again before, during and after.
            tracker.harvest().unwrap();
            copy.drain(&consumer);
            let_run(&mut random, 500);
        }
        shuffle
            .step(&tracker)
            .unwrap()
            .expect("some kind is always possible");
        outcome.transactions += 1;
        let_run(&mut random, 800);
        let stopped = tracker.stop(|| Ok(())).unwrap();
        tracker.harvest().unwrap();
        copy.drain(&consumer);
        let bad = copy.differing(&tracker);
        outcome.lost += bad.len() as u64;
        outcome.bad += u64::from(!bad.is_empty());
        drop(stopped);
    }
    let check = machine.check(Duration::from_secs(60)).unwrap();
    assert!(check.is_ok(), "the guest's own check: {check}");
    outcome.copied = copy.pages;
    outcome
}

/// Transactions a mode: 10,000 with `GLEANER_LONG=1`, as few as CI can bear otherwise.
fn transactions() -> u64 {
    if std::env::var_os("GLEANER_LONG").is_some() {
        10_000
    } else {
        500
    }
}

#[test]
fn no_page_differs_after_any_transaction_in_any_mode() {
    if !kvm() {
        return;
    }
    for (name, tracking) in MODES {
        let n = transactions();
        let outcome = run(tracking, n, Workload::Random, 0x5eed);
        println!("{name}: {outcome:?}");
        assert_eq!(outcome.lost, 0, "{name}: {outcome:?}");
    }
}

/// One transaction that lets both halves of the home region change their slot ids: what is read by the wrong layout names
/// a page that exists, and is the wrong one.
fn exchange(tracker: &Tracker) {
    let mut tx = tracker.transaction();
    let layout = tracker.layout();
    if layout.slot(SlotKey::new(2)).is_none() {
        let home = layout.slot(SlotKey::new(1)).unwrap();
        tx.split(1, home.range.pages / 2, 2);
    } else {
        let exchanged = |id| match id {
            1 => 2,
            2 => 1,
            other => other,
        };
        let slots = layout.slots().map(|s| Slot {
            key: exchanged(s.key.id).into(),
            ..*s
        });
        tx.transact_to(slots.collect());
    }
    tx.commit().unwrap();
}

/// Transactions until the first page differs, with a bug planted; `None` when none does in as many as there may be.
fn found_after(tracking: Tracking, fault: Option<Fault>, most: u64) -> Option<u64> {
    let mut machine = machine(tracking, 8 << 20, Workload::Random, 0x5eed);
    let tracker = machine.tracker().clone();
    let mut random = Random(0x5eed);
    let consumer = tracker.consumer(Start::AllDirty).unwrap();
    let mut copy = Copy::default();
    tracker.plant(fault);
    machine.start();
    for round in 1..=most {
        let_run(&mut random, 500);
        tracker.harvest().unwrap();
        copy.drain(&consumer);
        let_run(&mut random, 500);
        exchange(&tracker);
        let_run(&mut random, 200);
        let stopped = tracker.stop(|| Ok(())).unwrap();
        tracker.harvest().unwrap();
        copy.drain(&consumer);
        if !copy.differing(&tracker).is_empty() {
            return Some(round);
        }
        drop(stopped);
    }
    None
}

/// Far more than any of the bugs needs; each is found within a few.
const MOST: u64 = 2000;

#[test]
fn a_gate_that_stays_open_is_found_in_every_mode() {
    if !kvm() {
        return;
    }
    for (name, tracking) in MODES {
        let found = found_after(tracking, Some(Fault::GateOpen), MOST);
        println!("{name}: {found:?}");
        assert!(found.is_some(), "{name}");
    }
}

#[test]
fn a_harvest_left_out_is_found_in_every_mode() {
    if !kvm() {
        return;
    }
    for (name, tracking) in MODES {
        let found = found_after(tracking, Some(Fault::HarvestLeftOut), MOST);
        println!("{name}: {found:?}");
        assert!(found.is_some(), "{name}");
    }
}

/// Where fetching is not re-arming: a plain bitmap can't be read too early.
#[test]
fn re_arming_after_the_copy_is_found_where_it_can_be() {
    if !kvm() {
        return;
    }
    for (name, tracking) in MODES {
        let found = found_after(
            tracking,
            Some(Fault::RearmLate),
            if name == "bitmap" { 50 } else { MOST },
        );
        println!("{name}: {found:?}");
        assert_eq!(found.is_some(), name != Mode::Bitmap.name(), "{name}");
    }
}

#[test]
fn exchanged_slot_ids_lose_nothing_when_nothing_is_planted() {
    if !kvm() {
        return;
    }
    for (name, tracking) in MODES {
        let found = found_after(tracking, None, 100);
        assert_eq!(found, None, "{name}");
    }
}
