//! The one kernel over bit ranges: OR at any shift, word by word.

mod words;

use std::ops::Range;

use rayon::prelude::*;

use crate::isa::Isa;

const BITS: u64 = 64;

/// Destination words from which on the work is shared out to rayon's threads (256 KiB of bitmap, 8 GiB of guest):
/// below it waking a thread costs more than it saves.
const PARALLEL_WORDS: usize = 32 * 1024;

/// Index of the word that holds `bit`. Bitmaps live in memory, so the index fits.
#[allow(clippy::cast_possible_truncation)]
const fn word(bit: u64) -> usize {
    (bit / BITS) as usize
}

/// `n` low bits set; `n` at most 64.
const fn low(n: u64) -> u64 {
    if n >= BITS { u64::MAX } else { (1 << n) - 1 }
}

/// `n` (1 to 64) bits of `src` from `bit` on.
fn fetch(src: &[u64], bit: u64, n: u64) -> u64 {
    let (i, shift) = (word(bit), bit % BITS);
    let mut value = src[i] >> shift;
    if shift + n > BITS {
        value |= src[i + 1] << (BITS - shift);
    }
    value & low(n)
}

/// ORs `len` bits of `src` from `src_bit` on into `dst` from `dst_bit` on. Bit `n` of a bitmap is bit `n % 64` of word
/// `n / 64`, which is KVM's order.
///
/// Cost follows the number of words, whatever shift and density.
///
/// # Panics
/// When a range does not fit its slice; callers check lengths first.
pub fn or_bits(dst: &mut [u64], dst_bit: u64, src: &[u64], src_bit: u64, len: u64) {
    if len == 0 {
        return;
    }
    assert!(word(dst_bit + len - 1) < dst.len(), "destination range");
    assert!(word(src_bit + len - 1) < src.len(), "source range");
    // Up to the first word boundary of the destination.
    let head = (BITS - dst_bit % BITS).min(len);
    dst[word(dst_bit)] |= fetch(src, src_bit, head) << (dst_bit % BITS);
    let (dst_bit, src_bit, len) = (dst_bit + head, src_bit + head, len - head);
    // Whole destination words.
    let whole = word(len);
    let body = &mut dst[word(dst_bit)..word(dst_bit) + whole];
    let (start, shift) = (word(src_bit), src_bit % BITS);
    let isa = Isa::best();
    if whole >= PARALLEL_WORDS {
        body.par_chunks_mut(PARALLEL_WORDS / 2)
            .enumerate()
            .for_each(|(n, part)| {
                words::or(isa, part, &src[start + n * PARALLEL_WORDS / 2..], shift);
            });
    } else {
        words::or(isa, body, &src[start..], shift);
    }
    // What is left in the last word.
    let tail = len % BITS;
    if tail > 0 {
        dst[word(dst_bit) + whole] |= fetch(src, src_bit + len - tail, tail);
    }
}

/// Number of set bits among `len` bits of `words` from `first` on.
///
/// # Panics
/// When the range does not fit the slice.
#[must_use]
pub fn count_bits(words: &[u64], first: u64, len: u64) -> u64 {
    let Some((range, head, tail)) = span(first, len) else {
        return 0;
    };
    let words = &words[range];
    // All bits of the words, less those that the first and the last word have outside the range.
    let outside = (words[0] & !head).count_ones() + (words[words.len() - 1] & !tail).count_ones();
    words::count(Isa::best(), words) - u64::from(outside)
}

/// The first set bit among the bits `first..end` of `words`.
///
/// # Panics
/// When the range does not fit the slice.
pub(crate) fn next_set(words: &[u64], first: u64, end: u64) -> Option<u64> {
    let (range, head, _) = span(first, end.saturating_sub(first))?;
    let start = range.start;
    let words = &words[range];
    let at = match words[0] & head {
        0 => 1 + words::clear_ahead(Isa::best(), &words[1..]),
        _ => 0,
    };
    let word = *words.get(at)? & if at == 0 { head } else { u64::MAX };
    let bit = (start + at) as u64 * BITS + u64::from(word.trailing_zeros());
    (bit < end).then_some(bit)
}

/// The words of a bit range, and what of the first and of the last of them belongs to it. `None` when it is empty.
fn span(first: u64, len: u64) -> Option<(Range<usize>, u64, u64)> {
    let last = first + len.checked_sub(1)?;
    let head = u64::MAX << (first % BITS);
    let tail = low(last % BITS + 1);
    Some((word(first)..word(last) + 1, head, tail))
}

/// Calls `each(word index, mask of the range's bits in it)` for every word of a bit range.
pub fn masked_words(first: u64, len: u64, mut each: impl FnMut(usize, u64)) {
    let end = first + len;
    let mut bit = first;
    while bit < end {
        let here = (BITS - bit % BITS).min(end - bit);
        each(word(bit), low(here) << (bit % BITS));
        bit += here;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bit(words: &[u64], n: u64) -> bool {
        words[word(n)] >> (n % 64) & 1 == 1
    }

    proptest! {
        #[test]
        fn or_at_any_shift_equals_the_bit_by_bit_oracle(
            dst in proptest::collection::vec(any::<u64>(), 1..8),
            src in proptest::collection::vec(any::<u64>(), 1..8),
            a in 0u64..512, b in 0u64..512, n in 0u64..512,
        ) {
            let a = a % (dst.len() as u64 * 64);
            let b = b % (src.len() as u64 * 64);
            let n = n.min(dst.len() as u64 * 64 - a).min(src.len() as u64 * 64 - b);
            let mut got = dst.clone();
            or_bits(&mut got, a, &src, b, n);
            for i in 0..dst.len() as u64 * 64 {
                let want = bit(&dst, i) || (i >= a && i < a + n && bit(&src, b + i - a));
                prop_assert_eq!(bit(&got, i), want, "bit {}", i);
            }
        }

        #[test]
        fn the_next_set_bit_is_the_first_that_a_look_at_each_bit_finds(
            bits in proptest::collection::btree_set(0u64..6400, 0..4), a in 0u64..6400, b in 0u64..=6400,
        ) {
            let mut words = vec![0u64; 100];
            for &n in &bits {
                words[word(n)] |= 1 << (n % 64);
            }
            prop_assert_eq!(next_set(&words, a, b), (a..b).find(|&n| bit(&words, n)));
        }

        #[test]
        fn count_equals_the_bit_by_bit_oracle(
            words in proptest::collection::vec(any::<u64>(), 1..8), a in 0u64..512, n in 0u64..512,
        ) {
            let a = a % (words.len() as u64 * 64);
            let n = n.min(words.len() as u64 * 64 - a);
            let want = (a..a + n).filter(|&i| bit(&words, i)).count() as u64;
            prop_assert_eq!(count_bits(&words, a, n), want);
        }
    }

    #[test]
    fn the_parallel_path_equals_the_sequential_one() {
        let words = 3 * PARALLEL_WORDS + 5;
        let src: Vec<u64> = (0..words as u64)
            .map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15))
            .collect();
        for shift in [0u64, 1, 37, 63] {
            let len = words as u64 * 64 - 200;
            let mut whole = vec![0; words];
            or_bits(&mut whole, 70, &src, shift, len - 70);
            let mut pieces = vec![0; words];
            let step = 64 * 1000 + 13;
            let mut at = 0;
            while at < len - 70 {
                let n = step.min(len - 70 - at);
                or_bits(&mut pieces, 70 + at, &src, shift + at, n);
                at += n;
            }
            assert!(whole == pieces, "shift {shift}");
        }
    }
}
