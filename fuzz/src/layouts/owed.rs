//! What one consumer is owed: sets of pages.

use std::collections::BTreeSet;

use gleaner_bitmap::{BlockId, Extent, Start};

use super::Page;

/// The naive copy of a consumer's share of the store.
pub struct Owed {
    start: Start,
    /// Dirty pages; those on lease that were written again too.
    pub dirty: BTreeSet<Page>,
    leased: BTreeSet<Page>,
    /// Where the next lease begins to look.
    next: Page,
}

/// The pages of extents, in their order.
pub fn pages(extents: &[Extent]) -> impl Iterator<Item = Page> {
    extents.iter().flat_map(|extent| {
        (extent.range.first..extent.range.end()).map(|page| (extent.block, page))
    })
}

impl Owed {
    pub fn new(start: Start) -> Self {
        Self {
            start,
            dirty: BTreeSet::new(),
            leased: BTreeSet::new(),
            next: (BlockId(0), 0),
        }
    }

    pub fn add_block(&mut self, block: BlockId, pages: u64) {
        if self.start == Start::AllDirty {
            self.dirty.extend((0..pages).map(|page| (block, page)));
        }
    }

    pub fn remove_block(&mut self, gone: BlockId) {
        self.dirty.retain(|(block, _)| *block != gone);
        self.leased.retain(|(block, _)| *block != gone);
    }

    /// Dirty or on lease.
    pub fn all(&self) -> impl Iterator<Item = Page> {
        self.dirty.union(&self.leased).copied()
    }

    /// The pages of a lease of up to `max`, in their order: those that are free, from where the last lease ended, around.
    pub fn lease(&mut self, max: u64) -> Vec<Page> {
        let free: BTreeSet<Page> = self.dirty.difference(&self.leased).copied().collect();
        let around = free.range(self.next..).chain(free.range(..self.next));
        let most = usize::try_from(max).unwrap_or(usize::MAX);
        let taken: Vec<Page> = around.take(most).copied().collect();
        if let Some((block, page)) = taken.last() {
            self.next = (*block, page + 1);
        }
        for page in &taken {
            self.dirty.remove(page);
            self.leased.insert(*page);
        }
        taken
    }

    pub fn ack(&mut self, extents: &[Extent]) {
        for page in pages(extents) {
            self.leased.remove(&page);
        }
    }

    pub fn fall_back(&mut self, extents: &[Extent]) {
        for page in pages(extents) {
            // A page of a block that is gone is owed no more.
            if self.leased.remove(&page) {
                self.dirty.insert(page);
            }
        }
    }
}
