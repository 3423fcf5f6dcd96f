//! What a vCPU may dirty: a budget that grows with time.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use super::throttle::SLICE;

/// A vCPU that has dirtied less than it may keeps that for so long.
const KEPT: Duration = Duration::from_millis(100);
/// One that has dirtied more than it may owes no more than so long: what it has dirtied is known late, where rings fill
/// slowly.
const OWED: Duration = Duration::from_secs(10);
/// The longest rest: with a slice between two, 99 % of the time.
const LONGEST: u32 = 99;

/// The budgets of all vCPUs under one order.
#[derive(Debug, Default)]
pub(super) struct Allowances {
    order: u64,
    by_vcpu: BTreeMap<u64, Allowance>,
}

impl Allowances {
    /// vCPUs have dirtied so many pages in all, by their ids: which have to rest, and until when, so that each comes to its
    /// rate in pages a second, if it has one. What they dirtied under another order is no debt under this one.
    #[allow(clippy::cast_precision_loss)] // pages a second
    pub(super) fn look(
        &mut self,
        order: u64,
        dirtied: &[(u64, u64)],
        now: Instant,
        rate: &dyn Fn(u64) -> Option<NonZeroU64>,
    ) -> Vec<(u64, Instant)> {
        if self.order != order {
            self.order = order;
            self.by_vcpu.clear();
        }
        let rests = dirtied.iter().filter_map(|&(vcpu, pages)| {
            let rate = rate(vcpu)?.get() as f64;
            let allowance = self.by_vcpu.entry(vcpu);
            let allowance = allowance.or_insert_with(|| Allowance::new(pages, now));
            Some((vcpu, allowance.look(pages, now, rate)?))
        });
        rests.collect()
    }
}

/// One vCPU's budget.
#[derive(Clone, Copy, Debug)]
struct Allowance {
    /// Pages it had dirtied when this was looked at last, and when that was.
    dirtied: u64,
    at: Instant,
    /// Pages that it may still dirty; below zero if it has to rest until it may.
    left: f64,
    /// It does not rest again before, or it would rest for ever when its rests end just before a look.
    runs_until: Instant,
}

impl Allowance {
    /// A vCPU that has dirtied so many pages, before anything was taken from it.
    const fn new(dirtied: u64, now: Instant) -> Self {
        Self {
            dirtied,
            at: now,
            left: 0.0,
            runs_until: now,
        }
    }

    /// It has dirtied so many pages in all: until when it rests so that it comes to `rate` pages a second, if it does.
    #[allow(clippy::cast_precision_loss)] // pages of a moment
    fn look(&mut self, dirtied: u64, now: Instant, rate: f64) -> Option<Instant> {
        let time = now.saturating_duration_since(self.at).as_secs_f64();
        let pages = dirtied.saturating_sub(self.dirtied) as f64;
        let most = rate * KEPT.as_secs_f64();
        let least = -rate * OWED.as_secs_f64();
        self.left = (self.left + time * rate).min(most) - pages;
        self.left = self.left.max(least);
        (self.dirtied, self.at) = (dirtied, now);
        if self.left >= 0.0 || now < self.runs_until {
            return None;
        }
        let owed = Duration::from_secs_f64(-self.left / rate);
        let until = now + owed.min(SLICE * LONGEST);
        self.runs_until = until + SLICE;
        Some(until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A vCPU that dirties `speed` pages a second whenever it does not rest, of which is known every `known` slices; what
    /// it came to, and its share of rest.
    fn run_known(speed: f64, rate: f64, known: u32) -> (f64, f64) {
        const SECONDS: u32 = 60;
        let start = Instant::now();
        let mut allowance = Allowance::new(7, start);
        let (mut dirtied, mut rested, mut until) = (7.0, 0u32, start);
        let mut seen = dirtied;
        let slices = SECONDS * 100;
        for n in 1..=slices {
            let now = start + SLICE * n;
            // It rests whole slices here.
            if until >= now {
                rested += 1;
            } else {
                dirtied += speed * SLICE.as_secs_f64();
            }
            if n % known == 0 {
                seen = dirtied;
            }
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            if let Some(later) = allowance.look(seen as u64, now, rate) {
                until = later;
            }
        }
        (
            dirtied / f64::from(SECONDS),
            f64::from(rested) / f64::from(slices),
        )
    }

    fn run(speed: f64, rate: f64) -> (f64, f64) {
        run_known(speed, rate, 1)
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

    /// Rings are emptied ten times a second when they fill slowly.
    #[test]
    fn who_is_known_late_to_write_more_comes_to_it_too() {
        for (speed, rate) in [(10_000.0, 512.0), (1e5, 5e3), (2000.0, 1000.0)] {
            for known in [7, 10, 13] {
                let (reached, _) = run_known(speed, rate, known);
                assert!(
                    (reached / rate - 1.0).abs() < 0.1,
                    "{speed} {rate}, every {known}: {reached}"
                );
            }
        }
    }

    #[test]
    fn nobody_rests_for_ever() {
        let (reached, rested) = run(1e6, 1.0);
        assert!((0.98..0.995).contains(&rested), "{rested}");
        assert!(reached > 5000.0, "{reached}");
    }

    /// Its rests, the longest there are, end just before a look.
    #[test]
    fn whenever_it_is_looked_at_a_vcpu_runs_a_slice_between_two_rests() {
        let look = SLICE + SLICE / 1000;
        let mut now = Instant::now();
        let mut allowance = Allowance::new(0, now);
        let (mut dirtied, mut ran, mut until) = (0, Duration::ZERO, now);
        for _ in 0..10_000 {
            let next = now + look;
            let free = next.saturating_duration_since(until.max(now));
            ran += free;
            dirtied += u64::try_from(free.as_micros()).unwrap();
            now = next;
            if let Some(later) = allowance.look(dirtied, now, 1.0) {
                until = later;
            }
        }
        let share = ran.as_secs_f64() / (look * 10_000).as_secs_f64();
        assert!((0.01..0.02).contains(&share), "{share}");
    }

    #[test]
    fn what_was_dirtied_under_another_order_is_no_debt() {
        let (start, one) = (Instant::now(), NonZeroU64::MIN);
        let mut allowances = Allowances::default();
        let mut rests = |order, pages, slices| {
            let rests =
                allowances.look(order, &[(3, pages)], start + SLICE * slices, &|_| Some(one));
            !rests.is_empty()
        };
        assert!(!rests(1, 7, 0));
        assert!(rests(1, 9, 1));
        assert!(!rests(3, 1000, 200));
        assert!(!rests(3, 1000, 201));
        assert!(rests(3, 1001, 202));
    }
}
