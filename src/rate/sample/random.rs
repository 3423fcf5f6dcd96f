//! Random numbers from a seed.

/// The generator `splitmix64`: any seed will do.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// One that begins at `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub const fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let a = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let b = (a ^ (a >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        b ^ (b >> 31)
    }

    /// One of `0..end`; 0 if there is none. The bias is no more than `end` in 2^64.
    #[allow(clippy::cast_possible_truncation)] // the high half
    pub const fn below(&mut self, end: u64) -> u64 {
        ((self.bits() as u128 * end as u128) >> 64) as u64
    }

    /// The same of a list so long.
    #[allow(clippy::cast_possible_truncation)] // below what came as one
    pub const fn index(&mut self, length: usize) -> usize {
        self.below(length as u64) as usize
    }
}
