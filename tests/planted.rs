//! Bugs planted in the tracker are found on the real KVM too, in every mode that can have them: a test that never fails
//! shows nothing.

#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::crew::Crew;
use common::{Copy, MODES, Random, Watchdog, kvm, let_run, machine};
use gleaner::vmm::guest::Workload;
use gleaner::{Mode, Slot, SlotKey, Start, Tracker, Tracking};
use gleaner_bitmap::mutant::{self, Mutant};

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

/// Transactions until the first page differs, with a bug planted or none; `None` when none does in as many as there may be.
fn found_after(tracking: Tracking, mutant: Option<Mutant>, most: u64) -> Option<u64> {
    let mut machine = machine(tracking, 8 << 20, Workload::Random, 0x5eed);
    let tracker = machine.tracker().clone();
    let mut random = Random(0x5eed);
    let consumer = tracker.consumer(Start::AllDirty).unwrap();
    let mut copy = Copy::default();
    let _planted = mutant::plant(mutant);
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
        let found = found_after(tracking, Some(Mutant::GateOpen), MOST);
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
        let found = found_after(tracking, Some(Mutant::HarvestLeftOut), MOST);
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
            Some(Mutant::RearmLate),
            if name == "bitmap" { 50 } else { MOST },
        );
        println!("{name}: {found:?}");
        assert_eq!(found.is_some(), name != Mode::Bitmap.name(), "{name}");
    }
}

/// Where logs start with all bits set.
#[test]
fn memory_that_is_leased_without_being_armed_is_found() {
    if !kvm() {
        return;
    }
    let found = found_after(Tracking::BitmapClear, Some(Mutant::LeasedUnarmed), MOST);
    println!("{found:?}");
    assert!(found.is_some());
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

#[test]
fn a_vcpu_that_runs_while_a_transaction_is_inside_is_found() {
    if !kvm() {
        return;
    }
    let _planted = mutant::plant(Mutant::GateOpen);
    let _watchdog = Watchdog::new("a transaction with the gate open");
    let crew = Crew::start(Tracking::Bitmap, 2, |b| b, |_, _| ());
    while !crew.shared.changes_inside() {}
}
