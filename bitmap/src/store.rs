//! The dirty store: who still owes which page to whom.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::bits::next_set;
use crate::mutant::{self, Mutant};
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
    dirty: PageBitmap,
    leased: PageBitmap,
}

impl Sets {
    fn new(start: Start, pages: u64) -> Self {
        Self {
            dirty: match start {
                Start::AllDirty => PageBitmap::all_set(pages),
                Start::Empty => PageBitmap::new(pages),
            },
            leased: PageBitmap::new(pages),
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
                let whole = PageRange::new(0, all.pages());
                for state in inner.consumers.values() {
                    let sets = &state.sets[&block];
                    for map in [&sets.dirty, &sets.leased] {
                        all.or_words_at(whole, map.words(), 0).ok()?;
                    }
                }
                Some((block, all))
            })
            .collect()
    }

    /// ORs the bits of `ranges` into each consumer's dirty set.
    pub(crate) fn publish(&self, block: BlockId, bits: &PageBitmap, ranges: &[PageRange]) {
        let mut inner = self.lock();
        for state in inner.consumers.values_mut() {
            let Some(sets) = state.sets.get_mut(&block) else {
                continue;
            };
            for &range in ranges {
                let done = sets.dirty.or_words_at(range, bits.words(), range.first);
                debug_assert!(done.is_ok(), "harvester and store disagree on a length");
            }
        }
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
        let (cursor_block, cursor_page) = state.cursor;
        // One turn around all blocks: from the cursor to the end, then from the start to the cursor.
        let mut spans: Vec<(BlockId, PageRange)> = Vec::new();
        for (&block, sets) in &state.sets {
            let from = if block == cursor_block {
                cursor_page.min(sets.dirty.pages())
            } else {
                0
            };
            if block >= cursor_block {
                spans.push((block, PageRange::new(from, sets.dirty.pages() - from)));
            }
        }
        for (&block, sets) in &state.sets {
            if block < cursor_block {
                spans.push((block, PageRange::new(0, sets.dirty.pages())));
            } else if block == cursor_block {
                spans.push((
                    block,
                    PageRange::new(0, cursor_page.min(sets.dirty.pages())),
                ));
            }
        }
        let mut left = max;
        let mut taken = Vec::new();
        for (block, span) in spans {
            let Some(sets) = state.sets.get_mut(&block) else {
                continue;
            };
            take_span(block, sets, span, &mut left, &mut taken);
            if left == 0 {
                break;
            }
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
                sets.leased.clear_range(extent.range);
                if dirty {
                    sets.dirty.set_range(extent.range);
                }
            }
        }
    }
}

/// Pages that are searched together at least: 16 MiB of guest memory.
const STEP: u64 = 4096;

/// Moves dirty, unleased pages of one span to `taken`.
fn take_span(
    block: BlockId,
    sets: &mut Sets,
    span: PageRange,
    left: &mut u64,
    taken: &mut Vec<Extent>,
) {
    let mut at = span.first;
    while *left > 0 {
        let Some(first) = next_set(sets.dirty.words(), at, span.end()) else {
            break;
        };
        // No further than needed: what is dirty may reach to the end of the block, and the next lease looks again.
        at = first.saturating_add(STEP.max(*left)).min(span.end());
        for range in free(sets, PageRange::new(first, at - first), left) {
            sets.dirty.clear_range(range);
            sets.leased.set_range(range);
            match taken.last_mut() {
                Some(last) if last.block == block && last.range.end() == range.first => {
                    last.range.pages += range.pages;
                }
                _ => taken.push(Extent { block, range }),
            }
        }
    }
}

/// The first `left` pages of `part` that are dirty and not on lease, and counts them off.
fn free(sets: &Sets, part: PageRange, left: &mut u64) -> Vec<PageRange> {
    let mut found = Vec::new();
    let mut take = |first: u64, end: u64| {
        let pages = (end - first).min(*left);
        if pages > 0 {
            found.push(PageRange::new(first, pages));
            *left -= pages;
        }
        *left == 0
    };
    for run in sets.dirty.runs_in(part) {
        let mut at = run.first;
        // Leave out what is on lease: an old copy could land after a newer one.
        let some = next_set(sets.leased.words(), at, run.end()).is_some();
        if some && !mutant::is_planted(Mutant::LeasedTwice) {
            for leased in sets.leased.runs_in(run) {
                if take(at, leased.first) {
                    return found;
                }
                at = leased.end();
            }
        }
        if take(at, run.end()) {
            break;
        }
    }
    found
}
