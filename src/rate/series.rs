//! The dirty curve from one series of looks: how many different pages are written in a given time.

use std::collections::VecDeque;
use std::time::Duration;

use super::{CurvePoint, Stats};

/// The times whose unique pages are told.
const TIMES: [Duration; 12] = [
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
    Duration::from_secs(10),
    Duration::from_secs(20),
    Duration::from_secs(60),
    Duration::from_secs(120),
    Duration::from_secs(300),
];
/// A window counts for a time when it is no further from it than this part of it.
const OFF: f64 = 0.25;

/// Any stretch of consecutive looks is a window. The pages of one that ends with the newest look are those whose *last* write
/// was seen in it, so all windows that end now are counted from one number a look, and none takes a set of its own.
#[derive(Debug)]
pub(super) struct Series {
    looks: VecDeque<Past>,
    /// Number of the first look that is kept. Look 0 is the beginning.
    first: u32,
    times: Vec<Time>,
}

#[derive(Debug)]
struct Past {
    at: Duration,
    /// Pages whose last write, so far, was seen in this look.
    last_in: u64,
}

#[derive(Debug)]
struct Time {
    time: Duration,
    seconds: Stats,
    pages: Stats,
}

impl Series {
    pub(super) fn new() -> Self {
        let time = |time: &Duration| Time {
            time: *time,
            seconds: Stats::default(),
            pages: Stats::default(),
        };
        Self {
            looks: VecDeque::from([Past {
                at: Duration::ZERO,
                last_in: 0,
            }]),
            first: 0,
            times: TIMES.iter().map(time).collect(),
        }
    }

    /// When the newest look was.
    pub(super) fn latest(&self) -> Duration {
        self.looks.back().map_or(Duration::ZERO, |look| look.at)
    }

    /// A new look begins; its number, from 1 on. `None` after 2^32 of them.
    pub(super) fn begin(&mut self, at: Duration) -> Option<u32> {
        let kept = u32::try_from(self.looks.len()).ok()?;
        let number = self.first.checked_add(kept)?;
        self.looks.push_back(Past { at, last_in: 0 });
        let longest = TIMES[TIMES.len() - 1].mul_f64(1.0 + OFF);
        while self.looks.len() > 2 && at.saturating_sub(self.looks[1].at) > longest {
            self.looks.pop_front();
            self.first += 1;
        }
        Some(number)
    }

    /// A page is written in the newest look whose last write had been seen in look `before`, 0 if in none.
    pub(super) fn written(&mut self, before: u32) {
        let kept = before.checked_sub(self.first).filter(|_| before > 0);
        let past = kept.and_then(|at| self.looks.get_mut(at as usize));
        if let Some(past) = past {
            past.last_in -= 1;
        }
        if let Some(newest) = self.looks.back_mut() {
            newest.last_in += 1;
        }
    }

    /// The newest look is complete: each time gets the window that ends now and comes nearest to it.
    pub(super) fn end(&mut self) {
        let now = self.latest();
        let mut times = self.times.iter_mut();
        let Some(mut time) = times.next() else {
            return;
        };
        let (mut pages, mut shorter) = (0, (Duration::ZERO, 0));
        let mut looks = self.looks.iter().rev().peekable();
        while let (Some(look), Some(before)) = (looks.next(), looks.peek()) {
            pages += look.last_in;
            let longer = (now.saturating_sub(before.at), pages);
            while longer.0 >= time.time {
                let off = |window: (Duration, u64)| window.0.abs_diff(time.time);
                let nearest = if off(shorter) < off(longer) {
                    shorter
                } else {
                    longer
                };
                if off(nearest) <= time.time.mul_f64(OFF) {
                    time.seconds.add(nearest.0.as_secs_f64());
                    time.pages.add(nearest.1 as f64);
                }
                match times.next() {
                    Some(next) => time = next,
                    None => return,
                }
            }
            shorter = longer;
        }
    }

    /// The curve: a point for each time with a window. Windows of a time overlap, so its samples are not independent.
    pub(super) fn curve(&self) -> Vec<CurvePoint> {
        let seen = self.times.iter().filter(|t| t.pages.samples > 0);
        seen.map(|t| CurvePoint {
            ms: t.time.as_secs_f64() * 1e3,
            measured_ms: t.seconds.mean * 1e3,
            pages: t.pages.mean,
            deviation: t.pages.deviation(),
            low: t.pages.low,
            high: t.pages.high,
            samples: t.pages.samples,
            interval95: [t.pages.mean; 2],
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // helpers are not known to be tests
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    /// Looks of 50 ms with these pages in them.
    fn series(looks: &[Vec<u64>]) -> Series {
        let (mut series, mut last) = (Series::new(), BTreeMap::new());
        for (at, pages) in (1..).zip(looks) {
            let number = series.begin(Duration::from_millis(50) * at).unwrap();
            for page in pages {
                series.written(last.insert(*page, number).unwrap_or(0));
            }
            series.end();
        }
        series
    }

    #[test]
    fn each_window_of_a_time_counts_its_pages_once() {
        // xorshift, 30 looks of up to 20 pages out of 40.
        let mut random = 7u64;
        let mut next = |below: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        let looks: Vec<Vec<u64>> = (0..30)
            .map(|_| {
                let pages: BTreeSet<u64> = (0..next(21)).map(|_| next(40)).collect();
                pages.into_iter().collect()
            })
            .collect();
        let curve = series(&looks).curve();
        for (point, width) in curve.iter().zip([1usize, 2, 4, 10, 20]) {
            let unique =
                |window: &[Vec<u64>]| window.iter().flatten().collect::<BTreeSet<_>>().len();
            let counts: Vec<f64> = looks.windows(width).map(|w| unique(w) as f64).collect();
            let mean = counts.iter().sum::<f64>() / counts.len() as f64;
            assert_eq!(point.samples, counts.len() as u64, "{point:?}");
            assert!((point.pages - mean).abs() < 1e-9, "{point:?}, not {mean}");
            assert_eq!(point.high, counts.iter().copied().fold(0.0, f64::max));
        }
        assert_eq!(curve.len(), 5, "1.5 s have no window of 2 s");
    }

    #[test]
    fn looks_that_come_late_are_no_windows_of_a_shorter_time() {
        let mut series = Series::new();
        for at in 1..=5 {
            series.begin(Duration::from_millis(90) * at).unwrap();
            series.end();
        }
        let times: Vec<f64> = series.curve().iter().map(|p| p.ms).collect();
        assert_eq!(times, [100.0, 200.0]);
    }

    #[test]
    fn what_is_forgotten_is_no_window_any_more() {
        let mut series = Series::new();
        let day = Duration::from_secs(86_400);
        for at in 0..100 {
            series.begin(day + Duration::from_secs(60) * at).unwrap();
            // One page, which the look before has seen.
            series.written(at);
            series.end();
        }
        assert!(series.looks.len() < 10, "{}", series.looks.len());
        let curve = series.curve();
        let points: Vec<_> = curve.iter().map(|p| (p.ms, p.pages)).collect();
        assert_eq!(points, [(60e3, 1.0), (120e3, 1.0), (300e3, 1.0)]);
    }
}
