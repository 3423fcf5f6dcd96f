//! Bits that any number of threads set while another one takes them.

use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use crate::bits::masked_words;
use crate::mutant::{self, Mutant};
use crate::primitive::AtomicU64;
use crate::{PageRange, Result};

/// Words in a chunk: 4 KiB of bits, 128 MiB of guest memory.
const CHUNK: usize = 512;

/// A bit for each page, in chunks that come with the first bit set in them: memory and the time to take all bits follow
/// what was ever written, not the guest's size.
///
/// A bit is set *after* the write it speaks of, by an unconditional `fetch_or(Release)`, and taken by `swap(Acquire)`: who
/// takes the bit sees the write. Testing the bit first, to spare the locked instruction, loses writes: the test may still
/// see the bit of an earlier write, whose taker does not see this one.
pub(crate) struct AtomicBitmap {
    pages: u64,
    chunks: Box<[OnceLock<Box<[AtomicU64]>>]>,
}

impl AtomicBitmap {
    /// A bitmap of `pages` clean pages.
    pub(crate) fn new(pages: u64) -> Self {
        let chunks = pages.div_ceil(64 * CHUNK as u64);
        Self {
            pages,
            chunks: (0..chunks).map(|_| OnceLock::new()).collect(),
        }
    }

    /// Word `i`, with the chunk around it.
    #[allow(clippy::cast_possible_truncation)] // at most CHUNK
    fn word(&self, i: usize) -> &AtomicU64 {
        let first = i / CHUNK * CHUNK;
        let chunk = self.chunks[i / CHUNK].get_or_init(|| {
            let left = self.pages.div_ceil(64) - first as u64;
            let words = left.min(CHUNK as u64);
            (0..words).map(|_| AtomicU64::new(0)).collect()
        });
        &chunk[i - first]
    }

    /// Sets the bits of `range`, after it was written.
    ///
    /// # Panics
    /// When the range reaches past the bitmap.
    pub(crate) fn set_range(&self, range: PageRange) {
        masked_words(range.first, range.pages, |i, mask| {
            let word = self.word(i);
            let looks_first = mutant::is_planted(Mutant::LoadFirst);
            if !(looks_first && word.load(Ordering::Relaxed) & mask == mask) {
                word.fetch_or(mask, Ordering::Release);
            }
        });
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
        let i = (page / 64) as usize;
        self.chunks[i / CHUNK]
            .get()
            .is_some_and(|chunk| chunk[i % CHUNK].load(Ordering::Acquire) >> (page % 64) & 1 == 1)
    }

    /// Takes all bits: `each(pages, their bits)` for every word that has some. What is set meanwhile is taken now or stays.
    ///
    /// # Errors
    /// The first one of `each`; the bits it refused, and those after them, stay.
    pub(crate) fn take(&self, mut each: impl FnMut(PageRange, u64) -> Result<()>) -> Result<()> {
        for (n, chunk) in self.chunks.iter().enumerate() {
            let Some(chunk) = chunk.get() else {
                continue;
            };
            for (i, word) in chunk.iter().enumerate() {
                // A bit that this load misses is found the next time: nothing is cleared that was not seen.
                if word.load(Ordering::Relaxed) == 0 {
                    continue;
                }
                let bits = word.swap(0, Ordering::Acquire);
                let first = (n * CHUNK + i) as u64 * 64;
                let pages = PageRange::new(first, (self.pages - first).min(64));
                each(pages, bits).inspect_err(|_| {
                    word.fetch_or(bits, Ordering::Release);
                })?;
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
            let word = self.word(i);
            if word.load(Ordering::Acquire) & mask != mask {
                word.fetch_or(mask, Ordering::Release);
            }
        });
    }
}
