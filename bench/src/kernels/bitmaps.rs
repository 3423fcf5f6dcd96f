//! Bitmaps to measure with.

/// xorshift64.
pub fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// What a bitmap looks like.
#[derive(Clone, Copy, Debug)]
pub enum Shape {
    /// Every word is this one.
    Words(u64),
    /// Single bits at random: so many of a million are set.
    Random(u32),
    /// Runs of so many bits, and gaps at random that are as long on average.
    Runs(u64),
}

impl Shape {
    /// A bitmap of this shape; `seed` chooses one of many.
    pub fn bitmap(self, words: usize, seed: u64) -> Vec<u64> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let end = words as u64 * 64;
        match self {
            // Written word by word: memory that was never written is one page of zeros, and reads faster than any other.
            Self::Words(word) => (0..words).map(|_| std::hint::black_box(word)).collect(),
            Self::Random(500_000) => (0..words).map(|_| random(&mut state)).collect(),
            Self::Random(millionths) => {
                let mut bitmap = vec![0; words];
                // The length of a gap between bits that are set with a given chance, from a number at random.
                let clear = (1.0 - f64::from(millionths) / 1e6).ln();
                #[allow(clippy::cast_sign_loss)] // both logarithms are below zero
                let mut gap = || {
                    let chance = (random(&mut state) >> 11) as f64 / (1u64 << 53) as f64;
                    ((1.0 - chance).ln() / clear) as u64
                };
                let mut bit = gap();
                while bit < end {
                    bitmap[(bit / 64) as usize] |= 1 << (bit % 64);
                    bit += 1 + gap();
                }
                bitmap
            }
            Self::Runs(pages) => {
                let mut bitmap = vec![0; words];
                let mut bit = random(&mut state) % (2 * pages);
                while bit + pages <= end {
                    for bit in bit..bit + pages {
                        bitmap[(bit / 64) as usize] |= 1 << (bit % 64);
                    }
                    bit += pages + 1 + random(&mut state) % (2 * pages);
                }
                bitmap
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(bitmap: &[u64]) -> u64 {
        bitmap.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    #[test]
    fn bitmaps_have_about_the_density_asked_for() {
        for millionths in [1000, 10_000, 100_000, 500_000] {
            let set = set(&Shape::Random(millionths).bitmap(4096, 1));
            let want = 4096 * 64 * u64::from(millionths) / 1_000_000;
            assert!((want * 8 / 10..=want * 12 / 10).contains(&set), "{set}");
        }
    }

    #[test]
    fn runs_are_as_long_as_asked_for_and_never_touch() {
        let bitmap = Shape::Runs(8).bitmap(4096, 1);
        let runs: Vec<_> = gleaner_bitmap::Runs::new(&bitmap, 0, 4096 * 64).collect();
        assert!(runs.len() > 4096 && runs.iter().all(|run| run.pages == 8));
    }
}
