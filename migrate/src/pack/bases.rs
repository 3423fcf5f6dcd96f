//! What deltas are made against: contents of hot pages, as they were sent last.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gleaner_bitmap::{BlockId, Extent, Layout};

use super::delta::{self, Page};

/// Pages that are kept: 64 MiB, whatever the number of connections.
const PAGES: usize = 16 << 10;
/// Parts with a lock each, and neighbours that are in the same one.
const SHARDS: usize = 16;
const NEIGHBOURS: u64 = 64;
/// Contents that were not sent for so many rounds make room.
const ROUNDS: u32 = 2;
/// Pages that are asked whether they make room for another one.
const ASKED: usize = 4;

/// Whether a job is known to be applied. Its connection says so when the Sync after it has been answered.
#[derive(Clone, Default)]
pub(crate) struct Applied(Arc<AtomicBool>);

impl Applied {
    pub(crate) fn set(&self) {
        self.0.store(true, Ordering::Release);
    }

    fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// The last contents sent of some pages, shared by all connections of a migration: a page is under way on one of them at
/// most.
///
/// Invariant: contents that are kept of a page are the last that were sent of it, byte by byte. So whoever sends a page
/// by another way than [`Bases::delta`] forgets it here. They serve as a base only once their job has been applied: then
/// the destination holds just them, because nothing else has been sent of the page since.
pub(crate) struct Bases {
    shards: Vec<Mutex<Shard>>,
    round: AtomicU32,
}

type Key = (BlockId, u64);

/// Invariant: `index` names the slots in use, and `free` all others.
#[derive(Default)]
struct Shard {
    index: BTreeMap<Key, usize>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// The slot that is asked next.
    hand: usize,
}

struct Slot {
    page: Key,
    content: Box<Page>,
    applied: Applied,
    /// When it was sent.
    round: u32,
}

impl Default for Bases {
    fn default() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            round: AtomicU32::new(0),
        }
    }
}

impl Bases {
    fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shard(&self, block: BlockId, neighbours: u64) -> MutexGuard<'_, Shard> {
        #[allow(clippy::cast_possible_truncation)] // less than SHARDS
        let number = (block.0.wrapping_add(neighbours) % SHARDS as u64) as usize;
        Self::lock(&self.shards[number])
    }

    /// A round begins.
    pub(crate) fn round(&self) {
        self.round.fetch_add(1, Ordering::Relaxed);
    }

    /// The contents `new` of a page are sent with a job, as what is appended to `out` if this returns true. They are kept,
    /// if there is room, whether or not.
    pub(crate) fn delta(
        &self,
        (block, page): Key,
        new: &Page,
        applied: &Applied,
        out: &mut Vec<u8>,
    ) -> bool {
        let round = self.round.load(Ordering::Relaxed);
        let mut shard = self.shard(block, page / NEIGHBOURS);
        let Some(slot) = shard.index.get(&(block, page)).copied() else {
            shard.keep((block, page), new, applied, round);
            return false;
        };
        let slot = &mut shard.slots[slot];
        let less = slot.applied.is_set() && delta::encode(&slot.content, new, out);
        *slot.content = *new;
        slot.applied = applied.clone();
        slot.round = round;
        less
    }

    /// Something else is sent of these pages.
    pub(crate) fn forget(&self, extent: Extent) {
        let (first, end) = (extent.range.first, extent.range.end());
        let neighbours = first / NEIGHBOURS..end.div_ceil(NEIGHBOURS);
        // Not further than once around.
        for neighbours in neighbours.take(SHARDS) {
            let mut shard = self.shard(extent.block, neighbours);
            shard.forget((extent.block, first), (extent.block, end));
        }
    }

    /// Blocks that are not in the layout are gone at the destination.
    pub(crate) fn adopt(&self, layout: &Layout) {
        for shard in &self.shards {
            let mut shard = Self::lock(shard);
            let mut blocks: Vec<BlockId> = shard.index.keys().map(|(block, _)| *block).collect();
            blocks.dedup();
            for block in blocks {
                if layout.block(block).is_none() {
                    shard.forget((block, 0), (block, u64::MAX));
                }
            }
        }
    }
}

impl Shard {
    const SLOTS: usize = PAGES / SHARDS;

    /// Keeps the contents of a page that it doesn't have, where there is room.
    fn keep(&mut self, page: Key, new: &Page, applied: &Applied, round: u32) {
        if let Some(number) = self.free.pop().or_else(|| self.make_room(round)) {
            let slot = &mut self.slots[number];
            self.index.insert(page, number);
            slot.page = page;
            *slot.content = *new;
            slot.applied = applied.clone();
            slot.round = round;
        } else if self.slots.len() < Self::SLOTS {
            self.index.insert(page, self.slots.len());
            self.slots.push(Slot {
                page,
                content: Box::new(*new),
                applied: applied.clone(),
                round,
            });
        }
    }

    /// A slot whose page was not sent of late, if all are in use: a guest that goes through more memory than fits finds
    /// some of it here each time, and not all of it gone just before it comes again.
    fn make_room(&mut self, round: u32) -> Option<usize> {
        if self.slots.len() < Self::SLOTS {
            return None;
        }
        (0..ASKED).find_map(|_| {
            self.hand = (self.hand + 1) % self.slots.len();
            let slot = &self.slots[self.hand];
            if round.saturating_sub(slot.round) <= ROUNDS {
                return None;
            }
            self.index.remove(&slot.page);
            Some(self.hand)
        })
    }

    fn forget(&mut self, first: Key, end: Key) {
        while let Some((page, slot)) = self.index.range(first..end).next() {
            let (page, slot) = (*page, *slot);
            self.index.remove(&page);
            self.free.push(slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gleaner_bitmap::{BlockInfo, Generation};

    const BLOCK: BlockId = BlockId(3);

    /// Whether a page is sent as a delta, with contents that differ from the last ones a little.
    fn sends(bases: &Bases, page: u64, byte: u8, applied: &Applied) -> bool {
        let mut content = [7; crate::memory::PAGE];
        content[9] = byte;
        bases.delta((BLOCK, page), &content, applied, &mut Vec::new())
    }

    fn done() -> Applied {
        let applied = Applied::default();
        applied.set();
        applied
    }

    #[test]
    fn contents_serve_once_their_job_is_applied_and_no_sooner() {
        let bases = Bases::default();
        let first = Applied::default();
        assert!(!sends(&bases, 1, 1, &first));
        // Not that a source would lease it again: it is not known to be there.
        let second = Applied::default();
        assert!(!sends(&bases, 1, 2, &second));
        first.set();
        assert!(!sends(&bases, 1, 3, &second));
        second.set();
        assert!(sends(&bases, 1, 4, &done()));
        assert!(sends(&bases, 1, 5, &done()));
    }

    #[test]
    fn what_is_forgotten_is_gone_and_its_neighbours_stay() {
        let bases = Bases::default();
        for pages in [1, 2, 70, 5000] {
            for page in 0..6000 {
                sends(&bases, page, 1, &done());
            }
            let gone = Extent::new(BLOCK, 100, pages);
            bases.forget(gone);
            bases.forget(Extent::new(BlockId(4), 0, 6000));
            for page in 0..6000 {
                let there = !gone
                    .range
                    .contains(&gleaner_bitmap::PageRange::new(page, 1));
                assert_eq!(sends(&bases, page, 2, &done()), there, "{page}");
            }
            bases.forget(Extent::new(BLOCK, 0, u64::MAX));
            assert!((0..6000).all(|page| !sends(&bases, page, 3, &done())));
        }
        let kept: usize = bases
            .shards
            .iter()
            .map(|s| Bases::lock(s).slots.len())
            .sum();
        assert_eq!(kept, 6000, "room is used again");
    }

    #[test]
    fn a_block_that_goes_takes_its_pages_along() {
        let bases = Bases::default();
        sends(&bases, 1, 1, &done());
        let layout = |id| {
            let info = BlockInfo::new(id, "b", 100 * 4096).unwrap();
            Layout::from_parts(Generation(1), vec![info], vec![]).unwrap()
        };
        bases.adopt(&layout(BLOCK));
        assert!(sends(&bases, 1, 2, &done()));
        bases.adopt(&layout(BlockId(4)));
        assert!(!sends(&bases, 1, 3, &done()));
    }

    #[test]
    fn memory_is_bounded_and_pages_sent_of_late_stay() {
        let bases = Bases::default();
        let many = 3 * PAGES as u64;
        let found = |first: u64, byte| {
            let pages = first..first + many;
            pages
                .filter(|page| sends(&bases, *page, byte, &done()))
                .count()
        };
        for byte in 0..4 {
            bases.round();
            // More than there is room for, again and again: some of it is found each time.
            let expected = if byte == 0 { 0 } else { PAGES };
            assert_eq!(found(0, byte), expected);
        }
        // The guest goes on to others, which take over.
        for byte in 0..u8::try_from(ROUNDS).unwrap() + 2 {
            bases.round();
            found(many, byte);
        }
        assert_eq!(found(many, 9), PAGES);
        let kept: usize = bases
            .shards
            .iter()
            .map(|s| Bases::lock(s).index.len())
            .sum();
        assert_eq!(kept, PAGES);
    }
}
