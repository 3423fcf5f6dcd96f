//! What a guest dirties in any time, from what was measured in some.

use std::time::Duration;

use gleaner_migrate::policy::Bounds;

use super::CurvePoint;

/// What is not known after a single window, as a natural logarithm; less by as much as there are more, side by side.
const UNKNOWN: f64 = 0.6;

/// The dirty curve, between what was measured and beyond it. Between two times it is a line, which is no more than the guest
/// dirties. Outside of all times it goes on as it bends there; its bounds widen as far as any guest can go, from one that
/// has dirtied all it uses to one that never comes back to a page.
#[derive(Clone, PartialEq, Debug)]
pub struct Dirtied {
    points: Vec<(f64, Bounds)>,
    /// How it goes on: pages are as the time to this power.
    first_power: f64,
    last_power: f64,
    total: f64,
}

impl Dirtied {
    pub(super) fn of(curve: &[CurvePoint], duration: Duration, total_pages: u64) -> Self {
        let mut points: Vec<(f64, Bounds)> = Vec::new();
        for point in curve {
            let seconds = point.measured_ms / 1e3;
            let windows = (duration.as_secs_f64() / seconds).floor().max(1.0);
            let unknown = point.pages * ((UNKNOWN / windows).exp() - 1.0);
            let off = unknown.max(Bounds::DEVIATIONS * point.deviation);
            // A sample has bounds of its own.
            let [low, high] = point.interval95;
            let below = off.hypot(point.pages - low);
            let above = off.hypot(high - point.pages);
            // Means of other windows each: in more time no fewer pages are dirtied.
            let least = points.last().map_or(Bounds::default(), |before| before.1);
            let bounds = Bounds::new(
                (point.pages - below).max(least.low),
                point.pages.max(least.likely),
                (point.pages + above).max(least.high),
            );
            points.push((seconds, bounds));
        }
        let last = points.len().saturating_sub(1);
        // From half the time or less, where there is one: two times that are alike tell nothing.
        let half = |at: &&(f64, Bounds)| at.0 <= points[last].0 / 2.0;
        Self {
            first_power: power(points.first(), points.get(1)),
            last_power: power(points.iter().rev().find(half), points.last()),
            total: total_pages as f64,
            points,
        }
    }

    /// Different pages dirtied in so many seconds.
    #[must_use]
    pub fn pages(&self, seconds: f64) -> Bounds {
        let (Some(first), Some(last)) = (self.points.first(), self.points.last()) else {
            return Bounds::default();
        };
        if seconds <= 0.0 {
            return Bounds::default();
        }
        let found = if seconds <= first.0 {
            let part = seconds / first.0;
            let likely = first.1.likely * part.powf(self.first_power);
            Bounds::new(first.1.low * part, likely, first.1.high)
        } else if seconds >= last.0 {
            let times = seconds / last.0;
            let likely = last.1.likely * times.powf(self.last_power);
            Bounds::new(last.1.low, likely, last.1.high * times)
        } else {
            let after = self.points.partition_point(|point| point.0 < seconds);
            let (a, b) = (self.points[after - 1], self.points[after]);
            let part = (seconds - a.0) / (b.0 - a.0);
            a.1.times(1.0 - part).plus(b.1.times(part))
        };
        let most = |pages: f64| pages.min(self.total);
        Bounds::new(most(found.low), most(found.likely), most(found.high))
    }
}

fn power(from: Option<&(f64, Bounds)>, to: Option<&(f64, Bounds)>) -> f64 {
    match (from, to) {
        (Some(from), Some(to)) if from.1.likely > 0.0 => {
            let power = (to.1.likely / from.1.likely).ln() / (to.0 / from.0).ln();
            power.clamp(0.0, 1.0)
        }
        _ => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn point(ms: f64, pages: f64, deviation: f64) -> CurvePoint {
        CurvePoint {
            ms,
            measured_ms: ms,
            pages,
            deviation,
            low: 0.0,
            high: 0.0,
            samples: 9,
            interval95: [pages; 2],
        }
    }

    fn of(points: &[(f64, f64)]) -> Dirtied {
        let points: Vec<_> = points.iter().map(|p| point(p.0, p.1, 0.0)).collect();
        Dirtied::of(&points, Duration::from_secs(10), 1_000_000)
    }

    #[test]
    fn it_goes_through_what_was_measured_and_on_as_it_bends() {
        let line = of(&[(50.0, 100.0), (100.0, 200.0), (1000.0, 2000.0)]);
        for (seconds, pages) in [(0.01, 20.0), (0.05, 100.0), (0.5, 1000.0), (5.0, 10_000.0)] {
            let found = line.pages(seconds).likely;
            assert!((found / pages - 1.0).abs() < 1e-9, "{seconds}: {found}");
        }
        let hot = of(&[(50.0, 500.0), (100.0, 500.0), (1000.0, 500.0)]);
        assert_eq!(hot.pages(0.001).likely, 500.0);
        assert_eq!(hot.pages(60.0).likely, 500.0);
        // What it may be there is not known.
        assert!(hot.pages(0.001).low < 15.0 && hot.pages(60.0).high > 25_000.0);
    }

    #[test]
    fn a_guest_that_varies_has_wide_bounds() {
        let points = [point(100.0, 1000.0, 300.0), point(1000.0, 5000.0, 100.0)];
        let varying = Dirtied::of(&points, Duration::from_secs(1000), 1_000_000);
        // 1.96 deviations.
        let found = varying.pages(0.1);
        assert_eq!((found.low.round(), found.high.round()), (412.0, 1588.0));
        let found = varying.pages(1.0);
        assert_eq!((found.low.round(), found.high.round()), (4804.0, 5196.0));
    }

    #[test]
    fn a_guest_that_writes_nothing_dirties_nothing() {
        assert_eq!(
            of(&[(50.0, 0.0), (1000.0, 0.0)]).pages(9.0),
            Bounds::default()
        );
        assert_eq!(of(&[]).pages(1.0), Bounds::default());
    }

    proptest! {
        #[test]
        fn more_time_is_never_fewer_pages_and_bounds_hold_the_guess(
            pages in proptest::collection::vec((0.0..1e5, 0.0..1e4), 1..8),
            short in 1e-6..100.0, more in 1.0..1000.0,
        ) {
            let times = [50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0];
            let points: Vec<_> = times.iter().zip(&pages).map(|(ms, p)| point(*ms, p.0, p.1)).collect();
            let dirtied = Dirtied::of(&points, Duration::from_secs(10), 50_000);
            let (a, b) = (dirtied.pages(short), dirtied.pages(short * more));
            prop_assert!(a.low <= a.likely && a.likely <= a.high && a.high <= 50_000.0);
            let eps = 1e-6;
            prop_assert!(a.low <= b.low + eps && a.likely <= b.likely + eps && a.high <= b.high + eps, "{a:?} {b:?}");
        }
    }
}
