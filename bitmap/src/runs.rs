//! Runs of set bits.

use crate::PageRange;
use crate::edges::{BLOCK, Edges, Window};
use crate::isa::Isa;

/// Bytes of a cache line.
const LINE: usize = 64;

/// The runs of set bits in a bitmap, in order: an iterator whose cost follows words and runs, never set bits.
///
/// Runs are found many at a time, by the widest instructions that the machine has. [`Runs::batch`] hands them out so, and
/// what an iterator does as a whole (`for_each`, `collect`, `sum`) goes by batches too.
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    /// Up to the word of the last bit.
    words: &'a [u64],
    /// The word to look at next.
    next: usize,
    /// The range's first word, and what of it belongs to the range.
    head: (usize, u64),
    /// What of the last word belongs to the range.
    tail: u64,
    /// Bit after the last one.
    end: u64,
    isa: Isa,
    edges: Edges,
    /// Runs that are found, and how many of them have been handed out.
    batch: Vec<PageRange>,
    given: usize,
}

impl<'a> Runs<'a> {
    /// Runs among the bits `first..end` of `words`.
    ///
    /// # Panics
    /// When `end` lies outside `words`.
    #[must_use]
    pub fn new(words: &'a [u64], first: u64, end: u64) -> Self {
        Self::with(Isa::best(), words, first, end)
    }

    #[allow(clippy::cast_possible_truncation)] // word indices of a slice in memory
    fn with(isa: Isa, words: &'a [u64], first: u64, end: u64) -> Self {
        assert!(end <= words.len() as u64 * 64, "range outside the bitmap");
        let used = if first < end { end.div_ceil(64) } else { 0 };
        let next = if first < end { first / 64 } else { 0 } as usize;
        Self {
            words: &words[..used as usize],
            next,
            head: (next, u64::MAX << (first % 64)),
            tail: u64::MAX >> (end.wrapping_neg() % 64),
            end,
            isa,
            edges: Edges::default(),
            batch: Vec::new(),
            given: 0,
        }
    }

    /// Some of the runs that are left, in order; none when there are no more. The fastest way to all of them: a batch
    /// is found at once and stays in the nearest cache.
    pub fn batch(&mut self) -> &[PageRange] {
        if self.given == self.batch.len() {
            self.find();
        }
        let from = std::mem::replace(&mut self.given, self.batch.len());
        &self.batch[from..]
    }

    /// Finds the next batch.
    #[cold]
    fn find(&mut self) {
        self.batch.clear();
        self.given = 0;
        while self.batch.is_empty() && self.next < self.words.len() {
            let base = self.next as u64 * 64;
            // Whole blocks, with the word before them, are looked at where they are. The words at both ends of
            // the range are not wholly part of it, so they are copied.
            let inner = self.words.len() - 1 - self.next;
            if self.next > self.head.0 && inner >= BLOCK {
                let words = &self.words[self.next - 1..self.words.len() - 1];
                self.next += self.edges.scan(self.isa, words);
            } else {
                let window = self.window();
                self.edges.scan(self.isa, &window);
            }
            self.edges.take_runs(self.isa, base, &mut self.batch);
        }
        if self.next == self.words.len()
            && let Some(first) = self.edges.take_open()
        {
            self.batch.push(PageRange::new(first, self.end - first));
        }
    }

    /// Copies the next words, up to a block's and to where a cache line begins, and passes them: blocks that are looked at
    /// where they are then touch no line twice.
    fn window(&mut self) -> Window {
        let mut window = [0; BLOCK + 1];
        let (first, mask) = self.head;
        if self.next > first {
            window[0] = self.words[self.next - 1];
        }
        let left = &self.words[self.next..];
        // Words past a cache line's beginning that a whole block would end with.
        let odd = left.as_ptr().align_offset(LINE).wrapping_neg() % (LINE / size_of::<u64>());
        let most = BLOCK - if left.len() > 2 * BLOCK { odd } else { 0 };
        let end = self.words.len().min(self.next + most);
        let words = &self.words[self.next..end];
        window[1..=words.len()].copy_from_slice(words);
        if self.next == first {
            window[1] &= mask;
        }
        if end == self.words.len() {
            window[words.len()] &= self.tail;
        }
        // No edge where nothing is known.
        let last = (window[words.len()] >> 63).wrapping_neg();
        window[1 + words.len()..].fill(last);
        self.next = end;
        window
    }
}

impl Iterator for Runs<'_> {
    type Item = PageRange;

    #[inline]
    fn next(&mut self) -> Option<PageRange> {
        if self.given == self.batch.len() {
            self.find();
        }
        let run = *self.batch.get(self.given)?;
        self.given += 1;
        Some(run)
    }

    fn fold<B, F: FnMut(B, PageRange) -> B>(mut self, init: B, mut f: F) -> B {
        let mut all = init;
        loop {
            let batch = self.batch();
            if batch.is_empty() {
                return all;
            }
            all = batch.iter().copied().fold(all, &mut f);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Stretches of words that are alike, shorter and longer than a block.
    fn bitmap() -> impl Strategy<Value = Vec<u64>> {
        let any_bits = any::<u64>();
        let sparse =
            (any_bits, any_bits, any_bits, any_bits).prop_map(|(a, b, c, d)| a & b & c & d);
        let word = prop_oneof![
            4 => Just(0),
            4 => Just(u64::MAX),
            1 => any_bits,
            1 => sparse,
            1 => (0u32..64).prop_map(|bit| 1 << bit),
            1 => Just(0x5555_5555_5555_5555),
        ];
        let stretch = prop_oneof![4 => 1usize..30, 1 => 60usize..200, 1 => Just(1100)];
        proptest::collection::vec((word, stretch), 1..10).prop_map(|stretches| {
            let words = stretches.into_iter();
            words
                .flat_map(|(word, n)| std::iter::repeat_n(word, n))
                .collect()
        })
    }

    /// Bit by bit.
    fn oracle(words: &[u64], first: u64, end: u64) -> Vec<PageRange> {
        let mut runs: Vec<PageRange> = Vec::new();
        for bit in first..end {
            if words[(bit / 64) as usize] >> (bit % 64) & 1 == 1 {
                match runs.last_mut() {
                    Some(run) if run.end() == bit => run.pages += 1,
                    _ => runs.push(PageRange::new(bit, 1)),
                }
            }
        }
        runs
    }

    proptest! {
        #[test]
        fn every_instruction_set_finds_the_runs_that_a_look_at_each_bit_finds(
            words in bitmap(), random in proptest::collection::vec(any::<u64>(), 0..200),
            a in 0u64..100_000, b in 0u64..100_000, step in 1usize..5, skip in 0usize..8,
        ) {
            let mut words = words;
            for (at, bits) in random.into_iter().enumerate() {
                let place = at * step % words.len();
                words[place] = bits;
            }
            // Lines of the cache begin at any of its words.
            let words = &words[skip.min(words.len())..];
            let top = words.len() as u64 * 64;
            let (a, b) = (a.min(b).min(top), a.max(b).min(top));
            for (first, end) in [(a, b), (0, top), (a, top), (a, a)] {
                let want = oracle(words, first, end);
                for isa in Isa::here() {
                    let one_by_one: Vec<_> = {
                        let mut runs = Runs::with(isa, words, first, end);
                        std::iter::from_fn(|| runs.next()).collect()
                    };
                    prop_assert_eq!(&one_by_one, &want, "{:?}", isa);
                    let mut runs = Runs::with(isa, words, first, end);
                    let begun: Vec<_> = runs.by_ref().take(3).collect();
                    let rest = runs.fold(begun, |mut all, run| { all.push(run); all });
                    prop_assert_eq!(&rest, &want, "{:?} by batches", isa);
                }
            }
        }
    }
}
