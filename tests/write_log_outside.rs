//! A mark outside its log fails harvests until its block is gone; it must not keep the block from going, nor the rest of
//! the guest's pages from being found.

#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::faulty::Faults;
use common::hand::{Hand, gpa, leased, pages};
use common::{MODES, kvm};
use gleaner::{Block, Error, PAGE_SIZE, PageRange, Start};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, VolatileMemory};

/// The VMM marks a page that its window does not have.
fn mark_outside(block: &Block) {
    let window = block.write_log().window(PageRange::new(0, 2)).unwrap();
    window.mark_dirty(usize::try_from(2 * PAGE_SIZE).unwrap(), 1);
}

fn is_mark_outside(error: &Error, block: &Block) -> bool {
    matches!(error, Error::Bitmap(gleaner_bitmap::Error::MarkOutside { block: b, .. }) if *b == block.id())
}

#[test]
fn a_mark_outside_its_log_fails_harvests_until_its_block_is_removed() {
    if !kvm() {
        return;
    }
    for (mode, tracking) in MODES {
        let mut hand = Hand::new(tracking);
        let good = hand.plug("good", 65, 1, gpa(0));
        let bad = hand.plug("bad", 65, 2, gpa(100));
        let consumer = hand.tracker.consumer(Start::Empty).unwrap();
        hand.write(gpa(3), 1, 1);
        hand.write(gpa(103), 1, 1);
        mark_outside(&bad);
        for _ in 0..2 {
            let error = hand.tracker.harvest().unwrap_err();
            assert!(is_mark_outside(&error, &bad), "{mode}: {error}");
        }
        hand.write(gpa(4), 1, 1);
        let mut tx = hand.tracker.transaction();
        tx.split(1, 30, 3);
        tx.commit().unwrap_or_else(|e| panic!("{mode}: {e}"));
        let mut tx = hand.tracker.transaction();
        tx.delete(2).remove_block(bad.id());
        tx.commit().unwrap_or_else(|e| panic!("{mode}: {e}"));
        hand.write(gpa(50), 1, 1);
        assert_eq!(hand.glean(&consumer), pages(&good, [3, 4, 50]), "{mode}");
    }
}

#[test]
fn a_mark_outside_its_log_keeps_neither_healing_nor_the_removal_of_its_block() {
    if !kvm() {
        return;
    }
    let faults = Faults::default();
    let (_, ring) = MODES[2];
    let mut hand = Hand::with(ring, |builder| faults.stand(builder));
    let good = hand.plug("good", 65, 1, gpa(0));
    let bad = hand.plug("bad", 65, 2, gpa(100));
    let consumer = hand.tracker.consumer(Start::Empty).unwrap();
    faults.cut_resets(1);
    hand.write(gpa(3), 1, 1);
    hand.write(gpa(103), 1, 1);
    mark_outside(&bad);
    let mut tx = hand.tracker.transaction();
    tx.delete(2).remove_block(bad.id());
    tx.commit().unwrap();
    assert_eq!(faults.cut(), 1);
    assert_eq!(hand.glean(&consumer), pages(&good, [3]));
    hand.write(gpa(3), 1, 2);
    assert_eq!(hand.glean(&consumer), pages(&good, [3]));
}

/// The block's own log has marks already, as that of every block into which firmware was loaded.
#[test]
fn a_block_that_comes_with_marks_does_not_keep_the_rings_from_being_healed() {
    if !kvm() {
        return;
    }
    let faults = Faults::default();
    let (_, ring) = MODES[2];
    let mut hand = Hand::with(ring, |builder| faults.stand(builder));
    let ram = hand.plug("ram", 65, 1, gpa(0));
    let consumer = hand.tracker.consumer(Start::Empty).unwrap();
    faults.cut_resets(1);
    hand.write(gpa(3), 1, 1);
    let rom = Block::memfd("rom", 65 * PAGE_SIZE).unwrap();
    rom.memory().as_volatile_slice().write_obj(1u8, 0).unwrap();
    let mut tx = hand.tracker.transaction();
    tx.add_block(&rom)
        .create(2, gpa(100), rom.extent(rom.info().all()))
        .split(1, 30, 3);
    tx.commit().unwrap();
    assert_eq!(faults.cut(), 1);
    assert_eq!(leased(&consumer), pages(&ram, [3]));
    // What was written before the block was plugged in is part of what it came with.
    hand.write(gpa(3), 1, 2);
    assert_eq!(hand.glean(&consumer), pages(&ram, [3]));
}
