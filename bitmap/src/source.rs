//! Dirty sources, and the order in which they may be used: collect, re-arm, publish.
//!
//! A page's contents may be read only after its source will report the next write to it. Read earlier, a write
//! between the read and the re-arming is in neither the copy nor the log. So what a source collects goes into a
//! [`Collected`], which gives no page number to anybody; only a [`Harvester`] turns it into bits of the store, and
//! only after [`DirtySource::rearm`] said that all of it is re-armed. Page numbers come out of the store alone, as a
//! [`Lease`](crate::Lease).

use std::collections::BTreeMap;

use crate::bits::{masked_words, next_set};
use crate::mutant::{self, Mutant};
use crate::page_set::{CHUNK, PageSet, WORDS, ones_of};
use crate::{BlockId, DirtyStore, Error, Layout, PageBitmap, PageRange, Result, Slot, SlotKey};

/// What a harvest has to cover.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope<'a> {
    /// Everything the source knows.
    All,
    /// At least these slots (sorted): they are about to go. A source that can't tell slots apart collects everything.
    Slots(&'a [SlotKey]),
}

impl Scope<'_> {
    /// Whether `key` has to be covered.
    #[must_use]
    pub fn covers(&self, key: SlotKey) -> bool {
        match self {
            Self::All => true,
            Self::Slots(keys) => keys.binary_search(&key).is_ok(),
        }
    }

    /// The slots of a layout that have to be covered. Of a few slots the cost follows those.
    pub fn slots<'a>(self, layout: &'a Layout) -> Box<dyn Iterator<Item = &'a Slot> + 'a>
    where
        Self: 'a,
    {
        match self {
            Self::All => Box::new(layout.slots()),
            Self::Slots(keys) => Box::new(keys.iter().filter_map(|key| layout.slot(*key))),
        }
    }
}

/// How re-arming went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rearm {
    /// The next write to any collected page will be reported.
    Complete,
    /// It may not be. The pages are held back.
    Short {
        /// Pages collected and awaiting re-arming.
        collected: u64,
        /// Pages the kernel says it re-armed.
        rearmed: u64,
    },
}

/// Something that knows of dirtied pages: KVM's bitmap or rings, the VMM's own write logs, a device's log.
pub trait DirtySource {
    /// Its name, for messages.
    fn name(&self) -> String;

    /// Moves what it knows into `into`, interpreted by `layout`, which is the one it was recorded under.
    ///
    /// # Errors
    /// Why it could not. What went into `into` before stays there; what did not must still be in the source.
    fn collect(&mut self, layout: &Layout, scope: Scope<'_>, into: &mut Collected) -> Result<()>;

    /// Arms the source again for everything collected since the last complete re-arming.
    ///
    /// # Errors
    /// Why it could not; the same as [`Rearm::Short`] with nothing re-armed.
    fn rearm(&mut self) -> Result<Rearm>;
}

/// Bits on their way from a source to the store. Write-only to everybody but the [`Harvester`], so nobody can read a page
/// before it is re-armed:
///
/// ```compile_fail,E0616
/// # use gleaner_bitmap::{BlockId, Collected};
/// fn peek(collected: &Collected) -> Vec<BlockId> {
///     collected.blocks.keys().copied().collect()
/// }
/// ```
///
/// Page numbers come out of the store, as a lease:
///
/// ```
/// # use gleaner_bitmap::{BlockId, Consumer};
/// fn lease(consumer: &Consumer) -> Option<Vec<BlockId>> {
///     Some(consumer.lease(1)?.extents().iter().map(|e| e.block).collect())
/// }
/// ```
#[derive(Debug, Default)]
pub struct Collected {
    blocks: BTreeMap<BlockId, Staging>,
}

/// Bits of one block, and which of its words may have some: a harvest's cost follows those, not the block's size.
///
/// Invariant: a word with a bit has its own bit in the mask of its chunk, and a chunk whose mask is not 0 is in `touched`,
/// once.
#[derive(Debug)]
struct Staging {
    bits: PageBitmap,
    /// For each chunk, a bit for each of its words.
    masks: Vec<u64>,
    /// Chunks, in the order in which they were touched first.
    touched: Vec<usize>,
}

impl Staging {
    #[allow(clippy::cast_possible_truncation)] // chunks of a bitmap in memory
    fn new(pages: u64) -> Self {
        Self {
            bits: PageBitmap::new(pages),
            masks: vec![0; pages.div_ceil(CHUNK) as usize],
            touched: Vec::new(),
        }
    }

    fn touch_words(&mut self, chunk: usize, which: u64) {
        let mask = &mut self.masks[chunk];
        if *mask == 0 {
            self.touched.push(chunk);
        }
        *mask |= which;
    }

    fn touch(&mut self, range: PageRange) {
        // The masks of all chunks are a bitmap of words.
        let first = range.first / 64;
        let words = range.end().div_ceil(64) - first;
        masked_words(first, words, |chunk, which| self.touch_words(chunk, which));
    }

    #[allow(clippy::cast_possible_truncation)] // chunks of a bitmap in memory
    fn mark(&mut self, page: u64) {
        self.bits.set(page);
        self.touch_words((page / CHUNK) as usize, 1 << (page / 64 % WORDS as u64));
    }

    /// Marks single pages. Those of a word that come one after the other are marked at once.
    fn mark_all(&mut self, pages: &[u64]) {
        for pages in pages.chunk_by(|a, b| a / 64 == b / 64) {
            match pages {
                [page] => self.mark(*page),
                [first, ..] => {
                    let bits = pages.iter().fold(0, |bits, page| bits | 1 << (page % 64));
                    let first = first / 64 * 64;
                    let whole = PageRange::new(first, 64.min(self.bits.pages() - first));
                    let fits = self.bits.or_words_at(whole, &[bits], 0);
                    debug_assert!(fits.is_ok(), "a word of the block");
                    self.touch(whole);
                }
                [] => {}
            }
        }
    }

    /// ORs `words` into `range`, chunks without a bit left out.
    fn or(&mut self, mut range: PageRange, words: &[u64]) -> Result<()> {
        let room = words.len() as u64 * 64;
        if mutant::is_planted(Mutant::TailDropped) {
            range.pages = range.pages.min(room);
        }
        if range.pages > room {
            return Err(Error::LengthMismatch {
                left: range.pages,
                right: room,
            });
        }
        let mut done = 0;
        while let Some(bit) = next_set(words, done, range.pages) {
            let first = range.first + bit;
            let end = (first + 1).next_multiple_of(CHUNK);
            let part = PageRange::new(first, end.min(range.end()) - first);
            self.touch(part);
            self.bits.or_words_at(part, words, bit)?;
            done = bit + part.pages;
        }
        Ok(())
    }

    /// Puts all marked pages into sets, and has none afterwards. Returns how many there were. A chunk at a time, so that its
    /// words come into the cache once.
    fn publish(&mut self, sets: &mut [&mut PageSet]) -> u64 {
        let mut published = 0;
        for &chunk in &self.touched {
            let which = self.masks[chunk];
            for set in &mut *sets {
                set.insert_words(chunk, which, self.bits.words());
            }
            for word in words_of(chunk, which) {
                published += u64::from(self.bits.words()[word].count_ones());
                let first = word as u64 * 64;
                let pages = 64.min(self.bits.pages() - first);
                self.bits.clear_range(PageRange::new(first, pages));
            }
            self.masks[chunk] = 0;
        }
        self.touched.clear();
        published
    }
}

/// The words of a chunk that are in its mask, by their index.
fn words_of(chunk: usize, which: u64) -> impl Iterator<Item = usize> {
    ones_of(which).map(move |i| chunk * WORDS + i)
}

impl Collected {
    fn staging(&mut self, block: BlockId, range: PageRange) -> Result<&mut Staging> {
        let staging = self
            .blocks
            .get_mut(&block)
            .ok_or(Error::UnknownBlock { block })?;
        let pages = staging.bits.pages();
        if range.end() > pages {
            return Err(Error::OutsideBlock {
                block,
                pages,
                range,
            });
        }
        Ok(staging)
    }

    /// Takes a slot's bitmap as KVM filled it: bit `n` is page `n` of the slot. Where that is in the block, the slot itself
    /// says:
    ///
    /// ```
    /// # use gleaner_bitmap::{Collected, Result, Slot};
    /// fn take(into: &mut Collected, slot: &Slot, words: &[u64]) -> Result<()> {
    ///     into.or_slot(slot, words)
    /// }
    /// ```
    ///
    /// A place that is counted along, from slot to slot, can't be handed in:
    ///
    /// ```compile_fail,E0061
    /// # use gleaner_bitmap::{Collected, Result, Slot};
    /// fn take(into: &mut Collected, slot: &Slot, words: &[u64], place: u64) -> Result<()> {
    ///     into.or_slot(slot, words, place)
    /// }
    /// ```
    ///
    /// # Errors
    /// [`Error::UnknownBlock`], [`Error::OutsideBlock`], [`Error::LengthMismatch`] when `words` is shorter than the slot.
    pub fn or_slot(&mut self, slot: &Slot, words: &[u64]) -> Result<()> {
        self.or_block(slot.block, slot.range, words)
    }

    /// Takes a bitmap of some pages of a block: bit `n` is page `range.first + n`.
    ///
    /// # Errors
    /// As [`Collected::or_slot`].
    pub fn or_block(&mut self, block: BlockId, range: PageRange, words: &[u64]) -> Result<()> {
        self.staging(block, range)?.or(range, words)
    }

    /// Takes a single page.
    ///
    /// # Errors
    /// [`Error::UnknownBlock`], [`Error::OutsideBlock`].
    pub fn mark(&mut self, block: BlockId, page: u64) -> Result<()> {
        self.mark_pages(block, &[page])
    }

    /// Takes single pages of one block, in any order.
    ///
    /// # Errors
    /// [`Error::UnknownBlock`], [`Error::OutsideBlock`]: none of them was taken then.
    pub fn mark_pages(&mut self, block: BlockId, pages: &[u64]) -> Result<()> {
        let (Some(&low), Some(&high)) = (pages.iter().min(), pages.iter().max()) else {
            return Ok(());
        };
        let hull = PageRange::new(low, (high - low).saturating_add(1));
        let staging = self.staging(block, hull)?;
        staging.mark_all(pages);
        Ok(())
    }

    /// Takes a range of pages.
    ///
    /// # Errors
    /// [`Error::UnknownBlock`], [`Error::OutsideBlock`].
    pub fn mark_range(&mut self, block: BlockId, range: PageRange) -> Result<()> {
        let staging = self.staging(block, range)?;
        staging.bits.set_range(range);
        staging.touch(range);
        Ok(())
    }
}

/// What one harvest brought.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct HarvestReport {
    /// Distinct pages that went into the store.
    pub pages: u64,
}

/// Runs sources in the one order that loses nothing, and holds back what could not be re-armed.
///
/// Invariant: a bit is in `staged` from the moment a source gave it away until it is in the store. An error leaves it
/// here, never nowhere; and while it is here no lease can name it.
#[derive(Debug, Default)]
pub struct Harvester {
    staged: Collected,
}

impl Harvester {
    /// Makes room for a block. Bits of blocks it was not told of are refused.
    pub fn add_block(&mut self, block: BlockId, pages: u64) {
        self.staged
            .blocks
            .entry(block)
            .or_insert_with(|| Staging::new(pages));
    }

    /// Forgets a block and what was held back of it.
    pub fn remove_block(&mut self, block: BlockId) {
        self.staged.blocks.remove(&block);
    }

    /// Collects from all sources, re-arms all of them, and publishes into `store` what was collected, now and by
    /// earlier harvests that failed.
    ///
    /// # Errors
    /// [`Error::Source`] and whatever a source returns: nothing was published, everything collected is held back;
    /// call again. [`Error::RearmShort`]: the same, but the source has to be healed before the next call.
    pub fn harvest<'s>(
        &mut self,
        sources: impl IntoIterator<Item = &'s mut dyn DirtySource>,
        layout: &Layout,
        scope: Scope<'_>,
        store: &DirtyStore,
    ) -> Result<HarvestReport> {
        let late = mutant::is_planted(Mutant::PublishedLate).then(|| self.publish(Some(store)));
        let collected = self.collect_and_rearm(sources, layout, scope);
        if collected.is_err() && mutant::is_planted(Mutant::ErrorDropsBits) {
            self.publish(None);
        }
        collected?;
        Ok(late.unwrap_or_else(|| self.publish(Some(store))))
    }

    /// As [`Harvester::harvest`], but what was collected goes nowhere: for the start of logging, when nobody is owed
    /// anything yet and a log may start with all bits set.
    ///
    /// # Errors
    /// As [`Harvester::harvest`].
    pub fn discard<'s>(
        &mut self,
        sources: impl IntoIterator<Item = &'s mut dyn DirtySource>,
        layout: &Layout,
    ) -> Result<()> {
        self.collect_and_rearm(sources, layout, Scope::All)?;
        self.publish(None);
        Ok(())
    }

    fn collect_and_rearm<'s>(
        &mut self,
        sources: impl IntoIterator<Item = &'s mut dyn DirtySource>,
        layout: &Layout,
        scope: Scope<'_>,
    ) -> Result<()> {
        let mut sources: Vec<_> = sources.into_iter().collect();
        if mutant::is_planted(Mutant::RearmLate) {
            for source in &mut sources {
                // The slots may be gone by now; the bug is not to stop the guest, only to lose its pages.
                drop(source.rearm());
                source.collect(layout, scope, &mut self.staged)?;
            }
            return Ok(());
        }
        for source in &mut sources {
            source.collect(layout, scope, &mut self.staged)?;
        }
        // Every source is re-armed even when an earlier one came up short: what it gave away must not wait longer
        // than needed.
        let mut outcome = Ok(());
        for source in &mut sources {
            let result = match source.rearm() {
                Ok(Rearm::Complete) => Ok(()),
                Ok(Rearm::Short { collected, rearmed }) => Err(Error::RearmShort {
                    source_name: source.name(),
                    collected,
                    rearmed,
                }),
                Err(error) => Err(error),
            };
            outcome = outcome.and(result);
        }
        outcome
    }

    fn publish(&mut self, store: Option<&DirtyStore>) -> HarvestReport {
        let mut report = HarvestReport::default();
        for (&block, staging) in &mut self.staged.blocks {
            if let Some(store) = store {
                store.publish(block, |sets| report.pages += staging.publish(sets));
            } else {
                staging.publish(&mut []);
            }
        }
        report
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: BlockId = BlockId(0);

    #[test]
    fn a_scope_of_slots_covers_those_and_no_others() {
        let keys: [SlotKey; 2] = [3.into(), 7.into()];
        let covered =
            |scope: Scope<'_>| (0..10).filter(|&id: &u16| scope.covers(id.into())).count();
        assert_eq!(covered(Scope::All), 10);
        assert_eq!(covered(Scope::Slots(&keys)), 2);
        assert!(Scope::Slots(&keys).covers(7.into()));
        assert_eq!(covered(Scope::Slots(&[])), 0);
    }

    #[test]
    fn a_slots_bitmap_lands_on_the_blocks_pages_that_it_maps() {
        let slot = Slot {
            key: 3.into(),
            gpa: 0,
            block: BLOCK,
            range: PageRange::new(4090, 70),
            readonly: false,
        };
        let mut harvester = Harvester::default();
        harvester.add_block(BLOCK, 9000);
        // Pages 0, 6 (the next chunk's first) and 69 of the slot; what lies behind the slot's end is nobody's.
        let words = [1 | 1 << 6, u64::MAX << 5];
        harvester.staged.or_slot(&slot, &words).unwrap();
        let staging = &harvester.staged.blocks[&BLOCK];
        let pages: Vec<u64> = staging.bits.runs().flat_map(|r| r.first..r.end()).collect();
        assert_eq!(pages, [4090, 4096, 4159]);
        assert_eq!(staging.touched, [0, 1]);
    }

    #[test]
    fn a_range_touches_each_word_it_reaches_into_and_no_other() {
        let mut harvester = Harvester::default();
        harvester.add_block(BLOCK, 5 * CHUNK - 7);
        let words = |first: u64, end: u64| (first..end).collect::<Vec<_>>();
        let touched = [
            (CHUNK - 1, 1, words(63, 64)),
            (CHUNK, 1, words(64, 65)),
            (CHUNK - 1, CHUNK + 2, words(63, 129)),
            (5 * CHUNK - 8, 1, words(319, 320)),
        ];
        for (first, pages, want) in touched {
            let range = PageRange::new(first, pages);
            harvester.staged.mark_range(BLOCK, range).unwrap();
            let staging = &harvester.staged.blocks[&BLOCK];
            assert_eq!(staging.bits.runs().collect::<Vec<_>>(), [range]);
            let chunks = staging.touched.iter();
            let touched: Vec<u64> = chunks
                .flat_map(|&chunk| words_of(chunk, staging.masks[chunk]))
                .map(|i| i as u64)
                .collect();
            assert_eq!(touched, want);
            let mut set = PageSet::new(5 * CHUNK - 7);
            let staging = harvester.staged.blocks.get_mut(&BLOCK).unwrap();
            assert_eq!(
                (staging.publish(&mut [&mut set]), set.count()),
                (pages, pages)
            );
            let staging = &harvester.staged.blocks[&BLOCK];
            assert!(staging.bits.count() == 0 && staging.touched.is_empty());
            assert!(staging.masks.iter().all(|&mask| mask == 0));
        }
    }

    #[test]
    fn what_names_no_page_of_a_block_is_refused_and_nothing_of_it_is_taken() {
        let mut harvester = Harvester::default();
        harvester.add_block(BLOCK, 100);
        let into = &mut harvester.staged;
        let all = [u64::MAX; 2];
        for outside in [
            into.mark(BLOCK, 100),
            into.mark(BLOCK, u64::MAX),
            into.mark_pages(BLOCK, &[5, 100, 6]),
            into.mark_range(BLOCK, PageRange::new(99, 2)),
            into.or_block(BLOCK, PageRange::new(1, 100), &all),
        ] {
            assert!(
                matches!(
                    outside,
                    Err(Error::OutsideBlock {
                        block: BLOCK,
                        pages: 100,
                        ..
                    })
                ),
                "{outside:?}"
            );
        }
        for unknown in [
            into.mark(BlockId(1), 0),
            into.mark_range(BlockId(1), PageRange::new(0, 1)),
            into.or_block(BlockId(1), PageRange::new(0, 1), &all),
        ] {
            assert!(
                matches!(unknown, Err(Error::UnknownBlock { block: BlockId(1) })),
                "{unknown:?}"
            );
        }
        let short = into.or_block(BLOCK, PageRange::new(0, 65), &all[1..]);
        assert!(
            matches!(
                short,
                Err(Error::LengthMismatch {
                    left: 65,
                    right: 64
                })
            ),
            "{short:?}"
        );
        into.mark_pages(BLOCK, &[]).unwrap();
        let store = DirtyStore::default();
        assert_eq!(harvester.publish(Some(&store)).pages, 0);
    }
}
