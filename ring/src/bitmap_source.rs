//! The dirty bitmaps of all slots as one dirty source.

use std::sync::Arc;

use gleaner_bitmap::mutant::{self, Mutant};
use gleaner_bitmap::{Collected, DirtySource, Extent, Layout, PageRange, Rearm, Scope, Slot};

use crate::unarmed::Unarmed;
use crate::{Kvm, Result};

/// Words that are handed to one call at most (256 MiB of guest).
const CLEAR_WORDS: u64 = 1 << 10;
/// Dirty pages that one call clears at most: it holds KVM's memory lock for each of them, and vCPUs wait for that. With so few
/// the guest stalls a third as long in all (the benchmarks' `slowdown/stall`), for a fifth more of KVM's time.
const CLEAR_PAGES: u32 = 128;

/// `KVM_GET_DIRTY_LOG` for each slot that is logged.
///
/// Plain, fetching re-arms. With manual protection nothing is re-armed by fetching; then exactly the words that were
/// fetched are cleared. A bit that was never fetched is never cleared, but for memory that is owed to everybody as it is:
///
/// Logs may start with all bits set, and nothing protected ([`BitmapSource::all_unarmed`]). As long as all consumers have all
/// of the memory dirty, nothing has to be done about it, which is why a log of any size starts at once. It is armed piece by
/// piece, before the first lease of each is handed out ([`BitmapSource::arm`]).
pub struct BitmapSource {
    kvm: Arc<dyn Kvm>,
    manual: bool,
    /// Logs fetched and not yet cleared (manual protection). What is left of them after an error is still set in KVM.
    fetched: Vec<(Slot, Vec<u64>)>,
    unarmed: Unarmed,
    buffer: Vec<u64>,
}

impl BitmapSource {
    /// The bitmaps of a VM; `manual` says whether manual protection is on.
    #[must_use]
    pub fn new(kvm: Arc<dyn Kvm>, manual: bool) -> Self {
        Self {
            kvm,
            manual,
            fetched: Vec::new(),
            unarmed: Unarmed::default(),
            buffer: Vec::new(),
        }
    }

    /// The logs of all slots of `layout` have just started with all bits set, or are about to: nothing is armed. Every
    /// consumer has to begin with all pages dirty, and every lease to be armed, from here on.
    pub fn all_unarmed(&mut self, layout: &Layout) {
        self.unarmed = Unarmed::all(layout);
    }

    /// Arms what some pages are part of, and was not armed yet: after they were leased, before their contents are read. No slot
    /// may be created meanwhile.
    ///
    /// INITIALLY_SET is on while it does. On x86 a log that begins with all bits set leaves huge mappings writable, and a
    /// CLEAR protects them only while that is on (`kvm_arch_mmu_enable_log_dirty_pt_masked` of Linux):
    ///
    /// ```text
    /// huge page is written -> log starts -> leased, CLEAR without it -> contents are read -> written through the huge mapping: lost
    /// ```
    ///
    /// What is armed once is mapped by small pages from then on, as in every slot that is logged.
    ///
    /// # Errors
    /// [`crate::Error::ClearDirtyLog`], [`crate::Error::EnableCapability`]: some of them may be armed and some not. None of them
    /// may be read. Where it could not be switched off, slots that are created begin with all bits set until something else is
    /// armed: their pages go without need, and none is lost.
    pub fn arm(&mut self, layout: &Layout, extents: &[Extent]) -> Result<()> {
        if mutant::is_planted(Mutant::LeasedUnarmed) {
            return Ok(());
        }
        let mut extents = extents.iter();
        if !extents
            .clone()
            .any(|e| self.unarmed.reaches(e.block, e.range))
        {
            return Ok(());
        }
        let with_huge = !mutant::is_planted(Mutant::HugeLeftWritable);
        self.kvm.set_manual_protect(true, with_huge)?;
        let armed =
            extents.try_for_each(|e| self.unarmed.arm(&*self.kvm, layout, e.block, e.range));
        let goes_on = mutant::is_planted(Mutant::InitialBitsTaken);
        armed.and(self.kvm.set_manual_protect(true, goes_on))
    }

    /// Logging ends, or nothing can be unarmed any more.
    pub fn none_unarmed(&mut self) {
        self.unarmed = Unarmed::default();
    }

    fn clear(&self, slot: &Slot, words: &[u64]) -> Result<()> {
        for span in dirty_spans(words) {
            let first = span.first * 64;
            let end = (span.end() * 64).min(slot.range.pages);
            let mut part = words_of(words, span);
            if mutant::is_planted(Mutant::ClearedUnfetched) {
                part = &[u64::MAX; 1 << 10][..part.len()];
            }
            self.kvm
                .clear_dirty_log(slot.key, PageRange::new(first, end - first), part)?;
        }
        Ok(())
    }
}

#[allow(clippy::cast_possible_truncation)] // word indices of a slice in memory
fn words_of(words: &[u64], span: PageRange) -> &[u64] {
    &words[span.first as usize..span.end() as usize]
}

/// Spans of words that hold all set bits, none of more than a call should take. What is clean between two dirty words of a span
/// is handed over too: a call costs more than looking at hundreds of clean words.
fn dirty_spans(words: &[u64]) -> Vec<PageRange> {
    let mut spans: Vec<PageRange> = Vec::new();
    let mut pages = 0;
    for (at, word) in (0..).zip(words).filter(|(_, word)| **word != 0) {
        let more = word.count_ones();
        match spans.last_mut() {
            Some(span) if at - span.first < CLEAR_WORDS && pages + more <= CLEAR_PAGES => {
                span.pages = at + 1 - span.first;
                pages += more;
            }
            _ => {
                spans.push(PageRange::new(at, 1));
                pages = more;
            }
        }
    }
    spans
}

impl DirtySource for BitmapSource {
    fn name(&self) -> String {
        "dirty bitmap".into()
    }

    fn collect(
        &mut self,
        layout: &Layout,
        scope: Scope<'_>,
        into: &mut Collected,
    ) -> gleaner_bitmap::Result<()> {
        // What an earlier attempt fetched and did not clear is fetched again, or still waits to be cleared.
        self.fetched
            .retain(|(slot, _)| !scope.covers(slot.key) && layout.slot(slot.key) == Some(slot));
        let mut place = 0;
        for slot in scope.slots(layout).filter(|s| !s.readonly) {
            if self.unarmed.contains(slot.block, slot.range) {
                continue;
            }
            let words = usize::try_from(slot.range.pages.div_ceil(64)).unwrap_or(usize::MAX);
            self.buffer.clear();
            self.buffer.resize(words, 0);
            self.kvm.get_dirty_log(slot.key, &mut self.buffer)?;
            self.unarmed.mask(slot.block, slot.range, &mut self.buffer);
            if self.buffer.iter().all(|&w| w == 0) {
                continue;
            }
            let mut slot_at = *slot;
            if mutant::is_planted(Mutant::CleanSlotNotPassed) {
                slot_at.range.first = place;
            }
            place = slot_at.range.end();
            into.or_slot(&slot_at, &self.buffer)?;
            if self.manual {
                self.fetched.push((*slot, std::mem::take(&mut self.buffer)));
            }
        }
        Ok(())
    }

    fn rearm(&mut self) -> gleaner_bitmap::Result<Rearm> {
        while let Some((slot, words)) = self.fetched.last() {
            let first = mutant::is_planted(Mutant::ClearedInOneSlot);
            self.clear(if first { &self.fetched[0].0 } else { slot }, words)?;
            self.fetched.pop();
        }
        Ok(Rearm::Complete)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test fails by panicking

    use std::sync::Mutex;

    use gleaner_bitmap::{BlockId, BlockInfo, DirtyStore, Harvester, PAGE_SIZE, SlotKey};

    use super::*;
    use crate::fake::FakeKvm;

    #[test]
    fn spans_cover_every_set_bit_and_are_no_longer_than_a_call_should_take() {
        let mut words = vec![0u64; 4096];
        for i in [0, 1, 17, 1023, 1024, 4095] {
            words[i] = 1 << (i % 64);
        }
        let pairs = |words: &[u64]| -> Vec<_> {
            let spans = dirty_spans(words).into_iter();
            spans.map(|span| (span.first, span.pages)).collect()
        };
        assert_eq!(pairs(&words), [(0, 1024), (1024, 1), (4095, 1)]);
        words.fill(u64::MAX);
        let whole: Vec<_> = (0..2048).map(|n| (2 * n, 2)).collect();
        assert_eq!(pairs(&words), whole);
    }

    /// The CLEAR calls of a harvest of a slot of `pages` pages, which lies `shift` pages into its block.
    fn clears(pages: u64, shift: u64, dirty: &[u64]) -> Vec<PageRange> {
        let block = BlockInfo::new(BlockId(0), "ram", (pages + shift) * PAGE_SIZE).unwrap();
        let slot = Slot {
            key: 0.into(),
            gpa: 0,
            block: block.id,
            range: PageRange::new(shift, pages),
            readonly: false,
        };
        let mut harvester = Harvester::default();
        harvester.add_block(block.id, pages + shift);
        let mut layout = Layout::empty(1).edit();
        layout.add_block(block).unwrap();
        layout.create(slot).unwrap();
        let layout = layout.finish().unwrap();
        let mut log = vec![0; usize::try_from(pages.div_ceil(64)).unwrap()];
        for page in dirty {
            log[usize::try_from(page / 64).unwrap()] |= 1 << (page % 64);
        }
        let calls = Arc::<Mutex<Vec<PageRange>>>::default();
        let (told, as_fetched) = (Arc::clone(&calls), log.clone());
        let clear = move |_: SlotKey, range: PageRange, words: &[u64]| {
            let first = usize::try_from(range.first / 64).unwrap();
            assert_eq!(words, &as_fetched[first..first + words.len()]);
            told.lock().unwrap().push(range);
            Ok(())
        };
        let kvm: Arc<dyn Kvm> = Arc::new(FakeKvm { log, clear });
        let mut source = BitmapSource::new(kvm, true);
        let report = harvester.harvest(
            [&mut source as &mut dyn DirtySource],
            &layout,
            Scope::All,
            &DirtyStore::default(),
        );
        assert_eq!(report.unwrap().pages, dirty.len() as u64);
        let calls = calls.lock().unwrap();
        calls.clone()
    }

    #[test]
    fn clear_calls_follow_the_chunks_that_hold_dirty_pages_and_not_the_misalignment() {
        let pages = 1 << 20;
        let chunk = CLEAR_WORDS * 64;
        // 8 MiB in a row; a page in each 10 MiB of one chunk; one page in each of three distant chunks.
        let row: Vec<u64> = (70_000..72_048).collect();
        let comb: Vec<u64> = (0..25).map(|n| 5 + 64 * 40 * n).collect();
        let few: Vec<u64> = [3, 7, 15].map(|n| n * chunk + 99).to_vec();
        let full = row.len().div_ceil(CLEAR_PAGES as usize);
        for (dirty, most) in [(row, full + 1), (comb, 1), (few, 3)] {
            let aligned = clears(pages, 0, &dirty);
            assert!(aligned.len() <= most, "{} calls", aligned.len());
            // 4 MiB into the block, and a number of pages that no word begins with.
            for shift in [1024, 37] {
                assert_eq!(clears(pages, shift, &dirty), aligned, "shift {shift}");
            }
        }
    }
}
