//! Memory that KVM has not been told to watch yet.

use std::collections::BTreeMap;

use gleaner_bitmap::{BlockId, Layout, PageBitmap, PageRange, masked_words};

use crate::{Kvm, Result};

/// Pages that are armed together: 64 MiB of guest memory. While a call arms them it holds KVM's memory lock, and vCPUs wait
/// for that.
const PART: u64 = 1 << 14;

/// Parts of RAM blocks whose logs began with all bits set, and of which no page has been cleared since: KVM protects none of
/// them, and logs no write to them.
///
/// Invariant: every consumer has all pages of such a part dirty, and no lease with one of them has been handed out. So what
/// is written there is owed to everybody already, and what KVM's log says of it is news to nobody: it is masked. A part is
/// armed before the first lease with a page of it is handed out, and for good:
///
/// ```text
/// write -> log starts -> write -> leased -> CLEAR of the whole part -> contents are read -> write
/// in the copy            in the copy        from here on it is logged                       in the log
/// ```
///
/// It is parts of blocks, not of slots: a slot that a transaction makes of such memory starts armed. Masking its log is right
/// all the same, by the invariant, and so is clearing it.
#[derive(Default)]
pub(crate) struct Unarmed {
    /// A bit for each part of the block.
    blocks: BTreeMap<BlockId, PageBitmap>,
}

impl Unarmed {
    /// All memory of a layout.
    pub(crate) fn all(layout: &Layout) -> Self {
        let blocks = layout.blocks();
        Self {
            blocks: blocks
                .map(|block| (block.id, PageBitmap::all_set(block.pages.div_ceil(PART))))
                .collect(),
        }
    }

    /// The pages of all parts that `range` reaches into and that are not armed, in runs of parts; they may reach past the
    /// end of the block.
    fn within(&self, block: BlockId, range: PageRange) -> Vec<PageRange> {
        let Some(parts) = self.blocks.get(&block) else {
            return Vec::new();
        };
        let first = range.first / PART;
        let end = range.end().div_ceil(PART).min(parts.pages());
        let touched = PageRange::new(first, end.saturating_sub(first));
        parts
            .runs_in(touched)
            .map(|run| PageRange::new(run.first * PART, run.pages * PART))
            .collect()
    }

    /// Whether any of these pages is in a part that is not armed.
    pub(crate) fn reaches(&self, block: BlockId, range: PageRange) -> bool {
        !self.within(block, range).is_empty()
    }

    /// Whether none of these pages is armed: their log need not be fetched.
    pub(crate) fn contains(&self, block: BlockId, range: PageRange) -> bool {
        self.within(block, range)
            .first()
            .is_some_and(|pages| pages.contains(&range))
    }

    /// Takes what is not armed out of the log of some pages of a block; bit `n` is page `range.first + n`.
    pub(crate) fn mask(&self, block: BlockId, range: PageRange, words: &mut [u64]) {
        for pages in self.within(block, range) {
            if let Some(inside) = pages.intersect(&range) {
                let first = inside.first - range.first;
                masked_words(first, inside.pages, |i, mask| words[i] &= !mask);
            }
        }
    }

    /// Arms each part that `range` reaches into.
    ///
    /// # Errors
    /// That of [`Kvm::clear_dirty_log`]: the part it was about counts as unarmed still, and those after it.
    pub(crate) fn arm(
        &mut self,
        kvm: &dyn Kvm,
        layout: &Layout,
        block: BlockId,
        range: PageRange,
    ) -> Result<()> {
        for run in self.within(block, range) {
            for first in (run.first..run.end()).step_by(1 << PART.trailing_zeros()) {
                clear(kvm, layout, block, PageRange::new(first, PART))?;
                if let Some(parts) = self.blocks.get_mut(&block) {
                    parts.clear_range(PageRange::new(first / PART, 1));
                    if parts.count() == 0 {
                        self.blocks.remove(&block);
                    }
                }
            }
        }
        Ok(())
    }
}

/// Clears some pages of a block in the log of each slot that maps them, whatever is set there: nobody learns of it.
fn clear(kvm: &dyn Kvm, layout: &Layout, block: BlockId, pages: PageRange) -> Result<()> {
    let slots = layout.slots().filter(|s| s.block == block && !s.readonly);
    for slot in slots {
        let Some(inside) = slot.range.intersect(&pages) else {
            continue;
        };
        let first = inside.first - slot.range.first;
        // KVM takes whole words.
        let from = first / 64 * 64;
        let end = (first + inside.pages)
            .next_multiple_of(64)
            .min(slot.range.pages);
        let mut bits = PageBitmap::new(end - from);
        bits.set_range(PageRange::new(first - from, inside.pages));
        kvm.clear_dirty_log(slot.key, PageRange::new(from, end - from), bits.words())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test fails by panicking

    use std::collections::BTreeSet;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use gleaner_bitmap::{BlockInfo, PAGE_SIZE, Slot, SlotKey};

    use super::*;
    use crate::Error;
    use crate::fake::FakeKvm;

    const BLOCK: BlockId = BlockId(7);

    /// What a KVM was told to clear: which pages of which slots.
    #[derive(Default)]
    struct Told(Mutex<Vec<(SlotKey, u64)>>);

    impl Told {
        /// A KVM that notes it here, and refuses the call of a number.
        fn kvm(&self, refuses: Option<usize>) -> impl Kvm + '_ {
            let calls = AtomicUsize::new(0);
            let clear = move |key, range: PageRange, words: &[u64]| {
                if Some(calls.fetch_add(1, Ordering::Relaxed) + 1) == refuses {
                    return Err(Error::Refused {
                        reason: "asked for".into(),
                    });
                }
                let size = slots().iter().find(|s| s.key == key).unwrap().range.pages;
                assert_eq!(range.first % 64, 0);
                assert!(range.pages.is_multiple_of(64) || range.end() == size);
                assert_eq!(words.len() as u64, range.pages.div_ceil(64));
                let bits = PageBitmap::from_words(range.pages, words).unwrap();
                let pages = bits.runs().flat_map(|run| run.first..run.end());
                let mut told = self.0.lock().unwrap();
                told.extend(pages.map(|page| (key, range.first + page)));
                Ok(())
            };
            FakeKvm {
                log: Vec::new(),
                clear,
            }
        }

        /// What was cleared since the last time, each page once.
        fn take(&self) -> BTreeSet<(SlotKey, u64)> {
            let cleared = std::mem::take(&mut *self.0.lock().unwrap());
            let set: BTreeSet<_> = cleared.iter().copied().collect();
            assert_eq!(set.len(), cleared.len(), "a page was cleared twice");
            set
        }
    }

    /// Two and a half parts of a block: one slot ends inside of the second part where no word does, the next one begins there;
    /// one is a second window on pages of both, one can't be written through, and the end of the block is not mapped.
    fn slots() -> Vec<Slot> {
        let slot = |id: u16, first, pages, readonly| Slot {
            key: id.into(),
            gpa: u64::from(id) << 40,
            block: BLOCK,
            range: PageRange::new(first, pages),
            readonly,
        };
        vec![
            slot(0, 0, PART + 37, false),
            slot(1, PART + 37, PART, false),
            slot(2, PART - 5, 70, false),
            slot(3, 0, 2 * PART, true),
        ]
    }

    fn layout() -> Layout {
        let mut layout = Layout::empty(8).edit();
        let size = (2 * PART + PART / 2) * PAGE_SIZE;
        layout
            .add_block(BlockInfo::new(BLOCK, "ram", size).unwrap())
            .unwrap();
        let mut slots = slots().into_iter();
        slots.try_for_each(|slot| layout.create(slot)).unwrap();
        layout.finish().unwrap()
    }

    /// The pages of each slot that can be written through and that maps pages `first..end` of the block.
    fn mapping(first: u64, end: u64) -> BTreeSet<(SlotKey, u64)> {
        let slots = slots().into_iter().filter(|s| !s.readonly);
        slots
            .flat_map(|slot| {
                let pages = slot.range.first..slot.range.end();
                pages
                    .filter(|page| (first..end).contains(page))
                    .map(|page| (slot.key, page - slot.range.first))
                    .collect::<Vec<_>>()
            })
            .collect()
    }

    #[test]
    fn a_part_is_armed_once_and_whole_in_each_slot_that_maps_it() {
        let (told, layout) = (Told::default(), layout());
        let kvm = told.kvm(None);
        let mut unarmed = Unarmed::all(&layout);
        let mut arm = |first, pages| {
            unarmed
                .arm(&kvm, &layout, BLOCK, PageRange::new(first, pages))
                .unwrap();
            told.take()
        };
        assert_eq!(arm(PART + 3, 1), mapping(PART, 2 * PART));
        assert!(arm(2 * PART - 1, 1).is_empty(), "it is armed");
        let rest: BTreeSet<_> = mapping(0, PART)
            .union(&mapping(2 * PART, 3 * PART))
            .copied()
            .collect();
        assert_eq!(arm(PART - 1, PART + 2), rest);
        assert!(unarmed.blocks.is_empty(), "nothing is left to be armed");
    }

    #[test]
    fn what_a_call_refused_to_arm_is_unarmed_still() {
        let layout = layout();
        let told = Told::default();
        let kvm = told.kvm(Some(2));
        let mut unarmed = Unarmed::all(&layout);
        let whole = PageRange::new(0, 3 * PART);
        // The second call of the first part, which two slots map.
        assert!(unarmed.arm(&kvm, &layout, BLOCK, whole).is_err());
        told.take();
        unarmed.arm(&kvm, &layout, BLOCK, whole).unwrap();
        assert_eq!(told.take(), mapping(0, 3 * PART));
    }

    #[test]
    fn the_log_of_what_is_not_armed_is_masked_and_no_other() {
        let (told, layout) = (Told::default(), layout());
        let kvm = told.kvm(None);
        let mut unarmed = Unarmed::all(&layout);
        let [_, slot, ..] = slots()[..] else {
            unreachable!("there are four")
        };
        let left = |unarmed: &Unarmed| {
            let mut bits = PageBitmap::all_set(PART).words().to_vec();
            unarmed.mask(slot.block, slot.range, &mut bits);
            let bits = PageBitmap::from_words(PART, &bits).unwrap();
            bits.runs().collect::<Vec<_>>()
        };
        assert_eq!(left(&unarmed), []);
        assert!(unarmed.contains(BLOCK, slot.range));
        unarmed
            .arm(&kvm, &layout, BLOCK, PageRange::new(2 * PART, 1))
            .unwrap();
        assert!(!unarmed.contains(BLOCK, slot.range));
        assert!(unarmed.contains(BLOCK, PageRange::new(0, 2 * PART)));
        let second_part = PageRange::new(PART - 37, 37);
        assert_eq!(left(&unarmed), [second_part]);
        unarmed
            .arm(&kvm, &layout, BLOCK, PageRange::new(PART, 1))
            .unwrap();
        assert_eq!(left(&unarmed), [PageRange::new(0, PART)]);
    }
}
