//! Other ways to do what the kernels do: shapes that are in use elsewhere, written here from the idea.

use bitvec::prelude::{BitSlice, Lsb0};
use gleaner_bitmap::PageRange;

/// Runs that a buffer takes before it is handed on: it stays in a near cache.
const BUFFER: usize = 4096;

/// A buffer that is handed on when it is full, and used again.
struct Buffer<'a> {
    runs: &'a mut Vec<PageRange>,
    each: &'a mut dyn FnMut(&[PageRange]),
}

impl Buffer<'_> {
    #[inline(always)]
    fn push(&mut self, run: PageRange) {
        self.runs.push(run);
        if self.runs.len() == BUFFER {
            self.hand_on();
        }
    }

    fn hand_on(&mut self) {
        (self.each)(self.runs);
        self.runs.clear();
    }
}

/// The positions of set bits, one after the other.
fn positions(words: &[u64]) -> impl Iterator<Item = u64> {
    (0..).step_by(64).zip(words).flat_map(|(base, word)| {
        let mut left = *word;
        std::iter::from_fn(move || {
            (left != 0).then(|| {
                let bit = u64::from(left.trailing_zeros());
                left &= left - 1;
                base + bit
            })
        })
    })
}

/// Positions, each of which makes the last run longer or begins a new one.
#[inline(always)]
fn coalesce(positions: impl Iterator<Item = u64>, mut push: impl FnMut(PageRange)) {
    let mut run = PageRange::new(0, 0);
    for bit in positions {
        if bit == run.end() {
            run.pages += 1;
        } else {
            if run.pages > 0 {
                push(run);
            }
            run = PageRange::new(bit, 1);
        }
    }
    if run.pages > 0 {
        push(run);
    }
}

/// Cloud Hypervisor's shape: an iterator over the positions of set bits, neighbours coalesced, collected into a table.
pub fn runs_by_positions(words: &[u64]) -> Vec<PageRange> {
    let mut table = Vec::new();
    coalesce(positions(words), |run| table.push(run));
    table
}

/// The same without its table: into a buffer that is used again.
pub fn runs_by_positions_buffered(
    words: &[u64],
    runs: &mut Vec<PageRange>,
    each: &mut dyn FnMut(&[PageRange]),
) {
    let mut buffer = Buffer { runs, each };
    coalesce(positions(words), |run| buffer.push(run));
    buffer.hand_on();
}

/// bitvec's positions of set bits, coalesced into a buffer that is used again.
pub fn runs_by_bitvec(
    words: &[u64],
    runs: &mut Vec<PageRange>,
    each: &mut dyn FnMut(&[PageRange]),
) {
    let mut buffer = Buffer { runs, each };
    let ones = BitSlice::<_, Lsb0>::from_slice(words).iter_ones();
    coalesce(ones.map(|bit| bit as u64), |run| buffer.push(run));
    buffer.hand_on();
}

/// A tight loop over all bits, into a buffer that is used again.
pub fn runs_by_bits(words: &[u64], runs: &mut Vec<PageRange>, each: &mut dyn FnMut(&[PageRange])) {
    let mut buffer = Buffer { runs, each };
    let (mut open, mut first) = (false, 0);
    for (base, word) in (0..).step_by(64).zip(words) {
        for bit in 0..64 {
            let set = word >> bit & 1 == 1;
            if set != open {
                if set {
                    first = base + bit;
                } else {
                    buffer.push(PageRange::new(first, base + bit - first));
                }
                open = set;
            }
        }
    }
    if open {
        buffer.push(PageRange::new(first, words.len() as u64 * 64 - first));
    }
    buffer.hand_on();
}

/// OR of `src` into `dst` from bit `at` on, by a loop over the set bits.
pub fn or_by_set_bits(dst: &mut [u64], at: u64, src: &[u64]) {
    for bit in positions(src) {
        dst[((at + bit) / 64) as usize] |= 1 << ((at + bit) % 64);
    }
}

/// QEMU's shape of a shifted OR: word by word, of which each goes into two. `at` is not a multiple of 64.
pub fn or_by_words(dst: &mut [u64], at: u64, src: &[u64]) {
    let (first, shift) = ((at / 64) as usize, at % 64);
    for (i, word) in src.iter().enumerate() {
        dst[first + i] |= word << shift;
        dst[first + i + 1] |= word >> (64 - shift);
    }
}

/// bitvec's OR of one slice into a shifted one.
pub fn or_by_bitvec(dst: &mut [u64], at: u64, src: &[u64]) {
    let src = BitSlice::<_, Lsb0>::from_slice(src);
    let dst = BitSlice::<_, Lsb0>::from_slice_mut(dst);
    dst[at as usize..at as usize + src.len()] |= src;
}
