//! Runs of set bits, found word by word.

use crate::PageRange;

/// Words looked at together where nothing changes.
const STRIDE: usize = 8;

/// The runs of set bits in a bitmap, in order: an iterator whose cost follows words and runs, never set bits.
///
/// It looks for *edges*, bits that differ from the bit before them. All edges of a word come from one exclusive or, so that
/// dense bitmaps cost few mispredicted branches. Where nothing changes, several words are passed at once.
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    /// Up to the word of the last bit.
    words: &'a [u64],
    /// The word to look at next.
    next: usize,
    /// Edges of the word before that one which have not been met yet.
    edges: u64,
    /// The last bit of that word.
    carry: u64,
    /// What of the last word belongs to the range.
    tail: u64,
    /// Bit after the last one.
    end: u64,
}

impl<'a> Runs<'a> {
    /// Runs among the bits `first..end` of `words`.
    ///
    /// # Panics
    /// When `end` lies outside `words`.
    #[must_use]
    #[allow(clippy::cast_possible_truncation)] // word indices of a slice in memory
    pub fn new(words: &'a [u64], first: u64, end: u64) -> Self {
        assert!(end <= words.len() as u64 * 64, "range outside the bitmap");
        let empty = first >= end;
        let start = if empty { 0 } else { (first / 64) as usize };
        let mut runs = Self {
            words: if empty {
                &[]
            } else {
                &words[..end.div_ceil(64) as usize]
            },
            next: start,
            edges: 0,
            carry: 0,
            tail: u64::MAX >> (end.wrapping_neg() % 64),
            end,
        };
        if !empty {
            runs.load(u64::MAX << (first % 64));
        }
        runs
    }

    /// Takes the next word, of which `mask` belongs to the range.
    #[inline]
    fn load(&mut self, mask: u64) {
        let last = self.next + 1 == self.words.len();
        let word = self.words[self.next] & mask & if last { self.tail } else { u64::MAX };
        self.edges = word ^ (word << 1 | self.carry);
        self.carry = word >> 63;
        self.next += 1;
    }

    /// Passes words that are all like the last bit. The last word has a mask of its own and is never passed.
    fn stride(&mut self) {
        let same = self.carry.wrapping_neg();
        let Some((_, words)) = self.words.split_last() else {
            return;
        };
        while let Some(stride) = words.get(self.next..self.next + STRIDE) {
            if stride.iter().fold(0, |all, word| all | (word ^ same)) != 0 {
                break;
            }
            self.next += STRIDE;
        }
        while words.get(self.next) == Some(&same) {
            self.next += 1;
        }
    }

    /// The next bit that differs from the one before it.
    #[inline]
    fn edge(&mut self) -> Option<u64> {
        while self.edges == 0 {
            if self.next == self.words.len() {
                return None;
            }
            self.load(u64::MAX);
            if self.edges == 0 {
                self.stride();
            }
        }
        let bit = u64::from(self.edges.trailing_zeros());
        self.edges &= self.edges - 1;
        Some((self.next as u64 - 1) * 64 + bit)
    }
}

impl Iterator for Runs<'_> {
    type Item = PageRange;

    #[inline]
    fn next(&mut self) -> Option<PageRange> {
        let first = self.edge()?;
        let end = self.edge().unwrap_or(self.end);
        Some(PageRange::new(first, end - first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_cover_exactly_the_set_bits_of_the_range(
            // Stretches of equal words, shorter and longer than a stride.
            words in proptest::collection::vec((prop_oneof![4 => Just(0u64), 4 => Just(u64::MAX), 1 => any::<u64>()], 1usize..30), 1..10),
            a in 0u64..19_200, b in 0u64..19_200,
        ) {
            let words: Vec<u64> = words.into_iter().flat_map(|(word, n)| std::iter::repeat_n(word, n)).collect();
            let top = words.len() as u64 * 64;
            let (a, b) = (a.min(b).min(top), a.max(b).min(top));
            let runs: Vec<_> = Runs::new(&words, a, b).collect();
            let got: Vec<u64> = runs.iter().flat_map(|r| r.first..r.end()).collect();
            let want: Vec<u64> = (a..b).filter(|&i| words[(i / 64) as usize] >> (i % 64) & 1 == 1).collect();
            prop_assert_eq!(got, want);
            for pair in runs.windows(2) {
                prop_assert!(pair[0].end() < pair[1].first, "runs that touch are one run");
            }
        }
    }
}
