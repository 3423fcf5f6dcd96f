//! Any call to KVM may fail at any time: then the old layout is in force, in the tracker and in KVM, no dirty page is gone,
//! and the vCPUs run again.

#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::changes::{CHANGES, Change, change, warm};
use common::faulty::{self, Faults};
use common::hand::{Hand, after, gpa, leased, pages};
use common::{Copy, MODES, Random, kvm, let_run, machine_with};
use gleaner::vmm::churn::{Kind, Shuffle};
use gleaner::vmm::guest::Workload;
use gleaner::{Block, Consumer, Error, Layout, Start, Tracking};
use std::collections::BTreeSet;
use std::time::Duration;

/// A guest by hand on a KVM that fails to order.
fn faulty(tracking: Tracking) -> (Hand, Faults) {
    let faults = Faults::default();
    let hand = Hand::with(tracking, |builder| faults.stand(builder));
    (hand, faults)
}

/// Writes the first and the last page of every slot of the layout; each must be where the layout says.
fn write_everywhere(hand: &mut Hand, value: u64) {
    let layout = hand.tracker.layout();
    for slot in layout.slots().skip(1) {
        hand.write(slot.address(), 1, value);
        hand.write(after(slot.address(), slot.range.pages - 1), 1, value);
        let missed = if slot.readonly { 2 } else { 0 };
        assert_eq!(std::mem::take(&mut hand.missed).len(), missed, "{slot:?}");
    }
}

/// Everything the guest wrote is at the destination.
fn check_copy(hand: &Hand, consumer: &Consumer, copy: &mut Copy, what: &str) {
    hand.tracker.harvest().unwrap();
    copy.drain(consumer);
    assert_eq!(copy.differing(&hand.tracker), [], "{what}");
}

fn same(a: &Layout, b: &Layout) -> bool {
    a.generation() == b.generation() && a.slots().eq(b.slots()) && a.blocks().eq(b.blocks())
}

/// Makes `kind` fail at each call of the given kinds in turn, until it succeeds. Returns how often it failed.
fn fail_each(
    hand: &mut Hand,
    faults: &Faults,
    (consumer, copy): (&Consumer, &mut Copy),
    kinds: &'static [faulty::Call],
    (block, kind): (&Block, Change),
    what: &str,
) -> u64 {
    for n in 0.. {
        let what = format!("{what}, {}, call {n}", kind.0);
        write_everywhere(hand, 100 + n);
        let before = hand.tracker.layout();
        faults.fail(kinds, n);
        let outcome = change(&hand.tracker, block, kind);
        let failed = faults.heal();
        let Err(error) = outcome else {
            assert_eq!(failed, 0, "{what}: a failure went unnoticed");
            check_copy(hand, consumer, copy, &what);
            return n;
        };
        assert_eq!(failed, 1, "{what}: {error}");
        if kinds == faulty::CHANGES {
            assert!(
                matches!(error, Error::TransactionFailed { at, .. } if at as u64 == n + 1),
                "{what}: {error:?}"
            );
        }
        assert!(same(&hand.tracker.layout(), &before), "{what}");
        assert!(hand.may_run(), "{what}");
        write_everywhere(hand, 200 + n);
        check_copy(hand, consumer, copy, &what);
    }
    unreachable!("a transaction has a last call")
}

#[test]
fn a_transaction_that_fails_at_any_call_leaves_the_old_layout_in_force() {
    if !kvm() {
        return;
    }
    for (mode, tracking) in MODES {
        let (mut hand, faults) = faulty(tracking);
        let block = warm(&mut hand);
        let consumer = hand.tracker.consumer(Start::AllDirty).unwrap();
        let mut copy = Copy::default();
        for kind in CHANGES {
            let each = (&consumer, &mut copy);
            let n = fail_each(
                &mut hand,
                &faults,
                each,
                faulty::CHANGES,
                (&block, kind),
                mode,
            );
            assert!(n > 0, "{mode}, {}: it makes calls", kind.0);
        }
    }
}

#[test]
fn a_transaction_whose_harvest_fails_at_any_call_loses_nothing() {
    if !kvm() {
        return;
    }
    for (mode, tracking) in MODES {
        let (mut hand, faults) = faulty(tracking);
        let block = warm(&mut hand);
        let consumer = hand.tracker.consumer(Start::AllDirty).unwrap();
        let mut copy = Copy::default();
        for kind in CHANGES {
            let each = (&consumer, &mut copy);
            fail_each(&mut hand, &faults, each, faulty::ANY, (&block, kind), mode);
        }
    }
}

#[test]
fn a_harvest_that_fails_at_any_call_holds_its_pages_back_and_loses_none() {
    if !kvm() {
        return;
    }
    for (mode, tracking) in MODES {
        let (mut hand, faults) = faulty(tracking);
        let blocks: Vec<Block> = (1..5)
            .map(|n| hand.plug(&format!("b{n}"), 65, n, gpa(100 * u64::from(n))))
            .collect();
        let consumer = hand.tracker.consumer(Start::Empty).unwrap();
        for n in 0.. {
            for slot in 1..5 {
                hand.write(gpa(100 * slot + 60), 5, n);
            }
            faults.fail(faulty::HARVEST, n);
            let outcome = hand.tracker.harvest();
            let failed = faults.heal();
            let mut seen = BTreeSet::new();
            if outcome.is_err() {
                assert_eq!(failed, 1, "{mode}, call {n}");
                // What was written since must not make up for what was held back.
                hand.write(gpa(100), 1, n);
                seen = pages(&blocks[0], [0]);
            }
            for block in &blocks {
                seen.extend(pages(block, 60..65));
            }
            assert_eq!(hand.glean(&consumer), seen, "{mode}, call {n}");
            if outcome.is_ok() {
                assert!(n > 0 && failed == 0, "{mode}");
                break;
            }
        }
    }
}

#[test]
fn logging_that_can_not_be_switched_on_is_off_everywhere_and_can_be_tried_again() {
    if !kvm() {
        return;
    }
    for (mode, tracking) in MODES {
        let (mut hand, faults) = faulty(tracking);
        let blocks: Vec<Block> = (1..5)
            .map(|n| hand.plug(&format!("b{n}"), 65, n, gpa(100 * u64::from(n))))
            .collect();
        for n in 0.. {
            hand.write(gpa(100), 65, n);
            faults.fail(faulty::ANY, n);
            let outcome = hand.tracker.consumer(Start::Empty);
            let failed = faults.heal();
            let Ok(consumer) = outcome else {
                assert_eq!(failed, 1, "{mode}, call {n}");
                assert_eq!(hand.logged(), None, "{mode}, call {n}");
                // A transaction is possible, and so is another attempt.
                let mut tx = hand.tracker.transaction();
                tx.move_to(4, gpa(400 + n % 2));
                tx.commit()
                    .unwrap_or_else(|e| panic!("{mode}, call {n}: {e}"));
                let consumer = hand.tracker.consumer(Start::Empty).unwrap();
                hand.write(gpa(130), 1, n);
                assert_eq!(
                    hand.glean(&consumer),
                    pages(&blocks[0], [30]),
                    "{mode}, call {n}"
                );
                continue;
            };
            assert!(n > 0 && failed == 0, "{mode}");
            assert_eq!(leased(&consumer), BTreeSet::new());
            break;
        }
    }
}
#[test]
fn a_failed_rollback_keeps_the_gate_closed_and_every_dirty_page_readable() {
    if !kvm() {
        return;
    }
    for (mode, tracking) in MODES {
        for (at, kind) in CHANGES.into_iter().enumerate() {
            for n in 1.. {
                let what = format!("{mode}, {}, call {n}", kind.0);
                let (mut hand, faults) = faulty(tracking);
                let block = warm(&mut hand);
                for earlier in &CHANGES[..at] {
                    change(&hand.tracker, &block, *earlier).unwrap();
                }
                let consumer = hand.tracker.consumer(Start::AllDirty).unwrap();
                let mut copy = Copy::default();
                check_copy(&hand, &consumer, &mut copy, &what);
                write_everywhere(&mut hand, n);
                faults.fail_from(faulty::CHANGES, n);
                let outcome = change(&hand.tracker, &block, kind);
                faults.heal();
                let Err(error) = outcome else { break };
                assert!(
                    matches!(error, Error::RollbackFailed { .. }),
                    "{what}: {error:?}"
                );
                assert!(!hand.may_run(), "{what}: the gate is open");
                let again = change(&hand.tracker, &block, kind);
                assert!(matches!(again, Err(Error::Broken)), "{what}: {again:?}");
                check_copy(&hand, &consumer, &mut copy, &what);
                assert!(!hand.may_run(), "{what}: the gate was opened");
            }
        }
    }
}

/// The same with vCPUs that write all the time: they run again after each failure, and no write of theirs is lost.
#[test]
fn a_running_guest_loses_nothing_to_transactions_that_fail() {
    if !kvm() {
        return;
    }
    for (mode, tracking) in MODES {
        let faults = Faults::default();
        let mut machine = machine_with(tracking, 8 << 20, Workload::Random, 0xfa11, |b| {
            faults.stand(b)
        });
        let tracker = machine.tracker().clone();
        let mut shuffle = Shuffle::new(machine.ram().clone(), Kind::ALL.to_vec(), 0xfa11);
        let mut random = Random(0xfa11);
        let consumer = tracker.consumer(Start::AllDirty).unwrap();
        let (mut copy, mut failed) = (Copy::default(), 0);
        machine.start();
        for round in 0..100 {
            let_run(&mut random, 1000);
            faults.fail(faulty::CHANGES, random.below(5));
            let outcome = shuffle.step(&tracker);
            let armed = faults.heal();
            assert_eq!(outcome.is_err(), armed == 1, "{mode}, {round}: {outcome:?}");
            failed += armed;
            let_run(&mut random, 500);
            let stopped = tracker.stop(|| Ok(())).unwrap();
            tracker.harvest().unwrap();
            copy.drain(&consumer);
            assert_eq!(copy.differing(&tracker), [], "{mode}, {round}");
            drop(stopped);
        }
        assert!(failed > 0, "{mode}");
        let check = machine.check(Duration::from_secs(60)).unwrap();
        assert!(check.is_ok(), "{mode}: {check}");
    }
}
