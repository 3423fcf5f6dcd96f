//! Whole words, many at a time: the same loops for each instruction set, which the compiler then makes vectors of.

use crate::isa::Isa;

/// Words that are looked at together where nothing is set.
const STRIDE: usize = 16;

/// ORs whole words: destination word `i` takes the 64 bits of `src` from bit `64 * i + shift` on, `shift` below 64.
pub(super) fn or(isa: Isa, dst: &mut [u64], src: &[u64], shift: u64) {
    match isa {
        Isa::Portable => or_here(dst, src, shift),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::or(dst, src, shift),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::or(dst, src, shift),
    }
}

/// Number of set bits.
pub(super) fn count(isa: Isa, words: &[u64]) -> u64 {
    match isa {
        Isa::Portable => count_here(words),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::count(words),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::count(words),
    }
}

/// Number of words before the first one that has a bit set.
pub(super) fn clear_ahead(isa: Isa, words: &[u64]) -> usize {
    match isa {
        Isa::Portable => clear_ahead_here(words),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::clear_ahead(words),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::clear_ahead(words),
    }
}

#[inline(always)]
fn or_here(dst: &mut [u64], src: &[u64], shift: u64) {
    if shift == 0 {
        for (d, s) in dst.iter_mut().zip(src) {
            *d |= s;
        }
    } else {
        for (d, s) in dst.iter_mut().zip(src.windows(2)) {
            *d |= s[0] >> shift | s[1] << (64 - shift);
        }
    }
}

#[inline(always)]
fn count_here(words: &[u64]) -> u64 {
    words.iter().map(|w| u64::from(w.count_ones())).sum()
}

#[inline(always)]
fn clear_ahead_here(words: &[u64]) -> usize {
    let (strides, _) = words.as_chunks::<STRIDE>();
    let is_clear = |stride: &[u64; STRIDE]| stride.iter().fold(0, |all, word| all | word) == 0;
    let passed = strides.iter().take_while(|stride| is_clear(stride)).count() * STRIDE;
    passed + words[passed..].iter().take_while(|w| **w == 0).count()
}

/// The loops above, compiled for more instructions.
macro_rules! compiled_for {
    ($name:ident, $features:literal) => {
        #[cfg(target_arch = "x86_64")]
        mod $name {
            #![allow(unsafe_code)] // calls that are allowed where `Isa` has found these features

            pub(super) fn or(dst: &mut [u64], src: &[u64], shift: u64) {
                #[target_feature(enable = $features)]
                fn with_features(dst: &mut [u64], src: &[u64], shift: u64) {
                    super::or_here(dst, src, shift);
                }
                // SAFETY: this member of `Isa` is there only where the machine has these features.
                unsafe { with_features(dst, src, shift) }
            }

            pub(super) fn count(words: &[u64]) -> u64 {
                #[target_feature(enable = $features)]
                fn with_features(words: &[u64]) -> u64 {
                    super::count_here(words)
                }
                // SAFETY: as in `or`.
                unsafe { with_features(words) }
            }

            pub(super) fn clear_ahead(words: &[u64]) -> usize {
                #[target_feature(enable = $features)]
                fn with_features(words: &[u64]) -> usize {
                    super::clear_ahead_here(words)
                }
                // SAFETY: as in `or`.
                unsafe { with_features(words) }
            }
        }
    };
}

compiled_for!(avx2, "avx2,popcnt");
compiled_for!(
    avx512,
    "avx512f,avx512bw,avx512vl,avx512vbmi2,avx512vpopcntdq"
);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_instruction_set_does_what_the_plainest_loop_does(
            dst in proptest::collection::vec(any::<u64>(), 0..100),
            more in proptest::collection::vec(any::<u64>(), 101), clear in 0usize..100, shift in 0usize..64,
        ) {
            let src = &more[..=dst.len()];
            let bit = |n: usize| src[n / 64] >> (n % 64) & 1;
            let want: Vec<u64> = (0..dst.len())
                .map(|i| (0..64).fold(dst[i], |word, n| word | bit(64 * i + shift + n) << n))
                .collect();
            let set: u64 = dst.iter().map(|word| (0..64).map(|n| word >> n & 1).sum::<u64>()).sum();
            let mut behind = vec![0; clear];
            behind.extend(&dst);
            let ahead = behind.iter().position(|word| *word != 0).unwrap_or(behind.len());
            for isa in Isa::here() {
                let mut got = dst.clone();
                or(isa, &mut got, src, shift as u64);
                prop_assert_eq!(&got, &want, "{:?}", isa);
                prop_assert_eq!(count(isa, &dst), set, "{:?}", isa);
                prop_assert_eq!(clear_ahead(isa, &behind), ahead, "{:?}", isa);
            }
        }
    }
}
