//! What is true of dirty pages, kept naively: what the store says is compared with it.

use std::collections::{BTreeMap, BTreeSet};

use gleaner::{BlockId, Extent};

/// A page of a block.
pub type Page = (BlockId, u64);

/// The pages of an extent.
pub fn pages_of(extent: &Extent) -> impl Iterator<Item = Page> + use<> {
    let block = extent.block;
    (extent.range.first..extent.range.end()).map(move |page| (block, page))
}

/// What one consumer is owed.
#[derive(Debug, Default)]
struct Debt {
    /// Pages that it may be given: a harvest has brought them, and it was not given them since.
    may: BTreeSet<Page>,
    /// Pages that it must be given: written since it was given them last.
    must: BTreeSet<Page>,
}

/// What the sources know, and what each consumer is owed, by the number the simulation gave it.
///
/// A page is reported once for each time that it became dirty: what is still in a source is reported even to somebody who was
/// given the page meanwhile, for an older reason.
#[derive(Debug, Default)]
pub struct Oracle {
    debts: BTreeMap<u64, Debt>,
    blocks: BTreeMap<BlockId, u64>,
    /// Pages that a source has reported, or will, since the last whole harvest began.
    fresh: BTreeSet<Page>,
    /// The same from before the harvest that is under way.
    old: BTreeSet<Page>,
    /// Pages given to somebody who was not owed them.
    pub needless: u64,
    /// Something happened after which more than was written may be reported (a log that could not be healed).
    pub excused: bool,
}

impl Oracle {
    /// Somebody wrote a page. `noticed`: some log has an entry of its own for it.
    pub fn wrote(&mut self, page: Page, noticed: bool) {
        for debt in self.debts.values_mut() {
            debt.must.insert(page);
        }
        if noticed {
            self.noticed(page);
        }
    }

    /// A log has the page, whether it comes to be written or not.
    pub fn noticed(&mut self, page: Page) {
        self.fresh.insert(page);
    }

    /// A harvest of everything begins.
    pub fn harvest_begins(&mut self) {
        self.old = std::mem::take(&mut self.fresh);
    }

    /// It has ended. `pending`: pages that no log has yet, but a vCPU's buffer.
    pub fn harvest_ends(&mut self, complete: bool, pending: impl IntoIterator<Item = Page>) {
        let old = std::mem::take(&mut self.old);
        if complete {
            for page in pending.into_iter().filter(|page| old.contains(page)) {
                self.fresh.insert(page);
            }
            for debt in self.debts.values_mut() {
                debt.may.extend(&old);
            }
        } else {
            self.fresh.extend(old);
        }
    }

    /// A block was added: it is born dirty for who starts all-dirty.
    pub fn add_block(&mut self, block: BlockId, pages: u64, all_dirty: impl Fn(u64) -> bool) {
        self.blocks.insert(block, pages);
        for (consumer, debt) in &mut self.debts {
            if all_dirty(*consumer) {
                let all = (0..pages).map(|page| (block, page));
                debt.may.extend(all.clone());
                debt.must.extend(all);
            }
        }
    }

    /// A block was removed; nobody is owed its pages.
    pub fn remove_block(&mut self, block: BlockId) {
        self.blocks.remove(&block);
        self.fresh.retain(|(b, _)| *b != block);
        for debt in self.debts.values_mut() {
            debt.may.retain(|(b, _)| *b != block);
            debt.must.retain(|(b, _)| *b != block);
        }
    }

    /// A consumer comes.
    pub fn join(&mut self, consumer: u64, all_dirty: bool) {
        let mut debt = Debt::default();
        if all_dirty {
            for (block, pages) in &self.blocks {
                debt.must.extend((0..*pages).map(|page| (*block, page)));
            }
            debt.may.clone_from(&debt.must);
        }
        self.debts.insert(consumer, debt);
    }

    /// What was written until now a consumer need not be given.
    pub fn forgive(&mut self, consumer: u64) {
        if let Some(debt) = self.debts.get_mut(&consumer) {
            debt.must.clear();
        }
    }

    /// A consumer goes.
    pub fn part(&mut self, consumer: u64) {
        self.debts.remove(&consumer);
    }

    /// A consumer takes pages on lease.
    pub fn took(&mut self, consumer: u64, extents: impl IntoIterator<Item = Extent>) {
        let Some(debt) = self.debts.get_mut(&consumer) else {
            return;
        };
        for page in extents.into_iter().flat_map(|e| pages_of(&e)) {
            // A block that went while its pages were on lease is nobody's business. A harvest of some slots alone brings what is
            // fresh, too.
            let owed = debt.may.remove(&page) || self.fresh.contains(&page);
            if self.blocks.contains_key(&page.0) && !owed && !self.excused {
                self.needless += 1;
            }
            debt.must.remove(&page);
        }
    }

    /// A lease fell back.
    pub fn dropped(&mut self, consumer: u64, extents: impl IntoIterator<Item = Extent>) {
        let blocks = &self.blocks;
        if let Some(debt) = self.debts.get_mut(&consumer) {
            let pages = extents.into_iter().flat_map(|e| pages_of(&e));
            for page in pages.filter(|(block, _)| blocks.contains_key(block)) {
                debt.may.insert(page);
                debt.must.insert(page);
            }
        }
    }

    /// Pages that a consumer is still owed.
    #[must_use]
    pub fn owed(&self, consumer: u64) -> Vec<Page> {
        let debt = self.debts.get(&consumer);
        debt.map_or(Vec::new(), |d| d.must.iter().copied().collect())
    }
}
