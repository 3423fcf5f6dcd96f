//! A bitmap with a bit for each page.

use bitvec::prelude::{BitVec, Lsb0};

use crate::bits::masked_words;
use crate::{Error, PageRange, Result, Runs, count_bits, or_bits};

/// A bit for each page of a block or a slot, in KVM's order (page `n` is bit `n % 64` of word `n / 64`).
///
/// Invariant: bits past the last page are zero, so that words can be counted and scanned whole.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PageBitmap {
    bits: BitVec<u64, Lsb0>,
}

impl PageBitmap {
    /// A bitmap of `pages` clean pages. It takes memory where something is set or cleared, and nowhere else.
    #[must_use]
    #[allow(clippy::cast_possible_truncation)] // 64-bit hosts only, as KVM's dirty ring
    pub fn new(pages: u64) -> Self {
        // Zeroed by the allocator: `BitVec::repeat` would write every word.
        let mut bits = BitVec::from_vec(vec![0; pages.div_ceil(64) as usize]);
        bits.truncate(pages as usize);
        Self { bits }
    }

    /// A bitmap of `pages` dirty pages.
    #[must_use]
    pub fn all_set(pages: u64) -> Self {
        let mut all = Self::new(pages);
        all.set_range(PageRange::new(0, pages));
        all
    }

    /// From words as KVM fills them. Bits past the last page are dropped.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] when the number of words is not that of `pages` pages.
    pub fn from_words(pages: u64, words: &[u64]) -> Result<Self> {
        if words.len() as u64 != pages.div_ceil(64) {
            return Err(Error::LengthMismatch {
                left: pages,
                right: words.len() as u64 * 64,
            });
        }
        let mut bitmap = Self::new(pages);
        or_bits(bitmap.words_mut(), 0, words, 0, pages);
        Ok(bitmap)
    }

    /// Number of pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.bits.len() as u64
    }

    /// Its words, the last one padded with zeros.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        self.bits.as_raw_slice()
    }

    fn words_mut(&mut self) -> &mut [u64] {
        self.bits.as_raw_mut_slice()
    }

    /// Whether `page` is dirty.
    ///
    /// # Panics
    /// When there is no such page.
    #[must_use]
    #[allow(clippy::cast_possible_truncation)]
    pub fn get(&self, page: u64) -> bool {
        self.bits[page as usize]
    }

    /// Makes `page` dirty.
    ///
    /// # Panics
    /// When there is no such page.
    #[allow(clippy::cast_possible_truncation)]
    pub fn set(&mut self, page: u64) {
        self.bits.set(page as usize, true);
    }

    fn check(&self, range: PageRange) {
        assert!(
            range.end() <= self.pages(),
            "pages {range:?} of a bitmap of {}",
            self.pages()
        );
    }

    /// Makes a range dirty.
    ///
    /// # Panics
    /// When the range reaches past the bitmap.
    pub fn set_range(&mut self, range: PageRange) {
        self.check(range);
        let words = self.words_mut();
        masked_words(range.first, range.pages, |i, mask| words[i] |= mask);
    }

    /// Makes a range clean.
    ///
    /// # Panics
    /// When the range reaches past the bitmap.
    pub fn clear_range(&mut self, range: PageRange) {
        self.check(range);
        let words = self.words_mut();
        masked_words(range.first, range.pages, |i, mask| words[i] &= !mask);
    }

    /// Makes every page clean.
    pub fn clear(&mut self) {
        self.words_mut().fill(0);
    }

    /// Number of dirty pages.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words().iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Number of dirty pages in a range.
    ///
    /// # Panics
    /// When the range reaches past the bitmap.
    #[must_use]
    pub fn count_range(&self, range: PageRange) -> u64 {
        self.check(range);
        count_bits(self.words(), range.first, range.pages)
    }

    /// ORs `pages` bits of `src` from `src_first` on into this bitmap from `first` on, at any shift.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] when a range does not fit; nothing has changed then.
    pub fn or_words_at(&mut self, range: PageRange, src: &[u64], src_first: u64) -> Result<()> {
        let room = src.len() as u64 * 64;
        if range.end() > self.pages() || src_first.saturating_add(range.pages) > room {
            return Err(Error::LengthMismatch {
                left: self.pages(),
                right: room,
            });
        }
        or_bits(self.words_mut(), range.first, src, src_first, range.pages);
        Ok(())
    }

    /// ORs another bitmap of the same length.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`] when lengths differ: never is a tail dropped silently.
    pub fn or(&mut self, other: &Self) -> Result<()> {
        if self.pages() != other.pages() {
            return Err(Error::LengthMismatch {
                left: self.pages(),
                right: other.pages(),
            });
        }
        for (d, s) in self.words_mut().iter_mut().zip(other.words()) {
            *d |= s;
        }
        Ok(())
    }

    /// The bits of `range` as a bitmap of its own.
    ///
    /// # Panics
    /// When the range reaches past the bitmap.
    #[must_use]
    pub fn slice(&self, range: PageRange) -> Self {
        self.check(range);
        let mut part = Self::new(range.pages);
        or_bits(part.words_mut(), 0, self.words(), range.first, range.pages);
        part
    }

    /// Runs of dirty pages, in order.
    #[must_use]
    pub fn runs(&self) -> Runs<'_> {
        Runs::new(self.words(), 0, self.pages())
    }

    /// Runs of dirty pages in a range, in order.
    ///
    /// # Panics
    /// When the range reaches past the bitmap.
    #[must_use]
    pub fn runs_in(&self, range: PageRange) -> Runs<'_> {
        self.check(range);
        Runs::new(self.words(), range.first, range.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_past_the_last_page_are_dropped() {
        let map = PageBitmap::from_words(70, &[u64::MAX, u64::MAX]).unwrap();
        assert_eq!(map.count(), 70);
        assert_eq!(map.words()[1], (1 << 6) - 1);
    }

    #[test]
    fn combining_different_lengths_is_refused() {
        let mut a = PageBitmap::new(65);
        assert!(a.or(&PageBitmap::all_set(64)).is_err());
        assert!(PageBitmap::from_words(65, &[1]).is_err());
        assert!(
            a.or_words_at(PageRange::new(2, 64), &[u64::MAX], 0)
                .is_err()
        );
        assert_eq!(a.count(), 0);
    }

    #[test]
    fn slice_then_or_back_is_the_identity_on_the_range() {
        let mut map = PageBitmap::new(300);
        for page in [0, 63, 64, 129, 200, 299] {
            map.set(page);
        }
        let range = PageRange::new(61, 170);
        let part = map.slice(range);
        let mut back = PageBitmap::new(300);
        back.or_words_at(range, part.words(), 0).unwrap();
        let got: Vec<_> = back.runs().map(|r| r.first).collect();
        assert_eq!(got, [63, 129, 200]);
        assert_eq!(back.count_range(range), map.count_range(range));
    }
}
