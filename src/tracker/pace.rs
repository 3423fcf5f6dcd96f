//! When the reaper looks at the dirty rings, and when it empties them: as each ring's own fill asks for.
//!
//! A look reads the flags of some entries and makes no call. Emptying makes KVM arm every page again, and the guest has a
//! fault for each that it writes once more. So rings are looked at often, and emptied as late as is safe.

use std::collections::BTreeMap;
use std::time::Duration;

use gleaner_ring::RingLevel;

/// Longest time between two looks at a guest that writes: a vCPU, which has a fault for each page and takes about a
/// microsecond for it, fills a third of the usual 65,536 entries meanwhile.
pub(super) const SLOWEST: Duration = Duration::from_millis(20);
/// Longest one while nothing happens. A vCPU that begins to write faster than any before may find its ring full once, which
/// wakes the reaper.
const IDLE: Duration = Duration::from_millis(160);
/// Shortest one.
const FASTEST: Duration = Duration::from_micros(500);
/// Entries of a ring that KVM keeps free: 64, and 512 for a page-modification log to be flushed into.
const RESERVED: u32 = 576;

/// How fast each ring fills, by its vCPU's id.
#[derive(Debug, Default)]
pub(super) struct Pace {
    rings: BTreeMap<u64, Ring>,
    /// Since when nothing has happened.
    quiet: Duration,
}

#[derive(Debug, Default)]
struct Ring {
    /// Entries until the last look.
    dirtied: u64,
    /// Entries a second. It rises at once and falls by half: a pause is not the end.
    rate: f64,
}

/// What comes of a look.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Look {
    /// The rings are to be emptied now.
    pub(super) empty: bool,
    /// Until the next look.
    pub(super) patience: Duration,
}

impl Pace {
    /// What to do, `since` after the last look. Rings are emptied when one is a quarter full, or when somebody `asked` for
    /// it; the next look is when the first one will be half full if it goes on as it did. While none fills, looks become rare.
    pub(super) fn look(
        &mut self,
        since: Duration,
        asked: bool,
        levels: impl Iterator<Item = RingLevel>,
    ) -> Look {
        let levels: Vec<RingLevel> = levels.collect();
        let room = |level: &RingLevel| {
            let usable = level.entries.saturating_sub(RESERVED);
            usable.max(level.entries / 4)
        };
        let empty = asked || levels.iter().any(|level| level.waiting >= room(level) / 4);
        let rates: Vec<f64> = levels.iter().map(|level| self.rate(level, since)).collect();
        let writes = rates.iter().any(|rate| *rate >= 1.0);
        self.quiet = if writes {
            Duration::ZERO
        } else {
            self.quiet + since
        };
        let mut patience = self.quiet.clamp(SLOWEST, IDLE);
        for (level, rate) in levels.iter().zip(rates) {
            let waiting = if empty { 0 } else { level.waiting };
            let left = f64::from((room(level) / 2).saturating_sub(waiting));
            // Sooner than that, if ever.
            if rate * patience.as_secs_f64() > left {
                patience = patience.min(Duration::from_secs_f64(left / rate));
            }
        }
        Look {
            empty,
            patience: patience.max(FASTEST),
        }
    }

    /// Entries a second of a ring.
    #[allow(clippy::cast_precision_loss)] // entries between two looks
    fn rate(&mut self, level: &RingLevel, since: Duration) -> f64 {
        let ring = self.rings.entry(level.vcpu).or_default();
        let new = level.dirtied.saturating_sub(ring.dirtied) as f64;
        let rate = new / since.max(FASTEST).as_secs_f64();
        ring.dirtied = level.dirtied;
        ring.rate = rate.max(ring.rate / 2.0);
        ring.rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENTRIES: u32 = 65_536;

    /// A ring that fills at a rate of entries a second, and is emptied when a look says so: how full it got at most, and how
    /// many looks and emptyings there were.
    struct Run {
        most: u64,
        looks: u32,
        emptied: u32,
    }

    fn run(rates: &[u64], entries: u32, lasting: Duration) -> Run {
        let mut pace = Pace::default();
        let mut levels: Vec<RingLevel> = (0..)
            .zip(rates)
            .map(|(vcpu, _)| RingLevel {
                vcpu,
                dirtied: 0,
                waiting: 0,
                entries,
            })
            .collect();
        let (mut now, mut patience) = (Duration::ZERO, SLOWEST);
        let mut run = Run {
            most: 0,
            looks: 0,
            emptied: 0,
        };
        while now < lasting {
            now += patience;
            for (level, rate) in levels.iter_mut().zip(rates) {
                let dirtied = rate * u64::try_from(now.as_micros()).unwrap_or(u64::MAX) / 1_000_000;
                level.waiting += u32::try_from(dirtied - level.dirtied).unwrap_or(u32::MAX);
                level.dirtied = dirtied;
                // Before the first look nothing is known of it.
                if run.looks > 0 {
                    run.most = run.most.max(level.waiting.into());
                }
            }
            let look = pace.look(patience, false, levels.iter().copied());
            run.looks += 1;
            run.emptied += u32::from(look.empty);
            if look.empty {
                levels.iter_mut().for_each(|level| level.waiting = 0);
            }
            patience = look.patience;
        }
        run
    }

    #[test]
    fn no_ring_is_more_than_about_half_full_at_any_rate_that_a_fault_a_page_allows() {
        for rate in [1, 1000, 50_000, 400_000, 900_000, 1_500_000] {
            let run = run(&[rate, 7], ENTRIES, Duration::from_secs(2));
            assert!(
                run.most <= u64::from(ENTRIES) * 52 / 100,
                "{rate}: {}",
                run.most
            );
        }
    }

    #[test]
    fn a_small_ring_is_looked_at_as_often_as_it_needs() {
        let run = run(&[200_000], 4096, Duration::from_secs(1));
        assert!(run.most <= 1800, "{} of 4096 entries", run.most);
    }

    #[test]
    fn rings_are_emptied_no_more_often_than_they_fill_and_not_at_all_when_nothing_happens() {
        let second = Duration::from_secs(1);
        let busy = run(&[800_000], ENTRIES, second);
        let least = 800_000 / (ENTRIES - RESERVED);
        assert!(
            (least..=4 * least).contains(&busy.emptied),
            "{}",
            busy.emptied
        );
        let idle = run(&[0, 0], ENTRIES, 10 * second);
        assert_eq!(idle.emptied, 0);
        assert!(idle.looks < 70, "{} looks", idle.looks);
    }

    #[test]
    fn the_next_look_is_when_the_ring_will_be_half_full() {
        let level = RingLevel {
            vcpu: 3,
            dirtied: 800,
            waiting: 800,
            entries: 4096,
        };
        // 3520 entries are usable: 960 are left up to the half, and 800 came in 1 ms.
        let look = Pace::default().look(Duration::from_millis(1), false, std::iter::once(level));
        assert!(!look.empty);
        assert_eq!(look.patience, Duration::from_micros(1200));
    }

    #[test]
    fn whoever_asks_is_served_whatever_the_rings_hold() {
        let look = Pace::default().look(SLOWEST, true, std::iter::empty());
        assert!(look.empty);
    }
}
