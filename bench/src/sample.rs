//! Samples: turn about, the first ones thrown away, median and quartiles of the rest.

use std::time::{Duration, Instant};

/// Median and quartiles.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Spread {
    /// First quartile.
    pub low: f64,
    /// Median.
    pub median: f64,
    /// Third quartile.
    pub high: f64,
}

impl Spread {
    /// Of some samples; zeros when there are none.
    #[must_use]
    pub fn of(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        let at = |quarter: usize| {
            let last = samples.len().saturating_sub(1);
            samples.get(last * quarter / 4).copied().unwrap_or(0.0)
        };
        Self {
            low: at(1),
            median: at(2),
            high: at(3),
        }
    }
}

/// How long something takes.
pub fn time<T>(f: impl FnOnce() -> T) -> (Duration, T) {
    let start = Instant::now();
    let value = f();
    (start.elapsed(), value)
}

/// Nanoseconds.
#[must_use]
pub fn ns(time: Duration) -> f64 {
    time.as_secs_f64() * 1e9
}

/// Measures two things turn about, `rounds` times after one of warm-up: times of the first and of the second, pairwise.
pub fn turn_about<E>(
    rounds: usize,
    mut first: impl FnMut() -> Result<Duration, E>,
    mut second: impl FnMut() -> Result<Duration, E>,
) -> Result<Vec<(Duration, Duration)>, E> {
    (0..=rounds)
        .map(|_| Ok((first()?, second()?)))
        .skip(1)
        .collect()
}

/// The ratios of pairs, the first over the second.
#[must_use]
pub fn ratios(pairs: &[(Duration, Duration)]) -> Spread {
    let ratio = |(a, b): &(Duration, Duration)| a.as_secs_f64() / b.as_secs_f64().max(1e-12);
    Spread::of(pairs.iter().map(ratio).collect())
}

/// The median of one side of pairs, in seconds.
#[must_use]
pub fn median(times: impl Iterator<Item = Duration>) -> f64 {
    Spread::of(times.map(|t| t.as_secs_f64()).collect()).median
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_are_of_the_sorted_samples() {
        let spread = Spread::of(vec![5.0, 1.0, 4.0, 2.0, 3.0]);
        assert_eq!((spread.low, spread.median, spread.high), (2.0, 3.0, 4.0));
        assert_eq!(Spread::of(Vec::new()).median, 0.0);
    }

    #[test]
    fn the_first_turn_is_thrown_away() {
        let mut calls = 0;
        let pairs = turn_about::<()>(
            3,
            || {
                calls += 1;
                Ok(Duration::from_secs(calls))
            },
            || Ok(Duration::from_secs(1)),
        );
        assert_eq!(
            pairs.map(|p| p.iter().map(|p| p.0.as_secs()).collect::<Vec<_>>()),
            Ok(vec![2, 3, 4])
        );
    }
}
