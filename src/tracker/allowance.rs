//! What a vCPU may dirty: a budget that grows with time.

use std::time::{Duration, Instant};

use super::throttle::SLICE;

/// A vCPU that has dirtied less than it may keeps that for so long.
const KEPT: Duration = Duration::from_millis(100);
/// The longest rest: with a slice between two, 99 % of the time.
const LONGEST: u32 = 99;

/// One vCPU's budget.
#[derive(Clone, Copy, Debug)]
pub(super) struct Allowance {
    /// Pages it had dirtied when this was looked at last, and when that was.
    dirtied: u64,
    at: Instant,
    /// Pages that it may still dirty; below zero if it has to rest until it may.
    left: f64,
}

impl Allowance {
    /// A vCPU that has dirtied so many pages, before anything was taken from it.
    pub(super) const fn new(dirtied: u64, now: Instant) -> Self {
        Self {
            dirtied,
            at: now,
            left: 0.0,
        }
    }

    /// It has dirtied so many pages in all: until when it rests so that it comes to `rate` pages a second, if it does.
    #[allow(clippy::cast_precision_loss)] // pages of a moment
    pub(super) fn look(&mut self, dirtied: u64, now: Instant, rate: f64) -> Option<Instant> {
        let time = now.saturating_duration_since(self.at).as_secs_f64();
        let pages = dirtied.saturating_sub(self.dirtied) as f64;
        let most = rate * KEPT.as_secs_f64();
        let least = -rate * (SLICE * LONGEST).as_secs_f64();
        self.left = (self.left + time * rate).min(most) - pages;
        self.left = self.left.max(least);
        (self.dirtied, self.at) = (dirtied, now);
        (self.left < 0.0).then(|| now + Duration::from_secs_f64(-self.left / rate))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A vCPU that dirties `speed` pages a second whenever it does not rest; what it came to, and its share of rest.
    fn run(speed: f64, rate: f64) -> (f64, f64) {
        const SECONDS: u32 = 60;
        let start = Instant::now();
        let mut allowance = Allowance::new(7, start);
        let (mut dirtied, mut rested, mut until) = (7.0, 0u32, start);
        let slices = SECONDS * 100;
        for n in 1..=slices {
            let now = start + SLICE * n;
            // It rests whole slices here.
            if until >= now {
                rested += 1;
            } else {
                dirtied += speed * SLICE.as_secs_f64();
            }
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            if let Some(later) = allowance.look(dirtied as u64, now, rate) {
                until = later;
            }
        }
        (
            dirtied / f64::from(SECONDS),
            f64::from(rested) / f64::from(slices),
        )
    }

    #[test]
    fn who_writes_less_than_it_may_never_rests() {
        assert_eq!(run(999.0, 1000.0).1, 0.0);
        assert_eq!(run(0.0, 1.0).1, 0.0);
    }

    #[test]
    fn who_writes_more_comes_to_what_it_may() {
        for (speed, rate) in [(1100.0, 1000.0), (5000.0, 1000.0), (1e6, 5e4), (1e6, 2e4)] {
            let (reached, rested) = run(speed, rate);
            assert!(
                (reached / rate - 1.0).abs() < 0.05,
                "{speed} {rate}: {reached}"
            );
            assert!(
                (rested - (1.0 - rate / speed)).abs() < 0.05,
                "{speed} {rate}: {rested}"
            );
        }
    }

    #[test]
    fn nobody_rests_for_ever() {
        let (reached, rested) = run(1e6, 1.0);
        assert!((0.98..0.995).contains(&rested), "{rested}");
        assert!(reached > 5000.0, "{reached}");
    }
}
