//! No page is dirty that nobody wrote: a slot change costs no page, a consumer sees nothing of what came before it.

#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::changes::{CHANGES, PAGES, change, warm};
use common::hand::{BASE, Hand, gpa, leased, pages};
use common::{MODES, kvm};
use gleaner::{Block, BlockId, PAGE_SIZE, Start};
use std::collections::BTreeSet;
use vm_memory::{Bytes, GuestAddress, VolatileMemory};

#[test]
fn a_transaction_of_any_kind_makes_no_page_dirty() {
    if !kvm() {
        return;
    }
    for (mode, tracking) in MODES {
        let mut hand = Hand::new(tracking);
        let block = warm(&mut hand);
        // Right after the start of logging: with manual protection KVM's logs begin with all bits set.
        let consumer = hand.tracker.consumer(Start::Empty).unwrap();
        for kind in CHANGES {
            change(&hand.tracker, &block, kind).unwrap();
            assert_eq!(hand.glean(&consumer), BTreeSet::new(), "{mode}, {}", kind.0);
        }
        // A block comes, and goes.
        let other = hand.plug("other", 65, 9, gpa(5000));
        assert_eq!(hand.glean(&consumer), BTreeSet::new(), "{mode}, plug in");
        let mut tx = hand.tracker.transaction();
        tx.delete(9).remove_block(other.id());
        assert_eq!(tx.commit().unwrap().retired, 0);
        assert_eq!(hand.glean(&consumer), BTreeSet::new(), "{mode}, plug out");
    }
}

#[test]
fn pages_written_around_transactions_are_reported_and_no_others() {
    if !kvm() {
        return;
    }
    for (mode, tracking) in MODES {
        let mut hand = Hand::new(tracking);
        let block = warm(&mut hand);
        let consumer = hand.tracker.consumer(Start::Empty).unwrap();
        for (step, kind) in (0..).zip(CHANGES) {
            let mut expected = BTreeSet::new();
            for written in [2 * step, 2 * step + 1] {
                let layout = hand.tracker.layout();
                let slot = layout
                    .slots()
                    .find(|s| s.block == block.id() && !s.readonly)
                    .unwrap();
                hand.write(GuestAddress(slot.gpa + written * PAGE_SIZE), 1, step);
                expected.insert((block.id(), slot.range.first + written));
                if written % 2 == 0 {
                    change(&hand.tracker, &block, kind).unwrap();
                }
            }
            assert_eq!(hand.glean(&consumer), expected, "{mode}, {}", kind.0);
        }
    }
}

/// Each delete or move may make KVM drop the mappings of all slots; then what is merely read afterwards counts as dirty.
#[test]
fn pages_of_untouched_slots_that_are_read_after_a_transaction_are_not_dirty() {
    if !kvm() {
        return;
    }
    for (mode, tracking) in MODES {
        let mut hand = Hand::new(tracking);
        warm(&mut hand);
        hand.plug("other", 65, 2, gpa(1000));
        hand.write(gpa(1000), 65, 1);
        let consumer = hand.tracker.consumer(Start::Empty).unwrap();
        for step in 0..4 {
            let mut tx = hand.tracker.transaction();
            match step {
                0 => tx.move_to(2, gpa(2000)),
                1 => tx.split(2, 30, 3),
                2 => tx.merge(2, 3),
                _ => tx.delete(2),
            };
            tx.commit().unwrap();
            hand.read(gpa(0), PAGES);
            assert_eq!(hand.glean(&consumer), BTreeSet::new(), "{mode}, {step}");
        }
    }
}

#[test]
fn pages_are_not_reported_again_until_they_are_written_again() {
    if !kvm() {
        return;
    }
    for (mode, tracking) in MODES {
        let mut hand = Hand::new(tracking);
        let block = warm(&mut hand);
        let consumer = hand.tracker.consumer(Start::Empty).unwrap();
        for round in 0..3 {
            hand.write(gpa(60), 9, round);
            assert_eq!(hand.glean(&consumer), pages(&block, 60..69), "{mode}");
            assert_eq!(hand.glean(&consumer), BTreeSet::new(), "{mode}");
        }
    }
}

#[test]
fn a_consumer_that_starts_empty_sees_nothing_of_what_came_before() {
    if !kvm() {
        return;
    }
    for (mode, tracking) in MODES {
        let mut hand = Hand::new(tracking);
        let block = warm(&mut hand);
        vmm_writes(&block, 5);
        let first = hand.tracker.consumer(Start::Empty).unwrap();
        assert_eq!(hand.glean(&first), BTreeSet::new(), "{mode}, first");
        hand.write(gpa(7), 2, 1);
        vmm_writes(&block, 11);
        // Not harvested yet: it belongs to the first one all the same.
        let second = hand.tracker.consumer(Start::Empty).unwrap();
        assert_eq!(hand.glean(&second), BTreeSet::new(), "{mode}, second");
        assert_eq!(leased(&first), pages(&block, [7, 8, 11]), "{mode}");
        hand.write(gpa(8), 1, 1);
        assert_eq!(hand.glean(&second), pages(&block, [8]), "{mode}");
        assert_eq!(leased(&first), pages(&block, [8]), "{mode}");
    }
}

fn vmm_writes(block: &Block, page: u64) {
    let at = usize::try_from(page * PAGE_SIZE).unwrap();
    let memory = block.memory().as_volatile_slice();
    memory.write_obj(1u8, at).unwrap();
}

#[test]
fn a_consumer_that_starts_all_dirty_has_every_page_once() {
    if !kvm() {
        return;
    }
    for (mode, tracking) in MODES {
        let mut hand = Hand::new(tracking);
        let block = warm(&mut hand);
        let consumer = hand.tracker.consumer(Start::AllDirty).unwrap();
        let low = hand.tracker.layout().slot(0.into()).unwrap().block;
        let all: BTreeSet<(BlockId, u64)> = (0..1024)
            .map(|page| (low, page))
            .chain(pages(&block, 0..PAGES))
            .collect();
        assert_eq!(hand.glean(&consumer), all, "{mode}");
        assert_eq!(hand.glean(&consumer), BTreeSet::new(), "{mode}");
    }
}

#[test]
fn logging_ends_with_the_last_consumer_and_begins_with_the_next() {
    if !kvm() {
        return;
    }
    for (mode, tracking) in MODES {
        let mut hand = Hand::new(tracking);
        let block = warm(&mut hand);
        let first = hand.tracker.consumer(Start::Empty).unwrap();
        let second = hand.tracker.consumer(Start::Empty).unwrap();
        drop(first);
        hand.write(gpa(3), 1, 1);
        assert_eq!(
            hand.glean(&second),
            pages(&block, [3]),
            "{mode}: one is left"
        );
        hand.write(gpa(4), 1, 1);
        drop(second);
        assert_eq!(hand.logged(), None, "{mode}: KVM still logs");
        hand.write(gpa(5), 1, 1);
        change(&hand.tracker, &block, CHANGES[0]).unwrap();
        hand.write(gpa(90), 1, 1);
        let third = hand.tracker.consumer(Start::Empty).unwrap();
        assert_eq!(
            hand.glean(&third),
            BTreeSet::new(),
            "{mode}: nobody was there"
        );
        hand.write(gpa(6), 1, 1);
        hand.write(gpa(91), 1, 1);
        assert_eq!(hand.glean(&third), pages(&block, [6, 91]), "{mode}");
    }
}

#[test]
fn a_slot_made_while_nobody_consumes_is_logged_when_somebody_does() {
    if !kvm() {
        return;
    }
    for (mode, tracking) in MODES {
        let mut hand = Hand::new(tracking);
        drop(hand.tracker.consumer(Start::AllDirty).unwrap());
        let block = warm(&mut hand);
        let consumer = hand.tracker.consumer(Start::Empty).unwrap();
        hand.write(gpa(PAGES - 1), 1, 2);
        assert_eq!(hand.missed, Vec::<u64>::new(), "{BASE:#x}");
        assert_eq!(hand.glean(&consumer), pages(&block, [PAGES - 1]), "{mode}");
    }
}
