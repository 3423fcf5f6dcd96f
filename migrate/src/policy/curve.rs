//! The dirty curve: how many different pages a guest dirties in a given time.

use serde::Serialize;

use super::{Bounds, History};

/// Pages dirtied after `t` seconds, as `factor * t^power`.
///
/// A guest that writes all over its memory dirties in proportion to the time (power 1); one that comes back to the same pages
/// has soon dirtied them all (power near 0). Each round has measured one point: the seconds between two harvests, and the pages
/// that the second one found. The less their times differ, the less of the power is to be seen, and the nearer to 1 it counts.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Curve {
    factor: f64,
    power: f64,
    /// Standard deviation of the points from the curve, as a natural logarithm.
    deviation: f64,
    /// Shortest and longest time that was measured: natural logarithms of seconds.
    #[serde(skip)]
    measured: (f64, f64),
    /// There are no more pages.
    #[serde(skip)]
    total: f64,
    /// In each time that was measured most pages were dirtied: how soon they were is not known.
    #[serde(skip)]
    saturated: bool,
}

/// With this share of all pages dirty, shorter times are not on a line through it: the guest has come back to dirty pages.
const MOST: f64 = 0.5;

/// Where the curve lies the latest points tell, each with half the weight of the one after it; what its power is all of them,
/// none with less than this weight.
const LEAST_WEIGHT: f64 = 1.0 / 32.0;
/// What is not known after a single point, as a natural logarithm; it grows less with each more.
const UNKNOWN: f64 = 0.3;
/// Times that deviate by less than this from their mean, as a natural logarithm, show less and less of a power: it is drawn to 1.
const ALIKE: f64 = 0.1;

/// One point, in natural logarithms.
struct Point {
    time: f64,
    pages: f64,
    /// Halved with each point that came later.
    weight: f64,
}

/// The mean of something over weighted points.
fn mean(points: &[Point], weight: fn(&Point) -> f64, of: impl Fn(&Point) -> f64) -> f64 {
    let sum = |of: &dyn Fn(&Point) -> f64| points.iter().map(|p| weight(p) * of(p)).sum::<f64>();
    sum(&of) / sum(&|_| 1.0)
}

impl Curve {
    /// The curve through the latest rounds under the throttle in force; `None` before the first round.
    #[must_use]
    pub fn of(history: &History) -> Option<Self> {
        let rounds = history.alike();
        let measured = rounds
            .iter()
            .map(|r| (r.dirty_seconds, r.dirty_pages as f64));
        Self::fit(measured, history.total_pages() as f64)
    }

    /// The curve through points of (seconds, pages), the one that counts most first; `None` without any. There are no more
    /// pages than `total`.
    pub fn fit(latest_first: impl Iterator<Item = (f64, f64)>, total: f64) -> Option<Self> {
        let mut weight = 2.0;
        let mut saturated = true;
        let points: Vec<Point> = latest_first
            .map(|(seconds, pages)| {
                weight /= 2.0;
                saturated &= pages >= MOST * total;
                Point {
                    time: seconds.max(1e-6).ln(),
                    pages: pages.max(0.5).ln(), // half a page stands for none
                    weight,
                }
            })
            .collect();
        if points.is_empty() {
            return None;
        }
        let all = |p: &Point| p.weight.max(LEAST_WEIGHT);
        let (time, pages) = (
            mean(&points, all, |p| p.time),
            mean(&points, all, |p| p.pages),
        );
        let width = mean(&points, all, |p| (p.time - time).powi(2));
        let rise = mean(&points, all, |p| (p.time - time) * (p.pages - pages));
        let shown = (width / (ALIKE * ALIKE)).min(1.0);
        let power = 1.0 - shown * (1.0 - (rise / width.max(1e-12)).clamp(0.0, 1.0));
        let level = |p: &Point| p.pages - power * p.time;
        let factor = mean(&points, |p| p.weight, level);
        let off = |p: &Point| (level(p) - factor).powi(2);
        let deviation = mean(&points, |p| p.weight, off).sqrt();
        let times = points.iter().map(|p| p.time);
        Some(Self {
            factor: factor.exp(),
            power,
            deviation: deviation.max(UNKNOWN / points.len() as f64),
            measured: (
                times.clone().fold(f64::INFINITY, f64::min),
                times.fold(f64::NEG_INFINITY, f64::max),
            ),
            total,
            saturated,
        })
    }

    /// Whether of so short a time it is only known that more is dirtied than the curve says: in each that was measured most
    /// pages were, however early.
    #[must_use]
    pub fn is_least(&self, seconds: f64) -> bool {
        self.saturated && seconds.max(1e-6).ln() < self.measured.0
    }

    /// Pages dirtied after so many seconds, as the curve says.
    #[must_use]
    pub fn likely(&self, seconds: f64) -> f64 {
        if seconds <= 0.0 {
            return 0.0;
        }
        let pages = self.factor * seconds.powf(self.power);
        // Half a page stood for none.
        if pages <= 0.5 {
            return 0.0;
        }
        pages.min(self.total)
    }

    /// Pages dirtied after so many seconds. Outside of what was measured the bounds widen as far as any guest can go: from one
    /// that has dirtied all it uses (power 0) to one that never comes back to a page (power 1).
    #[must_use]
    pub fn pages(&self, seconds: f64) -> Bounds {
        let likely = self.likely(seconds);
        if seconds <= 0.0 || likely == 0.0 {
            return Bounds::new(0.0, likely, likely);
        }
        let time = seconds.ln();
        let nearest = time.clamp(self.measured.0, self.measured.1);
        let beyond = time - nearest;
        let at = self.factor.ln() + self.power * nearest;
        let off = Bounds::DEVIATIONS * self.deviation;
        Bounds::new(
            (at - off + beyond.min(0.0)).exp().min(self.total),
            likely,
            (at + off + beyond.max(0.0)).exp().min(self.total),
        )
    }

    /// For how much of its time the guest may run so that it dirties `pages` in `seconds` (0 to 1).
    #[must_use]
    pub fn share(&self, pages: f64, seconds: f64) -> f64 {
        let all = self.likely(seconds);
        if all <= pages {
            return 1.0;
        }
        // For times shorter than any that was measured the curve would promise that no throttle ever helps: from there on
        // it is a straight line.
        let knee = self.measured.0.exp().min(seconds);
        let there = self.likely(knee);
        let time = if pages < there {
            knee * pages / there
        } else {
            (pages / self.factor).powf(1.0 / self.power)
        };
        (time / seconds).clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // helpers are not known to be tests
    use super::*;
    use proptest::prelude::*;

    const TOTAL: f64 = 1e6;

    fn fit(points: &[(f64, f64)]) -> Curve {
        Curve::fit(points.iter().copied(), TOTAL).unwrap()
    }

    fn near(found: f64, expected: f64) -> bool {
        (found / expected - 1.0).abs() < 1e-6
    }

    #[test]
    fn a_guest_all_over_its_memory_is_a_line_and_a_hot_set_is_flat() {
        let line = fit(&[(0.1, 100.0), (1.0, 1000.0), (4.0, 4000.0)]);
        assert!(near(line.likely(2.0), 2000.0) && near(line.likely(0.01), 10.0));
        let flat = fit(&[(0.1, 500.0), (1.0, 500.0), (4.0, 500.0)]);
        assert!(near(flat.likely(2.0), 500.0) && near(flat.likely(0.01), 500.0));
        let root = fit(&[(1.0, 100.0), (4.0, 200.0), (16.0, 400.0)]);
        assert!(near(root.likely(9.0), 300.0));
    }

    #[test]
    fn times_that_are_alike_show_a_line() {
        let curve = fit(&[(1.0, 100.0), (1.02, 130.0), (0.99, 90.0)]);
        assert!(near(curve.likely(2.0) / curve.likely(1.0), 2.0));
    }

    #[test]
    fn a_later_point_counts_for_more() {
        let new = fit(&[(1.0, 1000.0), (1.0, 10.0), (1.0, 10.0)]).likely(1.0);
        let old = fit(&[(1.0, 10.0), (1.0, 10.0), (1.0, 1000.0)]).likely(1.0);
        assert!(new > 2.0 * old, "{new} {old}");
    }

    #[test]
    fn a_guest_that_dirties_nothing_has_nothing_dirty() {
        let idle = fit(&[(1.0, 0.0), (0.1, 0.0)]);
        assert_eq!(idle.pages(1.0), Bounds::new(0.0, 0.0, 0.0));
        assert_eq!(fit(&[(1.0, 5.0)]).likely(0.0), 0.0);
    }

    #[test]
    fn the_share_dirties_what_it_may() {
        let root = fit(&[(1.0, 100.0), (4.0, 200.0), (16.0, 400.0)]);
        assert!(near(root.share(100.0, 4.0), 0.25));
        assert_eq!(root.share(500.0, 4.0), 1.0);
        // Where nothing shorter was measured, half the time is half the pages.
        assert!(near(root.share(50.0, 1.0), 0.5));
        let flat = fit(&[(0.5, 500.0), (1.0, 500.0)]);
        assert!(near(flat.share(50.0, 1.0), 0.05));
    }

    proptest! {
        #[test]
        fn bounds_hold_the_guess_and_more_time_is_never_fewer_pages(
            points in proptest::collection::vec((1e-4..100.0, 0.0..1e6), 1..10),
            short in 1e-6..100.0, more in 1.0..1000.0,
        ) {
            let curve = fit(&points);
            let (a, b) = (curve.pages(short), curve.pages(short * more));
            prop_assert!(a.low <= a.likely && a.likely <= a.high && a.high <= TOTAL * 1.001);
            prop_assert!(a.likely <= b.likely * (1.0 + 1e-9));
            prop_assert!(a.high <= b.high * (1.0 + 1e-9));
            let share = curve.share(a.likely, short * more);
            prop_assert!((0.0..=1.0).contains(&share));
        }
    }
}
