//! Chance that follows from a seed.

use crate::trace::scatter;

/// Numbers that look like chance.
pub(super) struct Random(u64);

impl Random {
    /// What comes of a seed, another for each `stream`.
    pub(super) const fn new(seed: u64, stream: u64) -> Self {
        Self(scatter(seed ^ scatter(stream)))
    }

    /// From 0 on, below 1.
    pub(super) fn share(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(1);
        (scatter(self.0) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Between two numbers.
    pub(super) fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.share()
    }

    /// Between two numbers above 0, as likely to double as to halve.
    pub(super) fn around(&mut self, low: f64, high: f64) -> f64 {
        self.between(low.ln(), high.ln()).exp()
    }

    /// Which of `count` things come up, when each does with this chance: their numbers, in order.
    pub(super) fn some(&mut self, count: u64, chance: f64) -> impl Iterator<Item = u64> {
        // How many are passed over is as likely as that many failures in a row.
        let passed = (1.0 - chance).ln();
        let mut next = 0.0;
        std::iter::from_fn(move || {
            if chance <= 0.0 {
                return None;
            }
            if passed.is_finite() {
                next += ((1.0 - self.share()).ln() / passed).floor();
            }
            let found = next;
            next += 1.0;
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // below count
            (found < count as f64).then_some(found as u64)
        })
    }
}
