//! Harvests while a round goes on.
//!
//! ```text
//! written        turn        end of the round
//!    |            |                |
//!    |   lease, send what it holds |      harvest finds the write: sent again, without need
//!    | harvest, lease, send        |      nothing left to send
//! ```
//!
//! A page that is written before its turn goes as it is then. Where only the end of a round is harvested, the write is found
//! there all the same, and the page goes again. A harvest shortly before its turn tells that it need not.
//!
//! It is not free: a page that was harvested has to be armed again, and its next write is reported once more. So a round is
//! harvested a few times and no more: of what is sent without need a sixteenth is left, and so is what harvests take.

use std::time::{Duration, Instant};

use crate::Clock;

/// Pages in a lease: 16 MiB for each connection, up to a number of them.
pub(crate) const LEASE_PAGES: u64 = 4096;

/// Parts of a round, at most, before each of which but the first one is a harvest.
const PARTS: u64 = 16;
/// And so many times as long as the last one took, at least, passes until the next.
const APART: u32 = 20;

/// Pages that are sent between two of them in a round of so many pages, whole leases, over one connection that takes so many
/// pages a second, when a harvest takes so many seconds.
pub(crate) fn part(pages: f64, rate: f64, harvest: f64) -> f64 {
    let least = (pages / PARTS as f64).max(f64::from(APART) * harvest * rate);
    (least / LEASE_PAGES as f64).ceil().max(1.0) * LEASE_PAGES as f64
}

/// When the next one is due.
pub(crate) struct Early {
    clock: Clock,
    /// Pages between two of them; none in a round without any.
    every: Option<u64>,
    /// Pages taken since the last one.
    taken: u64,
    /// When the last one was over, and how long it took.
    last: Instant,
    took: Duration,
}

impl Early {
    pub(crate) fn new(clock: Clock) -> Self {
        let last = clock.now();
        Self {
            clock,
            every: None,
            taken: 0,
            last,
            took: Duration::ZERO,
        }
    }

    /// A round of so many pages begins, after a harvest; or the rest, with the guest stopped, when nothing is written.
    pub(crate) fn begin(&mut self, pages: Option<u64>) {
        self.every = pages.map(|pages| pages.div_ceil(PARTS));
        self.taken = 0;
    }

    /// So many pages were leased.
    pub(crate) const fn took(&mut self, pages: u64) {
        self.taken += pages;
    }

    /// Whether one should come before the next lease.
    pub(crate) fn is_due(&self) -> bool {
        let far = self.every.is_some_and(|pages| self.taken >= pages);
        far && self.clock.since(self.last) >= self.took * APART
    }

    /// Harvests by `harvest`, and notes how long that takes.
    pub(crate) fn harvest<T>(&mut self, harvest: impl FnOnce() -> T) -> T {
        let began = self.clock.now();
        let harvested = harvest();
        self.last = self.clock.now();
        self.took = self.clock.since(began);
        self.taken = 0;
        harvested
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_has_few_of_them_and_little_time_goes_to_them() {
        let clock = Clock::stopped();
        let mut early = Early::new(clock.clone());
        let mut harvests = |pages: Option<u64>, costs: Duration| {
            early.begin(pages);
            let mut count = 0;
            for _ in 0..100 {
                if early.is_due() {
                    early.harvest(|| clock.sleep(costs));
                    count += 1;
                }
                clock.sleep(Duration::from_millis(10));
                early.took(1000);
            }
            count
        };
        assert_eq!(harvests(Some(100_000), Duration::ZERO), 14);
        // 1 s of sending, and 10 ms for each, the first one of which is not known to take them.
        assert_eq!(harvests(Some(100_000), Duration::from_millis(10)), 5);
        assert_eq!(harvests(None, Duration::ZERO), 0);
    }

    #[test]
    fn a_round_is_planned_in_such_parts() {
        let leases = |pages, rate, harvest| part(pages, rate, harvest) / LEASE_PAGES as f64;
        assert_eq!(leases(320.0 * 4096.0, 1e5, 0.0), 20.0);
        assert_eq!(leases(321.0 * 4096.0, 1e5, 0.0), 21.0);
        assert_eq!(leases(10.0, 1e5, 0.0), 1.0);
        // 50 ms of sending for each harvest of 2.5 ms.
        assert_eq!(leases(4096.0, 8.0 * 4096.0 / 0.05, 0.0025), 8.0);
    }
}
