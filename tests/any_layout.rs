//! Layouts at random, one after the other, against a plain set of pages: after any change each slot has exactly the pages
//! dirty that were written, through whatever slot that was.

#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::hand::{Hand, after, dirty, gpa, leased};
use common::{MODES, Random, kvm};
use gleaner::{Block, BlockId, PAGE_SIZE, PageRange, Slot, SlotKey, Start, Tracking};
use std::collections::BTreeSet;

/// Slots at random: any block, any part of it, aliases welcome, addresses apart.
fn scatter(random: &mut Random, blocks: &[Block], low: Slot) -> Vec<Slot> {
    let mut slots = vec![low];
    let mut at = 0;
    for id in 1..=1 + random.below(8) {
        let block = &blocks[usize::try_from(random.below(blocks.len() as u64)).unwrap()];
        let first = random.below(block.info().pages);
        let length = 1 + random.below(block.info().pages - first);
        at += random.below(3) * random.below(70);
        slots.push(Slot {
            key: SlotKey::new(u16::try_from(id).unwrap()),
            gpa: gpa(at).0,
            block: block.id(),
            range: PageRange::new(first, length),
            readonly: random.below(8) == 0,
        });
        at += length;
    }
    slots
}

/// Random layouts against a set of pages: no page more, no page less, in every slot.
fn any_layout_follows_any_other(tracking: Tracking, seed: u64, steps: u64) {
    let mut hand = Hand::new(tracking);
    let consumer = hand.tracker.consumer(Start::Empty).unwrap();
    let low = *hand.tracker.layout().slot(0.into()).unwrap();
    let blocks: Vec<Block> = [61, 64, 130, 333]
        .map(|n| Block::memfd(&format!("b{n}"), n * PAGE_SIZE).unwrap())
        .into();
    let mut tx = hand.tracker.transaction();
    blocks.iter().for_each(|b| {
        tx.add_block(b);
    });
    tx.commit().unwrap();
    let mut random = Random(seed);
    let mut known: BTreeSet<(BlockId, u64)> = BTreeSet::new();
    for step in 0..steps {
        let mut tx = hand.tracker.transaction();
        tx.transact_to(scatter(&mut random, &blocks, low));
        tx.commit().unwrap();
        let layout = hand.tracker.layout();
        let slots: Vec<Slot> = layout.slots().skip(1).copied().collect();
        for slot in &slots {
            let first = random.below(slot.range.pages);
            let length = 1 + random.below((slot.range.pages - first).min(20));
            hand.write(after(slot.address(), first), length, step);
            if slot.readonly {
                assert_eq!(hand.missed.len() as u64, length);
                hand.missed.clear();
            } else {
                let first = slot.range.first + first;
                known.extend((first..first + length).map(|p| (slot.block, p)));
            }
            if random.below(4) == 0 {
                hand.tracker.harvest().unwrap();
            }
        }
        if random.below(3) == 0 {
            hand.tracker.harvest().unwrap();
            for slot in &slots {
                let expected: Vec<u64> = (0..slot.range.pages)
                    .filter(|p| known.contains(&(slot.block, slot.range.first + p)))
                    .collect();
                assert_eq!(
                    dirty(&hand.tracker, slot.key.id),
                    expected,
                    "{tracking:?}, seed {seed}, step {step}"
                );
            }
            assert_eq!(
                leased(&consumer),
                known,
                "{tracking:?}, seed {seed}, step {step}"
            );
            known.clear();
        }
    }
    assert_eq!(hand.glean(&consumer), known);
}

#[test]
fn any_layout_may_follow_any_other() {
    if !kvm() {
        return;
    }
    for (_, tracking) in MODES {
        for seed in [1, 2, 3] {
            any_layout_follows_any_other(tracking, seed, 100);
        }
    }
}
