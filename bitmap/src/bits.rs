//! The one kernel over bit ranges: OR at any shift, word by word.

use rayon::prelude::*;

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
    if whole >= PARALLEL_WORDS {
        body.par_chunks_mut(PARALLEL_WORDS / 2)
            .enumerate()
            .for_each(|(n, part)| {
                or_words(part, &src[start + n * PARALLEL_WORDS / 2..], shift);
            });
    } else {
        or_words(body, &src[start..], shift);
    }
    // What is left in the last word.
    let tail = len % BITS;
    if tail > 0 {
        dst[word(dst_bit) + whole] |= fetch(src, src_bit + len - tail, tail);
    }
}

/// ORs whole words: destination word `i` takes the 64 bits of `src` from bit `64 * i + shift` on.
fn or_words(dst: &mut [u64], src: &[u64], shift: u64) {
    if shift == 0 {
        let src = &src[..dst.len()];
        for (d, s) in dst.iter_mut().zip(src) {
            *d |= s;
        }
    } else {
        for (d, s) in dst.iter_mut().zip(src.windows(2)) {
            *d |= s[0] >> shift | s[1] << (BITS - shift);
        }
    }
}

/// Number of set bits among `len` bits of `words` from `first` on.
///
/// # Panics
/// When the range does not fit the slice.
#[must_use]
pub fn count_bits(words: &[u64], first: u64, len: u64) -> u64 {
    let mut total = 0;
    masked_words(first, len, |i, mask| {
        total += u64::from((words[i] & mask).count_ones());
    });
    total
}

/// Calls `each(word index, mask of the range's bits in it)` for every word of a bit range.
pub(crate) fn masked_words(first: u64, len: u64, mut each: impl FnMut(usize, u64)) {
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
