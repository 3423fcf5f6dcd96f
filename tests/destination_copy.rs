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
use gleaner::{Start, Tracking};

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
