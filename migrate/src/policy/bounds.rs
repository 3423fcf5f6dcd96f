//! A quantity that is not known for sure.

use serde::Serialize;

/// What something may be. `low <= likely <= high`; the unit is said where it is used.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize)]
pub struct Bounds {
    /// It is hardly less.
    pub low: f64,
    /// The best guess.
    pub likely: f64,
    /// It is hardly more.
    pub high: f64,
}

impl Bounds {
    /// Ordered whatever comes: the guess is kept, and a bound on its wrong side is moved to it.
    #[must_use]
    pub const fn new(low: f64, likely: f64, high: f64) -> Self {
        Self {
            low: low.min(likely),
            likely,
            high: high.max(likely),
        }
    }

    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        self.with(other, |a, b| a + b)
    }

    /// In another unit, or so many times.
    #[must_use]
    pub fn times(self, factor: f64) -> Self {
        Self::new(self.low * factor, self.likely * factor, self.high * factor)
    }

    /// The time that so much takes at a rate: low at the high rate.
    #[must_use]
    pub fn at(self, rate: Self) -> Self {
        let slow_first = Self {
            low: rate.high,
            likely: rate.likely,
            high: rate.low,
        };
        self.with(slow_first, |amount, rate| amount / rate.max(1e-9))
    }

    fn with(self, other: Self, both: impl Fn(f64, f64) -> f64) -> Self {
        Self::new(
            both(self.low, other.low),
            both(self.likely, other.likely),
            both(self.high, other.high),
        )
    }
}
