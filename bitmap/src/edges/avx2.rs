//! Edges with AVX2.
//!
//! Which words of a block have edges at all is found four words at a time. How edges are then taken out of a word depends on
//! how many there are, as the last block told. Few: one by one, but always some without asking, since a branch that is
//! mispredicted costs more than three edges. Many: byte by byte, from a table of all bytes, and no branch at all.
#![allow(unsafe_code)] // vector loads and stores, and calls that are allowed where `Isa` has found AVX2

use std::arch::x86_64::{
    __m128i, __m256i, _mm_add_epi16, _mm_cvtepu8_epi16, _mm_cvtsi64_si128, _mm_set1_epi16,
    _mm_storeu_si128, _mm256_add_epi64, _mm256_castsi256_pd, _mm256_cmpeq_epi64,
    _mm256_cmpgt_epi64, _mm256_cvtepu16_epi64, _mm256_loadu_si256, _mm256_movemask_pd,
    _mm256_or_si256, _mm256_set1_epi64x, _mm256_setzero_si256, _mm256_slli_si256,
    _mm256_storeu_si256, _mm256_sub_epi64, _mm256_testz_si256, _mm256_xor_si256,
};

use super::{BLOCK, Edges, STEP, Window, edges_of};
use crate::PageRange;

/// For each byte the places of its set bits, as eight bytes of a word.
static PLACES: [u64; 256] = places();

const fn places() -> [u64; 256] {
    let mut all = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let (mut bit, mut found) = (0, 0);
        while bit < 8 {
            if byte >> bit & 1 == 1 {
                all[byte] |= bit << (8 * found);
                found += 1;
            }
            bit += 1;
        }
        byte += 1;
    }
    all
}

/// See [`Edges::scan`].
pub(super) fn scan(edges: &mut Edges, words: &[u64]) -> usize {
    // SAFETY: `Isa::Avx2` is there only where the machine has these instructions.
    unsafe { scan_with_avx2(edges, words) }
}

/// The runs between pairs of places that are counted from `base`.
pub(super) fn runs(pairs: &[[u16; 2]], base: u64, runs: &mut Vec<PageRange>) {
    // SAFETY: as in `scan`.
    unsafe { runs_with_avx2(pairs, base, runs) }
}

#[target_feature(enable = "avx2,bmi1,bmi2,popcnt")]
fn scan_with_avx2(edges: &mut Edges, words: &[u64]) -> usize {
    edges.walk(
        words,
        |words| quiet(words),
        |edges, window, at| block(edges, window, at),
    )
}

#[target_feature(enable = "avx2")]
#[inline]
fn load(words: &[u64; 4]) -> __m256i {
    // SAFETY: reads the four words, at any alignment.
    unsafe { _mm256_loadu_si256(words.as_ptr().cast()) }
}

/// See [`Edges::walk`]. A loop over short steps: in one that is unrolled over a block each of many loads goes ahead by blocks,
/// and these are more than a processor's prefetching follows.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn quiet(words: &[u64]) -> usize {
    let same = _mm256_set1_epi64x((words[0] >> 63).wrapping_neg().cast_signed());
    let (steps, _) = words[1..].as_chunks::<STEP>();
    let is_quiet = |step: &&[u64; STEP]| {
        let fours = step.as_chunks().0.iter();
        let other = fours.fold(_mm256_setzero_si256(), |other, four| {
            _mm256_or_si256(other, _mm256_xor_si256(same, load(four)))
        });
        _mm256_testz_si256(other, other) == 1
    };
    steps.iter().take_while(is_quiet).count() * STEP
}

/// A bit for each word of the block that has edges: that is not like the last bit before it.
#[target_feature(enable = "avx2")]
#[inline]
fn with_edges(window: &Window) -> u64 {
    let mut without = 0;
    let (before, here) = (window[..BLOCK].as_chunks().0, window[1..].as_chunks().0);
    for (n, (before, here)) in before.iter().zip(here).enumerate() {
        let last = _mm256_cmpgt_epi64(_mm256_setzero_si256(), load(before));
        let same = _mm256_cmpeq_epi64(last, load(here));
        let four = _mm256_movemask_pd(_mm256_castsi256_pd(same)).cast_unsigned();
        without |= u64::from(four) << (4 * n);
    }
    !without
}

/// Takes the edges of a block, which begins at the word `at` of the scan. Whether it has any.
#[target_feature(enable = "avx2,bmi1,bmi2,popcnt")]
#[inline]
fn block(edges: &mut Edges, window: &Window, at: usize) -> bool {
    let words = with_edges(window);
    if words == 0 {
        return false;
    }
    edges.make_room(words.count_ones() as usize);
    let before = edges.len;
    if edges.dense {
        many(edges, window, words, at);
    } else if words.count_ones() <= 16 {
        few::<2>(edges, window, words, at);
    } else {
        few::<4>(edges, window, words, at);
    }
    edges.dense = edges.len - before > 4 * words.count_ones() as usize;
    true
}

/// Takes the edges of `words` one by one, the first `AHEAD` of each word without asking whether there are so many.
#[target_feature(enable = "avx2,bmi1,bmi2,popcnt")]
#[inline]
#[allow(clippy::cast_possible_truncation)] // a scan is so long that the places of its bits fit
fn few<const AHEAD: usize>(edges: &mut Edges, window: &Window, mut words: u64, at: usize) {
    let mut len = edges.len;
    while words != 0 {
        let word = words.trailing_zeros() as usize;
        words &= words - 1;
        let base = ((at + word) * 64) as u16;
        let mut left = edges_of(window[word], window[word + 1]);
        let next = len + left.count_ones() as usize;
        let Some(places) = edges.places[len..].first_chunk_mut::<64>() else {
            unreachable!("room was made for all words");
        };
        for place in places.iter_mut().take(AHEAD) {
            *place = base.wrapping_add(left.trailing_zeros() as u16);
            left &= left.wrapping_sub(1);
        }
        let mut more = AHEAD;
        while left != 0 {
            places[more % 64] = base + left.trailing_zeros() as u16;
            left &= left - 1;
            more += 1;
        }
        len = next;
    }
    edges.len = len;
}

/// Takes the edges of `words` byte by byte: eight places at a time, of which the next byte's overwrite those that are none.
#[target_feature(enable = "avx2,bmi1,bmi2,popcnt")]
#[inline]
#[allow(clippy::cast_possible_truncation)] // as in `few`
fn many(edges: &mut Edges, window: &Window, mut words: u64, at: usize) {
    let mut len = edges.len;
    while words != 0 {
        let word = words.trailing_zeros() as usize;
        words &= words - 1;
        let base = _mm_set1_epi16((((at + word) * 64) as u16).cast_signed());
        let all = edges_of(window[word], window[word + 1]);
        let Some(places) = edges.places[len..].first_chunk_mut::<64>() else {
            unreachable!("room was made for all words");
        };
        macro_rules! byte {
            ($n:literal) => {{
                let before = (all & ((1 << (8 * $n)) - 1)).count_ones() as usize;
                let found = PLACES[(all >> (8 * $n)) as u8 as usize].cast_signed();
                let found = _mm_cvtepu8_epi16(_mm_cvtsi64_si128(found));
                let base = _mm_add_epi16(base, _mm_set1_epi16(8 * $n));
                store(places, before, _mm_add_epi16(found, base));
            }};
        }
        byte!(0);
        byte!(1);
        byte!(2);
        byte!(3);
        byte!(4);
        byte!(5);
        byte!(6);
        byte!(7);
        len += all.count_ones() as usize;
    }
    edges.len = len;
}

/// Writes eight places from `at` on.
#[target_feature(enable = "avx2")]
#[inline]
fn store(places: &mut [u16; 64], at: usize, eight: __m128i) {
    let to = &mut places[at..at + 8];
    // SAFETY: `to` has room for them, at any alignment.
    unsafe { _mm_storeu_si128(to.as_mut_ptr().cast(), eight) }
}

#[target_feature(enable = "avx2")]
fn runs_with_avx2(pairs: &[[u16; 2]], base: u64, runs: &mut Vec<PageRange>) {
    runs.reserve(pairs.len());
    let base_of_all = _mm256_set1_epi64x(base.cast_signed());
    let (twos, one) = pairs.as_chunks::<2>();
    let (room, _) = runs.spare_capacity_mut().as_chunks_mut::<2>();
    for (&[[a, b], [c, d]], room) in twos.iter().zip(room) {
        let places = u64::from(a) | u64::from(b) << 16 | u64::from(c) << 32 | u64::from(d) << 48;
        let places = _mm256_cvtepu16_epi64(_mm_cvtsi64_si128(places.cast_signed()));
        let places = _mm256_add_epi64(places, base_of_all);
        // From first and end to first and length.
        let firsts = _mm256_slli_si256::<8>(places);
        let two = _mm256_sub_epi64(places, firsts);
        // SAFETY: room for two page ranges, which are two words each in this order.
        unsafe { _mm256_storeu_si256(room.as_mut_ptr().cast(), two) }
    }
    // SAFETY: so many were reserved and have been written.
    unsafe { runs.set_len(runs.len() + 2 * twos.len()) }
    super::portable::runs(one, base, runs);
}
