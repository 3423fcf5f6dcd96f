//! Edges: bits that differ from the bit before them. What lies between two of them is a run, or a gap.
//!
//! All edges of a word come from one exclusive or of the word with itself, moved on by a bit. So a dense word is as cheap as a
//! sparse one, and a word that is like the last bit before it has none: all clear or all set, it is passed over.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod portable;

use crate::PageRange;
use crate::isa::Isa;

/// Words that are looked at together.
pub(crate) const BLOCK: usize = 64;
/// A block, and the word before it: its last bit says whether the first bit of the block is an edge.
pub(crate) type Window = [u64; BLOCK + 1];
/// Words of a scan at most, so that places in it fit 16 bits.
const SCAN: usize = 1024;
/// Edges that are enough for a scan to stop, so that they and their runs stay in the nearest cache.
const ENOUGH: usize = 512;
/// Places that a kernel may write past the edges there are: those that a whole word could have.
const SLACK: usize = 64;

/// Edges found, as places that are counted from the start of the scan.
#[derive(Clone, Debug, Default)]
pub(crate) struct Edges {
    /// Room for what a scan may find; nothing until there is something to be found.
    places: Vec<u16>,
    len: usize,
    /// The run that has begun and not yet ended, by its first bit.
    open: Option<u64>,
    /// Whether the last block had many edges a word: the next one will be like it.
    dense: bool,
}

/// The edges of `word`, with the last bit of the word `before` it.
pub(crate) const fn edges_of(before: u64, word: u64) -> u64 {
    // Moved on by rotating: a shift over two words is an instruction that many processors are slow at.
    word ^ word.rotate_left(1) ^ (word ^ before) >> 63
}

impl Edges {
    /// Takes the edges of `words[1..]`, which is whole blocks, after `words[0]`; returns the number of words that it took. It
    /// stops early when it has found enough.
    pub(crate) fn scan(&mut self, isa: Isa, words: &[u64]) -> usize {
        match isa {
            Isa::Portable => portable::scan(self, words),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::scan(self, words),
        }
    }

    /// Moves the runs that are complete to `runs`; the scan began at the bit `base`.
    pub(crate) fn take_runs(&mut self, isa: Isa, base: u64, runs: &mut Vec<PageRange>) {
        let mut places = &self.places[..self.len];
        self.len = 0;
        if let (Some(first), Some((&end, rest))) = (self.open, places.split_first()) {
            runs.push(PageRange::new(first, base + u64::from(end) - first));
            self.open = None;
            places = rest;
        }
        let (pairs, odd) = places.as_chunks::<2>();
        if let [first] = odd {
            self.open = Some(base + u64::from(*first));
        }
        match isa {
            Isa::Portable => portable::runs(pairs, base, runs),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::runs(pairs, base, runs),
        }
    }

    /// The run that nothing has ended, if there is one.
    pub(crate) fn take_open(&mut self) -> Option<u64> {
        self.open.take()
    }

    /// Sees to it that there is room for the edges of a block: at first just enough, since most bitmaps are small.
    #[inline]
    fn make_room(&mut self, window: &Window) {
        let full = ENOUGH + BLOCK * 64 + SLACK;
        if self.places.len() == full {
            return;
        }
        let room = if self.places.is_empty() {
            let edges = |pair: &[u64]| edges_of(pair[0], pair[1]).count_ones() as usize;
            window.windows(2).map(edges).sum::<usize>() + SLACK
        } else {
            full
        };
        self.places.resize(room, 0);
    }
}
