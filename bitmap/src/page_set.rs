//! A set of pages that takes memory only where it is neither empty nor full.

use crate::bits::{masked_words, next_set};
use crate::mutant::{self, Mutant};
use crate::{PageBitmap, PageRange};

/// Words of a chunk: as many as a word has bits.
pub(crate) const WORDS: usize = 64;
/// Pages of a chunk: 16 MiB of guest memory, 512 bytes of bits.
pub(crate) const CHUNK: u64 = 64 * WORDS as u64;

type Bits = [u64; WORDS];

/// Some pages of a block, by chunks.
///
/// Invariants: a chunk has bits of its own while some of its pages are in the set and some are not, and at no other time;
/// bits past the last page are zero; `busy` has the chunks with a page in the set; what is spare is zero.
///
/// So a clean or a full chunk costs 10 bytes and a bit, any other one a bit a page and 16 bytes more; and who looks for
/// pages passes 64 clean chunks with each word of `busy`, 1 GiB of the guest.
#[derive(Debug)]
pub(crate) struct PageSet {
    pages: u64,
    /// Pages in the set.
    count: u64,
    /// The same for each chunk.
    counts: Vec<u16>,
    bits: Vec<Option<Box<Bits>>>,
    busy: PageBitmap,
    /// For chunks that come to need bits.
    #[allow(clippy::vec_box)] // they are handed on, not copied
    spare: Vec<Box<Bits>>,
}

/// A chunk, and some pages of it.
#[derive(Clone, Copy)]
struct Part {
    chunk: usize,
    range: PageRange,
}

impl PageSet {
    /// None of `pages` pages. Memory comes with the pages.
    #[allow(clippy::cast_possible_truncation)] // chunks of a set in memory
    pub(crate) fn new(pages: u64) -> Self {
        let chunks = pages.div_ceil(CHUNK);
        Self {
            pages,
            count: 0,
            counts: vec![0; chunks as usize],
            bits: vec![None; chunks as usize],
            busy: PageBitmap::new(chunks),
            spare: Vec::new(),
        }
    }

    /// All of `pages` pages.
    pub(crate) fn all(pages: u64) -> Self {
        let mut all = Self::new(pages);
        all.insert(PageRange::new(0, pages));
        all
    }

    /// Pages that could be in the set.
    pub(crate) const fn pages(&self) -> u64 {
        self.pages
    }

    /// Pages in the set.
    pub(crate) const fn count(&self) -> u64 {
        self.count
    }

    /// The pages of a chunk.
    fn whole(&self, chunk: usize) -> PageRange {
        let first = chunk as u64 * CHUNK;
        PageRange::new(first, CHUNK.min(self.pages - first))
    }

    fn is_full(&self, chunk: usize) -> bool {
        u64::from(self.counts[chunk]) == self.whole(chunk).pages
    }

    /// The bits of a chunk, to be changed; [`PageSet::settle`] has to follow.
    fn bits(&mut self, chunk: usize) -> &mut Bits {
        let full = self.is_full(chunk).then(|| self.whole(chunk).pages);
        let spare = &mut self.spare;
        self.bits[chunk].get_or_insert_with(|| {
            let mut bits = spare.pop().unwrap_or_else(|| Box::new([0; WORDS]));
            if let Some(pages) = full {
                masked_words(0, pages, |i, mask| bits[i] = mask);
            }
            bits
        })
    }

    /// A chunk has `set` pages now.
    fn settle(&mut self, chunk: usize, set: u16) {
        self.count = self.count - u64::from(self.counts[chunk]) + u64::from(set);
        self.counts[chunk] = set;
        let as_bit = PageRange::new(chunk as u64, 1);
        if set == 0 {
            self.busy.clear_range(as_bit);
        } else {
            self.busy.set_range(as_bit);
        }
        if (set == 0 || self.is_full(chunk))
            && let Some(mut bits) = self.bits[chunk].take()
        {
            if set != 0 {
                bits.fill(0);
            }
            self.spare.push(bits);
        }
    }

    /// A chunk is full now.
    #[allow(clippy::cast_possible_truncation)] // at most CHUNK
    fn fill(&mut self, chunk: usize) {
        self.settle(chunk, self.whole(chunk).pages as u16);
    }

    /// A chunk is empty now.
    fn empty(&mut self, chunk: usize) {
        if let Some(bits) = &mut self.bits[chunk] {
            bits.fill(0);
        }
        self.settle(chunk, 0);
    }

    /// `range`, chunk by chunk.
    ///
    /// # Panics
    /// When the range reaches past the set.
    #[allow(clippy::cast_possible_truncation)] // chunks of a set in memory
    fn parts(&self, range: PageRange) -> impl Iterator<Item = Part> + use<> {
        assert!(
            range.end() <= self.pages,
            "pages {range:?} of a set of {}",
            self.pages
        );
        let mut first = range.first;
        std::iter::from_fn(move || {
            (first < range.end()).then(|| {
                let chunk = first / CHUNK;
                let end = range.end().min((chunk + 1) * CHUNK);
                let range = PageRange::new(first, end - first);
                first = end;
                Part {
                    chunk: chunk as usize,
                    range,
                }
            })
        })
    }

    /// Puts a range into the set.
    ///
    /// # Panics
    /// When the range reaches past the set.
    pub(crate) fn insert(&mut self, range: PageRange) {
        for Part { chunk, range } in self.parts(range) {
            if self.is_full(chunk) {
                continue;
            }
            if range == self.whole(chunk) {
                self.fill(chunk);
                continue;
            }
            let mut set = self.counts[chunk];
            let bits = self.bits(chunk);
            masked_words(range.first % CHUNK, range.pages, |i, mask| {
                set += ones(mask & !bits[i]);
                bits[i] |= mask;
            });
            self.settle(chunk, set);
        }
    }

    /// Takes a range out of the set.
    ///
    /// # Panics
    /// When the range reaches past the set.
    pub(crate) fn remove(&mut self, range: PageRange) {
        for Part { chunk, range } in self.parts(range) {
            if self.counts[chunk] == 0 {
                continue;
            }
            if range == self.whole(chunk) {
                self.empty(chunk);
                continue;
            }
            let mut set = self.counts[chunk];
            let bits = self.bits(chunk);
            masked_words(range.first % CHUNK, range.pages, |i, mask| {
                set -= ones(mask & bits[i]);
                bits[i] &= !mask;
            });
            self.settle(chunk, set);
        }
    }

    /// Puts the pages of some words of a chunk into the set, those in `which`. Bit `n` of `words` is page `n` of the block.
    ///
    /// # Panics
    /// When a word lies outside the set or `words`.
    pub(crate) fn insert_words(&mut self, chunk: usize, which: u64, words: &[u64]) {
        if self.is_full(chunk) {
            return;
        }
        let words = &words[chunk * WORDS..];
        let mut set = self.counts[chunk];
        let bits = self.bits(chunk);
        for i in ones_of(which) {
            let new = words[i] & !bits[i];
            set += ones(new);
            bits[i] |= new;
        }
        self.settle(chunk, set);
    }

    /// The first chunk from `chunk` on that has a page in the set.
    fn busy_from(&self, chunk: u64) -> Option<u64> {
        next_set(self.busy.words(), chunk, self.busy.pages())
    }

    /// Moves pages of `range` that `to` does not have to `to`, a set of the same block, in order and at most `max`. `each`
    /// gets them as runs, of which several may follow each other. Returns how many were moved.
    ///
    /// # Panics
    /// When the range reaches past a set.
    pub(crate) fn move_to(
        &mut self,
        to: &mut Self,
        range: PageRange,
        max: u64,
        mut each: impl FnMut(PageRange),
    ) -> u64 {
        let mut left = max;
        let mut next = range.first;
        while left > 0
            && next < range.end()
            && let Some(busy) = self.busy_from(next / CHUNK)
        {
            let first = next.max(busy * CHUNK);
            next = (busy + 1) * CHUNK;
            let end = next.min(range.end());
            if first < end {
                for part in self.parts(PageRange::new(first, end - first)) {
                    left -= self.move_part(to, part, left, &mut each);
                }
            }
        }
        max - left
    }

    /// As [`PageSet::move_to`], within a chunk.
    fn move_part(
        &mut self,
        to: &mut Self,
        Part { chunk, range }: Part,
        max: u64,
        each: &mut impl FnMut(PageRange),
    ) -> u64 {
        let whole = self.whole(chunk) == range && range.pages <= max;
        if whole && self.is_full(chunk) && to.counts[chunk] == 0 {
            self.empty(chunk);
            to.fill(chunk);
            each(range);
            return range.pages;
        }
        let (mine, others) = (self.counts[chunk], to.counts[chunk]);
        let (from, into) = (self.bits(chunk), to.bits(chunk));
        let mut moved = 0;
        masked_words(range.first % CHUNK, range.pages, |i, mask| {
            let room = max - u64::from(moved);
            if from[i] & mask == 0 || room == 0 {
                return;
            }
            let both = if mutant::is_planted(Mutant::LeasedTwice) {
                0
            } else {
                into[i]
            };
            let free = lowest(from[i] & mask & !both, room);
            from[i] &= !free;
            into[i] |= free;
            moved += ones(free);
            let first = range.first / CHUNK * CHUNK + i as u64 * 64;
            runs(free, |start, pages| {
                each(PageRange::new(first + start, pages))
            });
        });
        self.settle(chunk, mine - moved);
        to.settle(chunk, others + moved);
        u64::from(moved)
    }

    /// Puts the pages of this set into a bitmap of the same block.
    ///
    /// # Panics
    /// When the bitmap is shorter.
    #[allow(clippy::cast_possible_truncation)] // chunks of a set in memory
    pub(crate) fn or_into(&self, bitmap: &mut PageBitmap) {
        let mut next = 0;
        while let Some(busy) = self.busy_from(next) {
            let range = self.whole(busy as usize);
            match &self.bits[busy as usize] {
                Some(bits) => {
                    let done = bitmap.or_words_at(range, &**bits, 0);
                    assert!(done.is_ok(), "a bitmap of another block");
                }
                None => bitmap.set_range(range),
            }
            next = busy + 1;
        }
    }
}

/// Number of bits set.
#[allow(clippy::cast_possible_truncation)] // at most 64
const fn ones(word: u64) -> u16 {
    word.count_ones() as u16
}

/// Places of the bits set.
pub(crate) fn ones_of(mut word: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let place = word.trailing_zeros();
        word &= word.wrapping_sub(1);
        (place < u64::BITS).then_some(place as usize)
    })
}

/// The `n` lowest bits set of a word, or all.
fn lowest(word: u64, n: u64) -> u64 {
    if u64::from(ones(word)) <= n {
        return word;
    }
    let above = (0..n).fold(word, |rest, _| rest & (rest - 1));
    word & !above
}

/// The runs of set bits in a word: first bit and length.
fn runs(mut word: u64, mut each: impl FnMut(u64, u64)) {
    while word != 0 {
        let first = word.trailing_zeros();
        let pages = (word >> first).trailing_ones();
        each(u64::from(first), u64::from(pages));
        word &= word.wrapping_add(1 << first);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Two chunks and a bit, so that the last one ends within a word.
    const PAGES: u64 = 2 * CHUNK + 100;

    #[derive(Clone, Debug)]
    enum Step {
        Insert(PageRange),
        Remove(PageRange),
        InsertWords(usize, u64, u64),
        Move(PageRange, u64),
    }

    fn range() -> impl Strategy<Value = PageRange> {
        let edges = (0..=PAGES, 0..=PAGES).prop_map(|(a, b)| (a.min(b), a.max(b)));
        let chunks = (0..=2u64, 1..=3u64).prop_map(|(a, n)| (a * CHUNK, (a + n) * CHUNK));
        prop_oneof![edges, chunks].prop_map(|(first, end)| {
            let end = end.min(PAGES);
            PageRange::new(first, end - first)
        })
    }

    fn step() -> impl Strategy<Value = Step> {
        let word = prop_oneof![any::<u64>(), Just(u64::MAX), Just(0), Just(1 << 63)];
        let most = prop_oneof![0..300u64, Just(u64::MAX)];
        prop_oneof![
            range().prop_map(Step::Insert),
            range().prop_map(Step::Remove),
            (0..2usize, any::<u64>(), word)
                .prop_map(|(chunk, which, word)| Step::InsertWords(chunk, which, word)),
            (range(), most).prop_map(|(range, most)| Step::Move(range, most)),
        ]
    }

    /// What a set says of itself, and that it says so in the least memory.
    fn pages_of(set: &PageSet) -> BTreeSet<u64> {
        let mut bitmap = PageBitmap::new(PAGES);
        set.or_into(&mut bitmap);
        let pages: BTreeSet<u64> = bitmap.runs().flat_map(|r| r.first..r.end()).collect();
        assert_eq!(set.count(), pages.len() as u64);
        for (chunk, bits) in set.bits.iter().enumerate() {
            let whole = set.whole(chunk);
            let here = pages.range(whole.first..whole.end()).count() as u64;
            assert_eq!(u64::from(set.counts[chunk]), here);
            assert_eq!(bits.is_some(), here > 0 && here < whole.pages);
            assert_eq!(set.busy.get(chunk as u64), here > 0);
        }
        let clean = |bits: &Bits| bits.iter().all(|&word| word == 0);
        assert!(set.spare.iter().all(|bits| clean(bits)));
        pages
    }

    proptest! {
        #[test]
        fn a_set_of_pages_is_what_a_plain_set_of_numbers_is(
            steps in proptest::collection::vec(step(), 1..24),
        ) {
            let (mut set, mut other) = (PageSet::new(PAGES), PageSet::all(PAGES));
            let (mut want, mut want_other): (BTreeSet<u64>, BTreeSet<u64>) = (BTreeSet::new(), (0..PAGES).collect());
            for step in steps {
                match step {
                    Step::Insert(range) => {
                        set.insert(range);
                        want.extend(range.first..range.end());
                    }
                    Step::Remove(range) => {
                        for (set, want) in [(&mut set, &mut want), (&mut other, &mut want_other)] {
                            set.remove(range);
                            want.retain(|p| !(range.first..range.end()).contains(p));
                        }
                    }
                    Step::InsertWords(chunk, which, word) => {
                        set.insert_words(chunk, which, &[word; 2 * WORDS]);
                        let pages = set.whole(chunk);
                        let chosen = |p: &u64| which >> (p / 64 % 64) & 1 == 1 && word >> (p % 64) & 1 == 1;
                        want.extend((pages.first..pages.end()).filter(chosen));
                    }
                    Step::Move(range, most) => {
                        let mut moved = Vec::new();
                        let count = set.move_to(&mut other, range, most, |run| moved.push(run));
                        let free = (range.first..range.end())
                            .filter(|p| want.contains(p) && !want_other.contains(p));
                        let free: Vec<u64> = free.take(usize::try_from(most).unwrap_or(usize::MAX)).collect();
                        prop_assert_eq!(count, free.len() as u64);
                        let moved: Vec<u64> = moved.iter().flat_map(|r| r.first..r.end()).collect();
                        prop_assert_eq!(&moved, &free);
                        for page in free {
                            want.remove(&page);
                            want_other.insert(page);
                        }
                    }
                }
                prop_assert_eq!(pages_of(&set), want.clone());
                prop_assert_eq!(pages_of(&other), want_other.clone());
            }
        }
    }

    #[test]
    fn a_set_that_was_emptied_or_filled_in_pieces_needs_no_more_chunks_than_before() {
        let mut set = PageSet::new(8 * CHUNK);
        for _ in 0..3 {
            (0..8).for_each(|n| set.insert(PageRange::new(n * CHUNK + 7, 1)));
            (0..8).for_each(|n| set.remove(PageRange::new(n * CHUNK, 8)));
            assert_eq!((set.count(), set.spare.len()), (0, 8));
        }
    }
}
