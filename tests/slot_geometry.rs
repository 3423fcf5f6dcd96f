//! A dirty page is where it is, whatever the shape of the slots that show it: lengths that are no multiple of 64, holes at
//! odd pages, aliases, swaps, cycles, a thousand slots.

#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::hand::{BASE, Hand, after, dirty, gpa, leased, pages, reported, value};
use common::{Copy, MODES, Random, kvm};
use gleaner::{Block, Consumer, PAGE_SIZE, PageRange, Slot, SlotKey, Start};
use std::collections::BTreeSet;

/// Runs a test in each mode, with a consumer that starts empty.
fn in_each_mode(test: impl Fn(&mut Hand, &Consumer)) {
    if !kvm() {
        return;
    }
    for (_, tracking) in MODES {
        let mut hand = Hand::new(tracking);
        let consumer = hand.tracker.consumer(Start::Empty).unwrap();
        test(&mut hand, &consumer);
    }
}

#[test]
fn slots_of_any_length_report_exactly_the_pages_written() {
    in_each_mode(|hand, consumer| {
        for (slot, length) in (1..).zip([1, 2, 63, 64, 65, 127, 128, 129, 333]) {
            let block = hand.plug(&format!("b{length}"), length, slot, gpa(1000));
            let written: BTreeSet<u64> = [0, length / 2, length - 1].into();
            for page in &written {
                hand.write(gpa(1000 + page), 1, 7);
            }
            assert_eq!(hand.glean(consumer), pages(&block, written), "{length}");
            let mut tx = hand.tracker.transaction();
            tx.delete(slot);
            tx.commit().unwrap();
        }
    });
}

#[test]
fn a_slot_at_the_end_of_its_block_reports_the_blocks_last_page() {
    in_each_mode(|hand, consumer| {
        for (slot, (length, mapped)) in (1..).zip([(333, 70), (128, 64), (129, 1), (64, 63)]) {
            let block = Block::memfd(&format!("b{length}"), length * PAGE_SIZE).unwrap();
            let mut tx = hand.tracker.transaction();
            let at = gpa(1000 * u64::from(slot));
            tx.add_block(&block).create(
                slot,
                at,
                block.extent(PageRange::new(length - mapped, mapped)),
            );
            tx.commit().unwrap();
            hand.write(at, mapped, 7);
            hand.tracker.harvest().unwrap();
            assert_eq!(dirty(&hand.tracker, slot), Vec::from_iter(0..mapped));
            assert_eq!(leased(consumer), pages(&block, length - mapped..length));
        }
    });
}

#[test]
fn a_hole_at_an_odd_page_keeps_every_dirty_page() {
    in_each_mode(|hand, consumer| {
        let block = hand.plug("ram", 333, 1, gpa(0));
        let written = [0, 60, 61, 63, 64, 66, 67, 68, 128, 332];
        for page in written {
            hand.write(gpa(page), 1, page + 1);
        }
        // Not harvested: the transaction has to. The hole is pages 61 to 67.
        let mut tx = hand.tracker.transaction();
        tx.punch(1, PageRange::new(61, 7), 2);
        let report = tx.commit().unwrap();
        assert_eq!(reported(&report, 1), [0, 60]);
        assert_eq!(reported(&report, 2), [0, 60, 264]);
        assert_eq!((report.carried, report.unmapped, report.retired), (5, 5, 0));
        hand.write(gpa(63), 1, 99);
        assert_eq!(hand.missed, [BASE + 63 * PAGE_SIZE]);
        hand.missed.clear();
        assert_eq!(hand.glean(consumer), pages(&block, written));
        assert_eq!(value(&block, 63), 64, "nothing is mapped there");

        // A slot fills the hole, is written, and all become one again.
        let mut tx = hand.tracker.transaction();
        tx.create(3, gpa(61), block.extent(PageRange::new(61, 7)));
        tx.commit().unwrap();
        hand.write(gpa(59), 11, 5);
        let mut tx = hand.tracker.transaction();
        tx.merge(1, 3).merge(1, 2);
        let report = tx.commit().unwrap();
        assert_eq!(reported(&report, 1), Vec::from_iter(59..70));
        assert_eq!(hand.glean(consumer), pages(&block, 59..70));
    });
}

#[test]
fn a_block_that_is_mapped_twice_is_dirty_in_every_slot_that_maps_it() {
    in_each_mode(|hand, consumer| {
        let block = Block::memfd("ram", 200 * PAGE_SIZE).unwrap();
        let mut tx = hand.tracker.transaction();
        tx.add_block(&block)
            .create(1, gpa(0), block.extent(PageRange::new(0, 150)))
            .create(2, gpa(1001), block.extent(PageRange::new(99, 101)));
        tx.commit().unwrap();
        hand.write(gpa(120), 1, 1); // through slot 1
        hand.write(gpa(1001), 1, 2); // page 99, through slot 2
        hand.write(gpa(1101), 1, 3); // page 199, which slot 1 does not show
        hand.tracker.harvest().unwrap();
        assert_eq!(dirty(&hand.tracker, 1), [99, 120]);
        assert_eq!(dirty(&hand.tracker, 2), [0, 21, 100]);

        // Written through a slot that goes: it stays dirty in the one that stays.
        hand.write(gpa(140), 1, 4);
        let mut tx = hand.tracker.transaction();
        tx.delete(1);
        let report = tx.commit().unwrap();
        assert_eq!((report.carried, report.unmapped), (3, 0));
        assert_eq!(dirty(&hand.tracker, 2), [0, 21, 41, 100]);
        assert_eq!(leased(consumer), pages(&block, [99, 120, 140, 199]));
    });
}

#[test]
fn slots_that_swap_places_keep_their_pages_and_show_them_where_they_are_now() {
    in_each_mode(|hand, consumer| {
        let a = hand.plug("a", 77, 1, gpa(0));
        let b = hand.plug("b", 77, 2, gpa(77));
        hand.write(gpa(76), 2, 1); // the last of a, the first of b
        let mut tx = hand.tracker.transaction();
        tx.move_to(1, gpa(77)).move_to(2, gpa(0));
        tx.commit().unwrap();
        hand.write(gpa(5), 1, 2);
        hand.write(gpa(77 + 6), 1, 3);
        let mut expected = pages(&a, [76, 6]);
        expected.extend(pages(&b, [0, 5]));
        assert_eq!(hand.glean(consumer), expected);
        assert_eq!((value(&b, 5), value(&a, 6)), (2, 3));
        assert_eq!((value(&b, 0), value(&a, 76)), (1, 1));
    });
}

#[test]
fn slots_that_exchange_their_ids_keep_their_pages() {
    in_each_mode(|hand, consumer| {
        let a = hand.plug("a", 77, 1, gpa(0));
        let b = hand.plug("b", 77, 2, gpa(77));
        hand.write(gpa(3), 1, 1);
        hand.write(gpa(77 + 4), 1, 1);
        let layout = hand.tracker.layout();
        let slots = layout.slots().map(|s| Slot {
            key: SlotKey::new([0, 2, 1][usize::from(s.key.id)]),
            ..*s
        });
        let mut tx = hand.tracker.transaction();
        tx.transact_to(slots.collect());
        let report = tx.commit().unwrap();
        assert_eq!(
            (reported(&report, 2), reported(&report, 1)),
            (vec![3], vec![4])
        );
        let mut expected = pages(&a, [3]);
        expected.extend(pages(&b, [4]));
        assert_eq!(hand.glean(consumer), expected);
    });
}

#[test]
fn a_slot_that_moves_onto_its_own_range_takes_its_dirty_pages_along() {
    in_each_mode(|hand, consumer| {
        let block = hand.plug("ram", 77, 1, gpa(10));
        let mut expected = BTreeSet::new();
        for (step, at) in [11, 12, 9, 50].into_iter().enumerate() {
            let step = step as u64;
            let now = hand.tracker.layout().slot(1.into()).unwrap().address();
            hand.write(after(now, step), 1, step + 1);
            expected.insert((block.id(), step));
            let mut tx = hand.tracker.transaction();
            tx.move_to(1, gpa(at));
            let report = tx.commit().unwrap();
            assert_eq!(report.calls, 1, "a move, for the sake of its log");
            hand.write(gpa(at + 70 + step), 1, 9);
            expected.insert((block.id(), 70 + step));
        }
        assert_eq!(hand.glean(consumer), expected);
        for step in 0..4 {
            assert_eq!(
                (value(&block, step), value(&block, 70 + step)),
                (step + 1, 9)
            );
        }
    });
}

#[test]
fn a_cycle_of_moves_and_what_waits_for_it_keep_every_page() {
    in_each_mode(|hand, consumer| {
        let blocks: Vec<Block> = (0..5)
            .map(|n| hand.plug(&format!("b{n}"), 65, 1 + n, gpa(65 * u64::from(n))))
            .collect();
        let mut at = [0u64, 1, 2, 3, 4];
        for turn in 0..4u64 {
            let mut expected = BTreeSet::new();
            for (n, block) in blocks.iter().enumerate() {
                let page = turn * 5 + n as u64;
                hand.write(gpa(65 * at[n] + page), 1, 100 + page);
                expected.insert((block.id(), page));
            }
            // Three slots in a cycle, a fourth that follows one of them, a fifth that goes where the fourth was.
            let free = 5 + turn % 2;
            at = [at[1], at[2], at[0], free, at[3]];
            let mut tx = hand.tracker.transaction();
            for (slot, place) in (1..).zip(at) {
                tx.move_to(slot, gpa(65 * place));
            }
            tx.commit().unwrap();
            for (n, block) in blocks.iter().enumerate() {
                hand.write(gpa(65 * at[n] + 64), 1, turn);
                expected.insert((block.id(), 64));
            }
            assert_eq!(hand.glean(consumer), expected, "turn {turn}");
            assert!(blocks.iter().all(|b| value(b, 64) == turn));
        }
    });
}

#[test]
fn a_slot_that_is_read_only_for_a_while_keeps_its_dirty_pages() {
    in_each_mode(|hand, consumer| {
        let block = hand.plug("ram", 77, 1, gpa(0));
        for round in 0..3u64 {
            hand.write(gpa(round), 1, 1);
            let mut tx = hand.tracker.transaction();
            tx.set_readonly(1, true);
            tx.commit().unwrap();
            assert_eq!(dirty(&hand.tracker, 1), [round]);
            hand.write(gpa(50), 1, 2);
            assert_eq!(hand.missed, [BASE + 50 * PAGE_SIZE]);
            hand.missed.clear();
            hand.tracker.harvest().unwrap();
            let mut tx = hand.tracker.transaction();
            tx.set_readonly(1, false);
            tx.commit().unwrap();
            hand.write(gpa(60 + round), 1, 3);
            assert_eq!(hand.glean(consumer), pages(&block, [round, 60 + round]));
            assert_eq!(value(&block, 50), 0);
        }
    });
}

#[test]
fn a_slot_that_goes_leaves_its_dirty_pages_with_the_block() {
    in_each_mode(|hand, consumer| {
        let block = hand.plug("ram", 77, 1, gpa(0));
        hand.write(gpa(70), 7, 6);
        let mut tx = hand.tracker.transaction();
        tx.delete(1);
        let report = tx.commit().unwrap();
        assert_eq!((report.carried, report.unmapped, report.retired), (0, 7, 0));
        let lease = consumer.lease(u64::MAX).unwrap().unwrap();
        let (extent, memory) = &lease.parts()[0];
        assert_eq!(
            (extent.range, lease.parts().len()),
            (PageRange::new(70, 7), 1)
        );
        assert_eq!((memory.id(), value(memory, 76)), (block.id(), 6));
        lease.ack();
        assert_eq!(consumer.dirty_pages(), 0);
    });
}

#[test]
fn a_block_that_is_removed_takes_its_dirty_pages_along() {
    in_each_mode(|hand, consumer| {
        let gone = hand.plug("gone", 77, 1, gpa(0));
        let stays = hand.plug("stays", 77, 2, gpa(77));
        hand.write(gpa(70), 14, 6);
        let early = {
            hand.tracker.harvest().unwrap();
            consumer.lease(3).unwrap().unwrap()
        };
        hand.write(gpa(0), 2, 6);
        let mut tx = hand.tracker.transaction();
        tx.delete(1).remove_block(gone.id());
        let report = tx.commit().unwrap();
        assert_eq!((report.carried, report.unmapped, report.retired), (0, 0, 9));
        assert!(hand.tracker.block(gone.id()).is_none());
        drop(early);
        assert_eq!(hand.glean(consumer), pages(&stays, 0..7));
        // A block of the same name is another block.
        let again = hand.plug("gone", 77, 1, gpa(0));
        assert_ne!(again.id(), gone.id());
        hand.write(gpa(76), 1, 1);
        assert_eq!(hand.glean(consumer), pages(&again, [76]));
    });
}

#[test]
fn a_layout_of_a_thousand_slots_changes_in_its_middle() {
    in_each_mode(|hand, _| {
        const SLOTS: u16 = 1000;
        let block = Block::memfd("ram", 3 * u64::from(SLOTS) * PAGE_SIZE).unwrap();
        let place = |n: u16| gpa(4 * u64::from(n));
        let mut tx = hand.tracker.transaction();
        tx.add_block(&block);
        for n in 0..SLOTS {
            let range = PageRange::new(3 * u64::from(n), 3);
            tx.create(1 + n, place(n), block.extent(range));
        }
        tx.commit().unwrap();
        let consumer = hand.tracker.consumer(Start::AllDirty).unwrap();
        let mut copy = Copy::default();
        let mut random = Random(0x1000);
        for round in 0..8u16 {
            hand.tracker.harvest().unwrap();
            copy.drain(&consumer);
            let random_slot = |random: &mut Random| u16::try_from(random.below(1000)).unwrap();
            for value in 0..200 {
                let n = random_slot(&mut random);
                let page = random.below(3);
                hand.write(after(place(n), page), 1, value + 1000 * u64::from(round));
            }
            // In the middle: two go, one is cut, one is moved into the gap beside it.
            let middle = 400 + round * 10;
            let mut tx = hand.tracker.transaction();
            tx.delete(1 + middle)
                .delete(2 + middle)
                .split(3 + middle, 1, 2000 + round)
                .move_to(4 + middle, place(middle));
            let report = tx.commit().unwrap();
            assert_eq!(report.calls, 2 + 3 + 1);
            for value in 0..50 {
                let n = random_slot(&mut random);
                hand.write(place(n), 1, value);
            }
            hand.tracker.harvest().unwrap();
            copy.drain(&consumer);
            assert_eq!(copy.differing(&hand.tracker), [], "round {round}");
        }
    });
}
