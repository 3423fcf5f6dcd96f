//! Bits that any number of threads set while another one takes them.

use std::sync::atomic::Ordering;

use crate::bits::masked_words;
use crate::mutant::{self, Mutant};
use crate::primitive::{AtomicU8, AtomicU64, zeroed_flags, zeroed_words};
use crate::{PageRange, Result};

/// Words that share a flag: a cache line of bits, 2 MiB of guest memory.
const LINE: usize = 8;

/// A bit for each page, and a flag for each line of bits: taking all bits of a clean bitmap reads the flags alone.
///
/// A bit is set *after* the write it speaks of, by an unconditional `fetch_or`, and taken by `swap`: who takes the bit sees
/// the write. Testing the bit first, to spare the locked instruction, loses writes: the test may still see the bit of an
/// earlier write, whose taker does not see this one.
///
/// A flag may be tested first, because between its clearing and its setting both sides exchange the same word:
///
/// ```text
/// who marks                          who takes
/// write the page                     flag = 0
/// fetch_or(word, AcqRel)             bits = swap(word, 0, AcqRel), for each word of the line
/// flag is 0? -> flag = 1             read the pages
/// ```
///
/// Of the two exchanges of a word one comes first. If it is the `fetch_or`, the bit is taken, and the flag says too much at
/// worst. If it is the `swap`, the `fetch_or` acquires what it released, the cleared flag included: so the test sees that
/// 0, or a flag which was set since, and in both cases the flag is set afterwards. A taker that merely loaded a word, to
/// spare the swap where it is 0, would break this.
pub(crate) struct AtomicBitmap {
    pages: u64,
    words: Box<[AtomicU64]>,
    /// One for each line of words: not 0 while a bit in it may be set.
    flags: Box<[AtomicU8]>,
}

impl AtomicBitmap {
    /// A bitmap of `pages` clean pages. Memory comes with the first bit set in it.
    #[allow(clippy::cast_possible_truncation)] // 64-bit hosts only, as KVM's dirty ring
    pub(crate) fn new(pages: u64) -> Self {
        let words = pages.div_ceil(64) as usize;
        Self {
            pages,
            words: zeroed_words(words),
            flags: zeroed_flags(words.div_ceil(LINE)),
        }
    }

    #[inline]
    fn mark(&self, i: usize, bits: u64) {
        let word = &self.words[i];
        if mutant::is_planted(Mutant::LoadFirst) && word.load(Ordering::Relaxed) & bits == bits {
            return;
        }
        word.fetch_or(bits, Ordering::AcqRel);
        let flag = &self.flags[i / LINE];
        if flag.load(Ordering::Relaxed) == 0 {
            flag.store(1, Ordering::Release);
        }
    }

    /// Sets the bits of `range`, after it was written.
    ///
    /// # Panics
    /// When the range reaches past the bitmap.
    #[inline]
    #[allow(clippy::cast_possible_truncation)] // word index of a bitmap in memory
    pub(crate) fn set_range(&self, range: PageRange) {
        // Most marks are of a page or two.
        let shift = range.first % 64;
        if (1..=64 - shift).contains(&range.pages) {
            let bits = u64::MAX >> (64 - range.pages) << shift;
            self.mark((range.first / 64) as usize, bits);
        } else {
            masked_words(range.first, range.pages, |i, mask| self.mark(i, mask));
        }
    }

    /// Whether the bit of `page` is set.
    ///
    /// # Panics
    /// When there is no such page.
    #[allow(clippy::cast_possible_truncation)] // word index of a bitmap in memory
    pub(crate) fn get(&self, page: u64) -> bool {
        assert!(
            page < self.pages,
            "page {page} of a bitmap of {}",
            self.pages
        );
        let word = &self.words[(page / 64) as usize];
        word.load(Ordering::Acquire) >> (page % 64) & 1 == 1
    }

    /// Takes all bits: `each(pages, their bits)` for every word that has some. What is set meanwhile is taken now or stays.
    ///
    /// # Errors
    /// The first one of `each`; the bits it refused, and those after them, stay.
    pub(crate) fn take(&self, mut each: impl FnMut(PageRange, u64) -> Result<()>) -> Result<()> {
        for (n, flag) in self.flags.iter().enumerate() {
            // A flag that this load misses is found the next time: nothing is cleared that was not seen.
            if flag.load(Ordering::Relaxed) == 0 {
                continue;
            }
            flag.swap(0, Ordering::AcqRel);
            let words = self.words[n * LINE..].iter().take(LINE).enumerate();
            for (i, word) in words {
                let bits = word.swap(0, Ordering::AcqRel);
                if bits == 0 {
                    continue;
                }
                let first = (n * LINE + i) as u64 * 64;
                let pages = PageRange::new(first, (self.pages - first).min(64));
                // The flag is set again too, for those after it as well.
                each(pages, bits).inspect_err(|_| self.mark(n * LINE + i, bits))?;
            }
        }
        Ok(())
    }
}

#[cfg(loom)]
impl AtomicBitmap {
    /// Plants a bug, for the loom test: tests the bit before it sets it.
    pub(crate) fn set_range_load_first(&self, range: PageRange) {
        masked_words(range.first, range.pages, |i, mask| {
            if self.words[i].load(Ordering::Acquire) & mask != mask {
                self.mark(i, mask);
            }
        });
    }
}
