//! The dirty store: who still owes which page to whom.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::page_set::PageSet;
use crate::{BlockId, Consumer, Extent, PageBitmap, PageRange};

/// Names a consumer of the store.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ConsumerId(u64);

/// What a consumer starts from, with each block it meets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Start {
    /// All pages are dirty: a sender, whose destination has nothing yet.
    AllDirty,
    /// No page is: a rate meter.
    Empty,
}

/// The dirty pages by (block, page), one set for each consumer. A slot may come and go; the bit stays.
///
/// Invariants, for each consumer and page: a page in `leased` is in exactly one unfinished [`Lease`](crate::Lease); a
/// lease is taken only from pages that are dirty and not leased; an acknowledgement clears `leased` and never `dirty`.
/// So each dirtying is dirty, or leased, or acknowledged.
///
/// For each consumer a page takes a bit (and a thirtieth of one) where some pages of its 16 MiB are dirty and some are not,
/// and a fiftieth elsewhere; the same again where some are on lease.
#[derive(Debug, Default)]
pub struct DirtyStore {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next_consumer: u64,
    blocks: BTreeMap<BlockId, u64>,
    consumers: BTreeMap<ConsumerId, State>,
}

#[derive(Debug)]
struct State {
    start: Start,
    sets: BTreeMap<BlockId, Sets>,
    /// Where the next lease begins to look, so that a page that is dirtied all the time can't starve those behind it.
    cursor: (BlockId, u64),
}

#[derive(Debug)]
struct Sets {
    dirty: PageSet,
    leased: PageSet,
}

impl Sets {
    fn new(start: Start, pages: u64) -> Self {
        Self {
            dirty: match start {
                Start::AllDirty => PageSet::all(pages),
                Start::Empty => PageSet::new(pages),
            },
            leased: PageSet::new(pages),
        }
    }
}

impl DirtyStore {
    /// A panic elsewhere can't leave a set half changed in a way that loses a bit, so a poisoned lock is usable.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a block, in each consumer's start state.
    pub fn add_block(&self, block: BlockId, pages: u64) {
        let mut inner = self.lock();
        inner.blocks.insert(block, pages);
        for state in inner.consumers.values_mut() {
            state.sets.insert(block, Sets::new(state.start, pages));
        }
    }

    /// Removes a block; its dirty pages are retired. Unfinished leases of it end without effect.
    pub fn remove_block(&self, block: BlockId) {
        let mut inner = self.lock();
        inner.blocks.remove(&block);
        for state in inner.consumers.values_mut() {
            state.sets.remove(&block);
        }
    }

    /// Adds a consumer. Logging must be on before, or its start state would miss what comes next; the tracker sees to it.
    pub fn consumer(self: &Arc<Self>, start: Start) -> Consumer {
        let mut inner = self.lock();
        let id = ConsumerId(inner.next_consumer);
        inner.next_consumer += 1;
        let sets = inner
            .blocks
            .iter()
            .map(|(&block, &pages)| (block, Sets::new(start, pages)))
            .collect();
        inner.consumers.insert(
            id,
            State {
                start,
                sets,
                cursor: (BlockId(0), 0),
            },
        );
        drop(inner);
        Consumer::new(Arc::clone(self), id)
    }

    /// Number of consumers.
    #[must_use]
    pub fn consumers(&self) -> usize {
        self.lock().consumers.len()
    }

    /// All pages that any consumer has dirty or on lease, for the given blocks.
    #[must_use]
    pub fn snapshot(&self, blocks: &[BlockId]) -> BTreeMap<BlockId, PageBitmap> {
        let inner = self.lock();
        blocks
            .iter()
            .filter_map(|&block| {
                let mut all = PageBitmap::new(*inner.blocks.get(&block)?);
                for state in inner.consumers.values() {
                    let sets = &state.sets[&block];
                    sets.dirty.or_into(&mut all);
                    sets.leased.or_into(&mut all);
                }
                Some((block, all))
            })
            .collect()
    }

    /// Hands the dirty sets of a block, one for each consumer, to who puts something into them.
    pub(crate) fn publish(&self, block: BlockId, put: impl FnOnce(&mut [&mut PageSet])) {
        let mut inner = self.lock();
        let states = inner.consumers.values_mut();
        let mut sets: Vec<&mut PageSet> = states
            .filter_map(|state| Some(&mut state.sets.get_mut(&block)?.dirty))
            .collect();
        put(&mut sets);
    }

    pub(crate) fn remove_consumer(&self, id: ConsumerId) {
        self.lock().consumers.remove(&id);
    }

    pub(crate) fn dirty_pages(&self, id: ConsumerId) -> u64 {
        let inner = self.lock();
        inner
            .consumers
            .get(&id)
            .map_or(0, |s| s.sets.values().map(|s| s.dirty.count()).sum())
    }

    /// Moves up to `max` dirty, unleased pages to a lease. Empty when there are none.
    pub(crate) fn take(&self, id: ConsumerId, max: u64) -> Vec<Extent> {
        let mut inner = self.lock();
        let Some(state) = inner.consumers.get_mut(&id) else {
            return Vec::new();
        };
        let (block, page) = state.cursor;
        let mut left = max;
        let mut taken: Vec<Extent> = Vec::new();
        let mut take = |block: BlockId, sets: &mut Sets, first: u64, end: u64| {
            // Not what is on lease: an old copy could land after a newer one.
            let span = PageRange::new(first, end - first);
            left -=
                sets.dirty
                    .move_to(&mut sets.leased, span, left, |run| match taken.last_mut() {
                        Some(last) if last.block == block && last.range.end() == run.first => {
                            last.range.pages += run.pages;
                        }
                        _ => taken.push(Extent { block, range: run }),
                    });
            left == 0
        };
        // One turn around all blocks: from the cursor to the end, then from the start to the cursor.
        let cut = |at: BlockId, sets: &Sets| {
            let pages = sets.dirty.pages();
            (pages, if at == block { page.min(pages) } else { 0 })
        };
        let full = state.sets.range_mut(block..).any(|(&at, sets)| {
            let (end, cut) = cut(at, sets);
            take(at, sets, cut, end)
        });
        if !full {
            state.sets.range_mut(..=block).any(|(&at, sets)| {
                let (end, cut) = cut(at, sets);
                take(at, sets, 0, if at == block { cut } else { end })
            });
        }
        if let Some(last) = taken.last() {
            state.cursor = (last.block, last.range.end());
        }
        taken
    }

    /// Ends a lease: `dirty` says whether its pages fall back into the dirty set.
    pub(crate) fn finish(&self, id: ConsumerId, extents: &[Extent], dirty: bool) {
        let mut inner = self.lock();
        let Some(state) = inner.consumers.get_mut(&id) else {
            return;
        };
        for extent in extents {
            if let Some(sets) = state.sets.get_mut(&extent.block) {
                sets.leased.remove(extent.range);
                if dirty {
                    sets.dirty.insert(extent.range);
                }
            }
        }
    }
}
