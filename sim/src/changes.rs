//! Slot transactions of every kind, and calls of theirs that fail.

use gleaner::model::{Call, Cut, Failure};
use gleaner::{Block, Error, Layout, PAGE_SIZE, PageRange, Result, Slot, SlotKey, Transaction};
use vm_memory::GuestAddress;

use crate::random::Random;
use crate::world::{World, block};

/// Slot ids that are used: few, so that they are used again at once.
const IDS: u64 = 6;
/// Guest-physical pages that slots may be at.
const ROOM: u64 = 600;
/// Blocks at most.
const BLOCKS: usize = 4;

/// Errors that a kernel may give at any time.
const ERRNOS: [i32; 3] = [libc::ENOMEM, libc::EINTR, libc::EIO];

const CHANGES: &[Call] = &[Call::Set, Call::Delete];
const HARVEST: &[Call] = &[Call::Get, Call::Clear, Call::Reset];

/// What a transaction does to blocks.
#[derive(Default)]
struct Blocks {
    added: Option<Block>,
    removed: Option<Block>,
}

impl World {
    /// Lets something go wrong in the next calls, maybe.
    pub(crate) fn trouble(&mut self) {
        if self.quiet || !self.random.one_in(6) {
            return;
        }
        let calls = if self.random.one_in(2) {
            CHANGES
        } else {
            HARVEST
        };
        let failure = Failure {
            calls,
            after: u32::try_from(self.random.below(5)).unwrap_or(0),
            times: 1,
            errno: *self.random.pick(&ERRNOS).unwrap_or(&libc::EIO),
        };
        let cut = self.random.one_in(2).then(|| Cut {
            after: self.random.below(80),
            noticed: true,
        });
        let mut state = self.kvm.state();
        state.orders.failure = Some(failure);
        state.orders.cut = cut;
    }

    /// One transaction. It may be refused: then everything is as it was.
    ///
    /// # Errors
    /// What no order explains.
    pub fn transact(&mut self) -> Result<()> {
        let layout = self.tracker.layout();
        let mut blocks = Blocks::default();
        if self.blocks.is_empty() || (self.blocks.len() < BLOCKS && self.random.one_in(5)) {
            self.named += 1;
            let pages = 1 + self.random.below(self.shape.pages);
            blocks.added = Some(block(&format!("b{}", self.named), pages)?);
        } else if self.blocks.len() > 1 && self.random.one_in(8) {
            blocks.removed = self.random.pick(&self.blocks).cloned();
        }
        self.trouble();
        let tracker = self.tracker.clone();
        let mut tx = tracker.transaction();
        if let Some(added) = &blocks.added {
            tx.add_block(added);
        }
        if let Some(removed) = &blocks.removed {
            for slot in layout.slots().filter(|s| s.block == removed.id()) {
                tx.delete(slot.key);
            }
            tx.remove_block(removed.id());
        } else {
            let all: Vec<&Block> = self.blocks.iter().chain(&blocks.added).collect();
            change(&mut self.random, &layout, &all, &mut tx);
        }
        let outcome = tx.commit();
        self.committed(outcome.map(|_| ()), blocks)
    }

    fn committed(&mut self, outcome: Result<()>, blocks: Blocks) -> Result<()> {
        match outcome {
            Ok(()) => {
                self.transactions += 1;
                if let Some(added) = blocks.added {
                    let mut stage = self.actors.stage();
                    stage
                        .oracle
                        .add_block(added.id(), added.info().pages, |c| self.starts_dirty(c));
                    drop(stage);
                    self.blocks.push(added);
                }
                if let Some(removed) = blocks.removed {
                    self.blocks.retain(|b| b.id() != removed.id());
                    self.actors.stage().oracle.remove_block(removed.id());
                }
            }
            // Steps that lead nowhere, and the stopped guest's layout, which stays.
            Err(Error::Stopped) => {}
            Err(Error::Bitmap(error)) if is_refusal(&error) => {}
            Err(error) => self.explain(error)?,
        }
        self.calm();
        let layout = self.tracker.layout();
        let mut stage = self.actors.stage();
        stage.look(&layout, &self.blocks);
        Ok(())
    }
}

/// Whether a transaction was refused for what it asked for.
fn is_refusal(error: &gleaner::BitmapError) -> bool {
    use gleaner::BitmapError as E;
    matches!(
        error,
        E::SlotExists { .. }
            | E::UnknownSlot { .. }
            | E::OutsideBlock { .. }
            | E::Overlap { .. }
            | E::BadCut { .. }
            | E::NotAdjacent { .. }
    )
}

fn id(random: &mut Random) -> SlotKey {
    SlotKey::new(u16::try_from(random.below(IDS)).unwrap_or(0))
}

/// Some pages of a block.
fn part(random: &mut Random, block: &Block) -> PageRange {
    let pages = block.info().pages;
    let first = random.below(pages);
    PageRange::new(first, 1 + random.below(pages - first))
}

/// A change of slots of any kind, by what the layout has.
fn change(random: &mut Random, layout: &Layout, blocks: &[&Block], tx: &mut Transaction<'_>) {
    let slots: Vec<Slot> = layout.slots().copied().collect();
    let (Some(slot), Some(block)) = (random.pick(&slots).copied(), random.pick(blocks)) else {
        if let Some(block) = random.pick(blocks) {
            tx.create(0, GuestAddress(0), block.extent(block.info().all()));
        }
        return;
    };
    let gpa = GuestAddress(random.below(ROOM) * PAGE_SIZE);
    match random.below(10) {
        0 => {
            tx.create(id(random), gpa, block.extent(part(random, block)));
        }
        1 => {
            tx.delete(slot.key);
        }
        2 => {
            tx.move_to(slot.key, gpa);
        }
        3 => {
            tx.set_readonly(slot.key, !slot.readonly);
        }
        4 => {
            tx.resize(slot.key, 1 + random.below(slot.range.pages + 8));
        }
        5 => {
            tx.split(slot.key, random.below(slot.range.pages), id(random));
        }
        6 => {
            let first = random.below(slot.range.pages);
            let hole = PageRange::new(first, random.below(slot.range.pages - first));
            tx.punch(slot.key, hole, id(random));
        }
        7 => {
            let follows = |s: &&Slot| s.gpa == slot.gpa_end();
            let next = slots.iter().find(follows).map_or(slot.key, |s| s.key);
            tx.merge(slot.key, next);
        }
        8 => exchange(random, &slots, tx),
        _ => scatter(random, blocks, tx),
    }
}

/// Two slots exchange their ids: what is read by the wrong layout names a page that exists, and is the wrong one.
fn exchange(random: &mut Random, slots: &[Slot], tx: &mut Transaction<'_>) {
    let mut slots = slots.to_vec();
    let count = slots.len() as u64;
    let a = usize::try_from(random.below(count)).unwrap_or(0);
    let b = usize::try_from(random.below(count)).unwrap_or(0);
    let keys = (slots[a].key, slots[b].key);
    (slots[b].key, slots[a].key) = keys;
    tx.transact_to(slots);
}

/// Another layout altogether.
fn scatter(random: &mut Random, blocks: &[&Block], tx: &mut Transaction<'_>) {
    let mut chosen: Vec<Slot> = Vec::new();
    for n in 0..=random.below(IDS) {
        let Some(block) = random.pick(blocks) else {
            break;
        };
        let slot = Slot {
            key: SlotKey::new(u16::try_from(n).unwrap_or(0)),
            gpa: random.below(ROOM) * PAGE_SIZE,
            block: block.id(),
            range: part(random, block),
            readonly: random.one_in(10),
        };
        if !chosen.iter().any(|s| s.overlaps(&slot)) {
            chosen.push(slot);
        }
    }
    tx.transact_to(chosen);
}
