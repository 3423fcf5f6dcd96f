//! How long a guest stood still for slot transactions, over its whole run.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Blackout;

/// The shortest time that is told apart from shorter ones; each bucket reaches twice as far as the one before.
const FIRST: Duration = Duration::from_micros(1);
/// From 1 us to 4.2 s, and whatever took longer.
const BUCKETS: usize = 24;

/// How many times were how long, by powers of two from 1 microsecond to 4.2 seconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Histogram {
    counts: [u64; BUCKETS],
    total: Duration,
    longest: Duration,
}

impl Histogram {
    fn add(&mut self, time: Duration) {
        let bucket = (0..BUCKETS - 1).find(|n| time <= FIRST * (1 << n));
        self.counts[bucket.unwrap_or(BUCKETS - 1)] += 1;
        self.total += time;
        self.longest = self.longest.max(time);
    }

    /// How many times there were.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().fold(0, |all, n| all.saturating_add(*n))
    }

    /// Their sum.
    #[must_use]
    pub const fn total(&self) -> Duration {
        self.total
    }

    /// The longest.
    #[must_use]
    pub const fn longest(&self) -> Duration {
        self.longest
    }

    /// For each bucket how far it reaches, itself included, and how many times were no longer than that. All of them are
    /// within the last one, which has no end.
    pub fn within(&self) -> impl Iterator<Item = (Option<Duration>, u64)> + '_ {
        let mut sum = 0u64;
        self.counts.iter().enumerate().map(move |(n, count)| {
            sum = sum.saturating_add(*count);
            ((n < BUCKETS - 1).then(|| FIRST * (1 << n)), sum)
        })
    }
}

/// The blackouts of all slot transactions that stopped the guest, as a whole and by [part](Blackout).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Blackouts {
    /// The guest's stalls.
    pub whole: Histogram,
    /// Until every vCPU was out of `KVM_RUN`.
    pub kick: Histogram,
    /// The harvests inside.
    pub harvest: Histogram,
    /// KVM's own calls.
    pub calls: Histogram,
    /// Everything else.
    pub rest: Histogram,
}

impl Blackouts {
    pub(super) fn add(&mut self, blackout: &Blackout) {
        self.whole.add(blackout.total());
        self.kick.add(blackout.kick);
        self.harvest.add(blackout.harvest);
        self.calls.add(blackout.calls);
        self.rest.add(blackout.rest);
    }

    /// The parts, by name.
    #[must_use]
    pub const fn parts(&self) -> [(&'static str, &Histogram); 4] {
        [
            ("kick", &self.kick),
            ("harvest", &self.harvest),
            ("calls", &self.calls),
            ("rest", &self.rest),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_time_is_within_the_bucket_that_reaches_it_and_those_after() {
        let mut histogram = Histogram::default();
        let micros = [0, 1, 2, 3, 1024, 1025, 4_194_304, 4_194_305, 60_000_000];
        for time in micros {
            histogram.add(Duration::from_micros(time));
        }
        for (reach, count) in histogram.within() {
            let reach = reach.unwrap_or(Duration::MAX);
            let within = micros
                .iter()
                .filter(|t| Duration::from_micros(**t) <= reach);
            assert_eq!(count, within.count() as u64, "{reach:?}");
        }
        assert_eq!(histogram.count(), 9);
        assert_eq!(histogram.longest(), Duration::from_secs(60));
        assert_eq!(
            histogram.total(),
            Duration::from_micros(micros.iter().sum())
        );
    }

    #[test]
    fn a_blackout_is_counted_whole_and_in_each_part() {
        let millis = Duration::from_millis;
        let mut all = Blackouts::default();
        let (kick, harvest, calls, rest) = (millis(1), millis(2), millis(4), millis(8));
        all.add(&Blackout {
            kick,
            harvest,
            calls,
            rest,
        });
        assert_eq!(all.whole.total(), millis(15));
        let parts = all
            .parts()
            .map(|(name, part)| (name, part.total(), part.count()));
        assert_eq!(
            parts,
            [
                ("kick", kick, 1),
                ("harvest", harvest, 1),
                ("calls", calls, 1),
                ("rest", rest, 1)
            ]
        );
    }
}
