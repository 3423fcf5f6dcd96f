//! Edges: bits that differ from the bit before them. What lies between two of them is a run, or a gap.
//!
//! All edges of a word come from one exclusive or of the word with itself, moved on by a bit. So a dense word is as cheap as a
//! sparse one, and a word that is like the last bit before it has none: all clear or all set, it is passed over.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use crate::PageRange;
use crate::isa::Isa;

/// Words that are looked at together.
pub(crate) const BLOCK: usize = 64;
/// A block, and the word before it: its last bit says whether the first bit of the block is an edge.
pub(crate) type Window = [u64; BLOCK + 1];
/// Words that are passed over together where they have no edges.
const STEP: usize = 16;
/// Words of a scan at most, so that places in it fit 16 bits.
const SCAN: usize = 1024;
/// Edges that are enough for a scan to stop, so that they and their runs stay in the nearest cache.
const ENOUGH: usize = 1024;
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
    /// Takes the edges of `words[1..]`, which is a block or more, after `words[0]`; returns the number of words that it took.
    /// Of a single block it takes all; of more it leaves what is less than one, and stops early when it has found enough.
    pub(crate) fn scan(&mut self, isa: Isa, words: &[u64]) -> usize {
        match isa {
            Isa::Portable => portable::scan(self, words),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::scan(self, words),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::scan(self, words),
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
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::runs(pairs, base, runs),
        }
    }

    /// The run that nothing has ended, if there is one.
    pub(crate) fn take_open(&mut self) -> Option<u64> {
        self.open.take()
    }

    /// What all scans do. `quiet` tells how many of the words after the first one, by steps, have no edges; `block` takes the
    /// edges of a block that begins at a place of the scan, and tells whether there are any.
    #[inline(always)]
    fn walk(
        &mut self,
        words: &[u64],
        quiet: impl Fn(&[u64]) -> usize,
        block: impl Fn(&mut Self, &Window, usize) -> bool,
    ) -> usize {
        let words = &words[..words.len().min(SCAN + 1)];
        let last_block = words.len().saturating_sub(1 + BLOCK);
        let mut at = 0;
        // What has edges is followed by what has some, and to ask twice costs more than it saves.
        let mut is_quiet = true;
        while self.len < ENOUGH && at <= last_block {
            if is_quiet {
                at += quiet(&words[at..]);
                if at + 1 == words.len() {
                    break;
                }
                at = at.min(last_block);
            }
            let Some(window) = words[at..].first_chunk() else {
                break;
            };
            is_quiet = !block(self, window, at);
            at += BLOCK;
        }
        at
    }

    /// Sees to it that there is room for the edges of a block in which so many words have some: not much more than that, since
    /// most bitmaps are small and most words clean.
    #[inline]
    fn make_room(&mut self, words: usize) {
        let room = self.len + words * 64 + SLACK;
        if self.places.len() < room {
            self.grow(room);
        }
    }

    #[cold]
    fn grow(&mut self, room: usize) {
        self.places.resize(room.next_power_of_two(), 0);
    }
}
