//! Mean and variance of samples that nobody keeps.

use serde::Serialize;

/// Mean, variance and extremes of the samples so far (Welford's way: exact however many there are).
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize)]
pub struct Stats {
    /// Number of samples.
    pub samples: u64,
    /// Their mean; 0 without any.
    pub mean: f64,
    /// Their variance, as that of a sample; 0 with fewer than two.
    pub variance: f64,
    /// The least.
    pub low: f64,
    /// The most.
    pub high: f64,
}

impl Stats {
    /// Takes another sample.
    pub fn add(&mut self, sample: f64) {
        let before = self.samples as f64;
        self.samples += 1;
        let off = sample - self.mean;
        self.mean += off / self.samples as f64;
        if before > 0.0 {
            let squares = self.variance * (before - 1.0) + off * (sample - self.mean);
            self.variance = squares / before;
            self.low = self.low.min(sample);
            self.high = self.high.max(sample);
        } else {
            (self.low, self.high) = (sample, sample);
        }
    }

    /// Standard deviation.
    #[must_use]
    pub fn deviation(&self) -> f64 {
        self.variance.sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_and_variance_are_those_of_all_samples() {
        let mut stats = Stats::default();
        for sample in [2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0] {
            stats.add(sample);
        }
        assert_eq!((stats.samples, stats.mean), (8, 5.0));
        assert!((stats.variance - 32.0 / 7.0).abs() < 1e-12, "{stats:?}");
        assert_eq!((stats.low, stats.high), (2.0, 9.0));
    }

    #[test]
    fn one_sample_varies_by_nothing() {
        let mut stats = Stats::default();
        stats.add(-3.0);
        assert_eq!((stats.mean, stats.variance, stats.high), (-3.0, 0.0, -3.0));
    }
}
