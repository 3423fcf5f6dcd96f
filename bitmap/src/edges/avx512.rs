//! Edges with AVX-512.
//!
//! A vector holds eight words, so all edges of a block are made at once. They are taken out of a word without asking how many
//! there are: the places of all bits of a word are known, and one instruction keeps those at which a bit is set.
#![allow(unsafe_code)] // vector loads and stores, and calls that are allowed where `Isa` has found AVX-512

use std::arch::x86_64::{
    __m512i, _mm_loadu_si128, _mm256_add_epi16, _mm256_cvtepu8_epi16, _mm256_set1_epi16,
    _mm256_storeu_si256, _mm512_add_epi16, _mm512_add_epi64, _mm512_alignr_epi64,
    _mm512_bslli_epi128, _mm512_castsi512_si128, _mm512_castsi512_si256, _mm512_cvtepu8_epi16,
    _mm512_cvtepu16_epi64, _mm512_extracti64x4_epi64, _mm512_loadu_si512,
    _mm512_maskz_compress_epi8, _mm512_set1_epi16, _mm512_set1_epi64, _mm512_shldi_epi64,
    _mm512_storeu_si512, _mm512_sub_epi64, _mm512_test_epi64_mask, _mm512_xor_si512,
};

use super::avx2::quiet;
use super::{BLOCK, Edges, Window};
use crate::PageRange;

/// The place of each bit of a word.
static PLACES: [u8; 64] = places();

const fn places() -> [u8; 64] {
    let mut all = [0; 64];
    let mut bit = 0;
    while bit < 64 {
        all[bit as usize] = bit;
        bit += 1;
    }
    all
}

/// See [`Edges::scan`].
pub(super) fn scan(edges: &mut Edges, words: &[u64]) -> usize {
    // SAFETY: `Isa::Avx512` is there only where the machine has these instructions.
    unsafe { scan_with_avx512(edges, words) }
}

/// The runs between pairs of places that are counted from `base`.
pub(super) fn runs(pairs: &[[u16; 2]], base: u64, runs: &mut Vec<PageRange>) {
    // SAFETY: as in `scan`.
    unsafe { runs_with_avx512(pairs, base, runs) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,bmi1,bmi2,popcnt")]
fn scan_with_avx512(edges: &mut Edges, words: &[u64]) -> usize {
    edges.walk(
        words,
        |words| quiet(words),
        |edges, window, at| block(edges, window, at),
    )
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load(words: &[u64; 8]) -> __m512i {
    // SAFETY: reads the eight words, at any alignment.
    unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
}

/// Takes the edges of a block, which begins at the word `at` of the scan. Whether it has any.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,bmi1,bmi2,popcnt")]
#[inline]
#[allow(clippy::cast_possible_truncation)] // a scan is so long that the places of its bits fit
fn block(edges: &mut Edges, window: &Window, at: usize) -> bool {
    let mut found = [[0; 8]; BLOCK / 8];
    // A bit for each word that has edges. Moved along, since the compiler makes a slow vector of masks that are put together.
    let mut words = 0;
    let mut last = _mm512_set1_epi64(window[0].cast_signed());
    for (found, here) in found.iter_mut().zip(window[1..].as_chunks().0) {
        let here = load(here);
        let before = _mm512_alignr_epi64::<7>(here, last);
        last = here;
        // Each bit beside the one before it.
        let edges = _mm512_xor_si512(here, _mm512_shldi_epi64::<1>(here, before));
        words = words >> 8 | u64::from(_mm512_test_epi64_mask(edges, edges)) << 56;
        store(found, edges);
    }
    if words == 0 {
        return false;
    }
    edges.make_room(words.count_ones() as usize);
    let (found, places, mut len) = (found.as_flattened(), &mut *edges.places, edges.len);
    while words != 0 {
        let word = words.trailing_zeros() as usize;
        words &= words - 1;
        let Some(room) = places[len..].first_chunk_mut() else {
            unreachable!("room was made for all words");
        };
        put(room, found[word], ((at + word) * 64) as u16);
        len += found[word].count_ones() as usize;
    }
    edges.len = len;
    true
}

/// Writes eight words.
#[target_feature(enable = "avx512f")]
#[inline]
fn store(to: &mut [u64; 8], words: __m512i) {
    // SAFETY: `to` has room for them, at any alignment.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), words) }
}

/// Writes the places of the set bits of a word that begins at the place `base`. What it writes past them is for the next
/// word's to overwrite.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")]
#[inline]
fn put(room: &mut [u16; 64], bits: u64, base: u16) {
    // SAFETY: reads as many bytes as there are, at any alignment.
    let all = unsafe { _mm512_loadu_si512(PLACES.as_ptr().cast()) };
    let places = _mm512_maskz_compress_epi8(bits, all);
    let base = base.cast_signed();
    if bits.count_ones() <= 16 {
        let places = _mm256_cvtepu8_epi16(_mm512_castsi512_si128(places));
        let places = _mm256_add_epi16(places, _mm256_set1_epi16(base));
        // SAFETY: room for 64 places, of which these are 16, at any alignment.
        unsafe { _mm256_storeu_si256(room.as_mut_ptr().cast(), places) }
    } else {
        let base = _mm512_set1_epi16(base);
        let halves = [
            _mm512_castsi512_si256(places),
            _mm512_extracti64x4_epi64::<1>(places),
        ];
        for (half, room) in halves.into_iter().zip(room.as_chunks_mut::<32>().0) {
            let places = _mm512_add_epi16(_mm512_cvtepu8_epi16(half), base);
            // SAFETY: room for 32 places, which is how many these are, at any alignment.
            unsafe { _mm512_storeu_si512(room.as_mut_ptr().cast(), places) }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw")]
fn runs_with_avx512(pairs: &[[u16; 2]], base: u64, runs: &mut Vec<PageRange>) {
    runs.reserve(pairs.len());
    let base_of_all = _mm512_set1_epi64(base.cast_signed());
    let (fours, rest) = pairs.as_chunks::<4>();
    let (room, _) = runs.spare_capacity_mut().as_chunks_mut::<4>();
    for (four, room) in fours.iter().zip(room) {
        // SAFETY: reads four pairs, which are 16 bytes, at any alignment.
        let places = unsafe { _mm_loadu_si128(four.as_ptr().cast()) };
        let places = _mm512_add_epi64(_mm512_cvtepu16_epi64(places), base_of_all);
        // From first and end to first and length.
        let firsts = _mm512_bslli_epi128::<8>(places);
        let four = _mm512_sub_epi64(places, firsts);
        // SAFETY: room for four page ranges, which are two words each in this order.
        unsafe { _mm512_storeu_si512(room.as_mut_ptr().cast(), four) }
    }
    // SAFETY: so many were reserved and have been written.
    unsafe { runs.set_len(runs.len() + 4 * fours.len()) }
    super::portable::runs(rest, base, runs);
}
