//! Runs of set bits, found word by word.

use crate::PageRange;

/// The runs of set bits in a bitmap, in order: an iterator whose cost follows words and runs, never set bits.
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    words: &'a [u64],
    /// Next bit to look at.
    at: u64,
    /// Bit after the last one.
    end: u64,
}

impl<'a> Runs<'a> {
    /// Runs among the bits `first..end` of `words`.
    ///
    /// # Panics
    /// When `end` lies outside `words`.
    #[must_use]
    pub fn new(words: &'a [u64], first: u64, end: u64) -> Self {
        assert!(end <= words.len() as u64 * 64, "range outside the bitmap");
        Self {
            words,
            at: first,
            end,
        }
    }

    /// The first bit at or after `from` whose value is `set`, or `end`.
    #[allow(clippy::cast_possible_truncation)] // word indices of a slice in memory
    fn seek(&self, from: u64, set: bool) -> u64 {
        let flip = if set { 0 } else { u64::MAX };
        let mut i = (from / 64) as usize;
        if from >= self.end {
            return self.end;
        }
        let mut word = (self.words[i] ^ flip) & (u64::MAX << (from % 64));
        let last = ((self.end - 1) / 64) as usize;
        while word == 0 {
            i += 1;
            if i > last {
                return self.end;
            }
            word = self.words[i] ^ flip;
        }
        (i as u64 * 64 + u64::from(word.trailing_zeros())).min(self.end)
    }
}

impl Iterator for Runs<'_> {
    type Item = PageRange;

    fn next(&mut self) -> Option<PageRange> {
        let first = self.seek(self.at, true);
        if first >= self.end {
            self.at = self.end;
            return None;
        }
        self.at = self.seek(first, false);
        Some(PageRange::new(first, self.at - first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_cover_exactly_the_set_bits_of_the_range(
            words in proptest::collection::vec(prop_oneof![Just(0u64), Just(u64::MAX), any::<u64>()], 1..6),
            a in 0u64..384, b in 0u64..384,
        ) {
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
