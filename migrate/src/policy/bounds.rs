//! A quantity that is not known for sure.

use serde::{Serialize, Serializer};

use crate::units::{Seconds, within_a_year};

/// What something may be: it is within the bounds with 95 % certainty, as far as what was seen tells; of what nobody has seen
/// yet they are guessed as wide as that. `low <= likely <= high`; the unit is said where it is used.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize)]
pub struct Bounds {
    /// It is hardly less: in one case of 40.
    pub low: f64,
    /// The best guess.
    pub likely: f64,
    /// It is hardly more: in one case of 40.
    pub high: f64,
}

impl Bounds {
    /// Bounds of a quantity that varies are that many standard deviations from its mean: 95 % of a normal distribution lie
    /// within.
    pub const DEVIATIONS: f64 = 1.959_964;

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

    /// For people: the guess, and the bounds where they are others.
    #[must_use]
    pub fn told(self, text: impl Fn(f64) -> String) -> String {
        let [likely, low, high] = [self.likely, self.low, self.high].map(text);
        if low == likely && high == likely {
            return likely;
        }
        format!("{likely} ({low} to {high})")
    }

    fn with(self, other: Self, both: impl Fn(f64, f64) -> f64) -> Self {
        Self::new(
            both(self.low, other.low),
            both(self.likely, other.likely),
            both(self.high, other.high),
        )
    }
}

/// Milliseconds as JSON has them: null where they are over a year or have no end, and in words beside.
#[derive(Serialize)]
struct Milliseconds {
    low: Option<f64>,
    likely: Option<f64>,
    high: Option<f64>,
    told: String,
}

impl From<&Bounds> for Milliseconds {
    fn from(ms: &Bounds) -> Self {
        Self {
            low: within_a_year(ms.low),
            likely: within_a_year(ms.likely),
            high: within_a_year(ms.high),
            told: ms.told(|ms| Seconds(ms / 1e3).to_string()),
        }
    }
}

pub(crate) fn milliseconds<S: Serializer>(ms: &Bounds, to: S) -> Result<S::Ok, S::Error> {
    Milliseconds::from(ms).serialize(to)
}

pub(crate) fn some_milliseconds<S: Serializer>(
    ms: &Option<Bounds>,
    to: S,
) -> Result<S::Ok, S::Error> {
    ms.as_ref().map(Milliseconds::from).serialize(to)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_told_where_they_are_not_the_guess() {
        let told = |low, likely, high| Bounds::new(low, likely, high).told(|n| format!("{n:.0}"));
        assert_eq!(told(1.0, 2.0, 3.0), "2 (1 to 3)");
        assert_eq!(told(1.9, 2.0, 2.1), "2");
    }

    #[test]
    fn a_time_without_number_is_null_for_scripts_and_has_words() {
        let json =
            |ms: Bounds| milliseconds(&ms, serde_json::value::Serializer).unwrap_or_default();
        let found = json(Bounds::new(1500.0, 4e10, f64::INFINITY));
        assert_eq!(
            found,
            serde_json::json!({
                "low": 1500.0, "likely": null, "high": null,
                "told": "over a year (1.5 s to without end)",
            })
        );
    }
}
