//! What was measured so far.

use std::collections::VecDeque;
use std::time::Duration;

use super::Bounds;
use crate::Throttle;

/// What a round measured.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Round {
    /// Pages sent with their contents.
    pub pages: u64,
    /// Pages sent as zeros.
    pub zero_pages: u64,
    /// Bytes written to the stream.
    pub bytes: u64,
    /// Seconds from its first lease to its last acknowledgement.
    pub seconds: f64,
    /// Pages dirty after it. Those that were written before their turn, and not since, are not among them where harvests
    /// while it went on told so.
    pub dirty_pages: u64,
    /// Seconds between the harvest at its end and the one at its beginning.
    pub dirty_seconds: f64,
}

/// A round and what else held while it lasted.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub(super) struct Measured {
    pub(super) round: Round,
    pub(super) harvest_seconds: f64,
    pub(super) round_trip_seconds: f64,
    pub(super) throttle: Throttle,
}

/// What is known when a decision is due, after a harvest.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct History {
    rounds: VecDeque<Measured>,
    /// Pages dirty now.
    pub remaining_pages: u64,
    /// Seconds that the last harvest took: the last one with the guest stopped will take as long.
    pub harvest_seconds: f64,
    /// Seconds from a question to its answer over the stream, as measured last.
    pub round_trip_seconds: f64,
    /// What slows the guest down.
    pub throttle: Throttle,
    /// Time since the migration began.
    pub elapsed: Duration,
    /// The most pages that were ever dirty at once: the guest's memory, because a migration begins all-dirty.
    total_pages: u64,
}

/// Rounds that are kept: enough for the shape of the dirty curve.
const KEPT: usize = 16;
/// Rounds that tell what the link carries. An older one may tell of another link.
const WINDOW: usize = 3;
/// A round that sent less than this part of the largest one says more about its overhead than about the link.
const TOO_SMALL: f64 = 0.25;

impl History {
    /// Adds a round. What it left dirty is what remains.
    pub fn push(&mut self, round: Round) {
        if self.rounds.len() == KEPT {
            self.rounds.remove(self.dispensable());
        }
        self.total_pages = self
            .total_pages
            .max(round.pages + round.zero_pages)
            .max(round.dirty_pages);
        self.remaining_pages = round.dirty_pages;
        self.rounds.push_back(Measured {
            round,
            harvest_seconds: self.harvest_seconds,
            round_trip_seconds: self.round_trip_seconds,
            throttle: self.throttle,
        });
    }

    /// Of the older half, the round that took a time most like another's: a guest that has come down to its floor takes as
    /// long for each round, and the shape of its curve is to be seen in the early ones alone.
    fn dispensable(&self) -> usize {
        let time = |m: &Measured| m.round.dirty_seconds.max(1e-6).ln();
        let times: Vec<f64> = self.rounds.iter().map(time).collect();
        let nearest = |n: usize| {
            let others = times.iter().enumerate().filter(|other| other.0 != n);
            let apart = others.map(|other| (other.1 - times[n]).abs());
            apart.fold(f64::INFINITY, f64::min)
        };
        let older = 0..times.len() / 2;
        older
            .min_by(|a, b| nearest(*a).total_cmp(&nearest(*b)))
            .unwrap_or(0)
    }

    /// What was known a round earlier; `None` when that was before the first one, or is forgotten.
    pub(super) fn before(&self) -> Option<Self> {
        let mut earlier = self.clone();
        earlier.rounds.pop_back();
        let last = earlier.rounds.back()?;
        earlier.remaining_pages = last.round.dirty_pages;
        earlier.harvest_seconds = last.harvest_seconds;
        earlier.round_trip_seconds = last.round_trip_seconds;
        earlier.throttle = last.throttle;
        Some(earlier)
    }

    /// The most that can be dirty.
    #[must_use]
    pub fn total_pages(&self) -> u64 {
        self.total_pages.max(self.remaining_pages)
    }

    /// Seconds that the last round took; none before the first.
    pub(super) fn last_seconds(&self) -> f64 {
        self.rounds.back().map_or(0.0, |last| last.round.seconds)
    }

    /// Seconds between the last two ends of rounds; none before the first round.
    pub(crate) fn dirty_seconds(&self) -> f64 {
        self.rounds
            .back()
            .map_or(0.0, |last| last.round.dirty_seconds)
    }

    /// The latest rounds that passed under the throttle in force, the last one first. All of them when there is none yet.
    pub(super) fn alike(&self) -> Vec<Round> {
        let alike: Vec<Round> = self
            .rounds
            .iter()
            .rev()
            .take_while(|measured| measured.throttle == self.throttle)
            .map(|measured| measured.round)
            .collect();
        if alike.is_empty() {
            return self.rounds.iter().rev().map(|m| m.round).collect();
        }
        alike
    }

    /// Rounds that passed under the throttle in force, as far as they are kept.
    pub(super) fn rounds_at_throttle(&self) -> usize {
        let alike = |measured: &&Measured| measured.throttle == self.throttle;
        self.rounds.iter().rev().take_while(alike).count()
    }

    /// Pages dirtied a second in the last round, as far as they are to be sent again; 0 before the first one.
    #[must_use]
    pub fn dirty_pages_per_second(&self) -> f64 {
        self.rounds.back().map_or(0.0, |last| dirtied(&last.round))
    }

    /// Pages a second that the guest may dirty in a short time: in a longer one it comes back to pages that are dirty
    /// already, so a short round shows more.
    pub(super) fn burst_pages_per_second(&self) -> Bounds {
        let last = self.dirty_pages_per_second();
        let recent = self.rounds.iter().rev().take(WINDOW);
        let most = recent.map(|m| dirtied(&m.round)).fold(0.0, f64::max);
        Bounds::new(0.0, last, 2.0 * most)
    }

    /// Seconds that a harvest takes, after the latest rounds.
    pub(super) fn harvest(&self) -> Bounds {
        self.spread(self.harvest_seconds, |measured| measured.harvest_seconds)
    }

    /// Seconds from a question to its answer, after the latest rounds.
    pub(super) fn round_trip(&self) -> Bounds {
        self.spread(self.round_trip_seconds, |m| m.round_trip_seconds)
    }

    fn spread(&self, last: f64, of: fn(&Measured) -> f64) -> Bounds {
        let recent = self.rounds.iter().rev().take(WINDOW).map(of);
        recent.fold(Bounds::new(last, last, last), |bounds, one| {
            Bounds::new(bounds.low.min(one), last, bounds.high.max(one))
        })
    }

    /// Pages a second that the way to the destination takes; `None` before anything was sent.
    ///
    /// Likely is all that the latest rounds sent in all their time; the bounds are the slowest and the fastest of them. Pages
    /// of zeros count only where hardly anything else was sent, and a round trip is no part of the rate.
    #[must_use]
    pub fn pages_per_second(&self) -> Option<Bounds> {
        let sent = |round: &Round| round.pages + round.zero_pages > 0;
        let recent: Vec<(f64, f64, f64)> = self
            .rounds
            .iter()
            .rev()
            .filter(|measured| sent(&measured.round))
            .take(WINDOW)
            .map(|measured| {
                let round = &measured.round;
                let seconds = (round.seconds - measured.round_trip_seconds)
                    .max(round.seconds / 10.0)
                    .max(1e-6);
                (round.pages as f64, round.zero_pages as f64, seconds)
            })
            .collect();
        let of = |counts: fn(&(f64, f64, f64)) -> bool, pages: fn(&(f64, f64, f64)) -> f64| {
            let counted = recent.iter().filter(|round| counts(round));
            rate(&counted.map(|r| (pages(r), r.2)).collect::<Vec<_>>())
        };
        of(|round| round.0 > 0.0 && round.0 >= round.1, |round| round.0)
            .or_else(|| of(|round| round.0 > 0.0, |round| round.0))
            .or_else(|| of(|_| true, |round| round.1))
    }

    /// Bytes on the stream for a page with contents, in the latest rounds that had any: less than a page where they are
    /// compressed.
    #[must_use]
    pub fn bytes_per_page(&self) -> f64 {
        let recent = self.rounds.iter().rev().map(|m| &m.round);
        let (pages, bytes) = recent
            .filter(|round| round.pages > 0 && round.bytes > 0)
            .take(WINDOW)
            .fold((0, 0), |sum, r| (sum.0 + r.pages, sum.1 + r.bytes));
        match pages {
            0 => gleaner_bitmap::PAGE_SIZE as f64,
            pages => bytes as f64 / pages as f64,
        }
    }
}

fn dirtied(round: &Round) -> f64 {
    round.dirty_pages as f64 / round.dirty_seconds.max(1e-6)
}

/// Of (pages, seconds).
fn rate(rounds: &[(f64, f64)]) -> Option<Bounds> {
    let most = rounds.iter().map(|r| r.0).reduce(f64::max)?;
    let (pages, seconds) = rounds
        .iter()
        .fold((0.0, 0.0), |sum, r| (sum.0 + r.0, sum.1 + r.1));
    let telling = rounds.iter().filter(|r| r.0 >= TOO_SMALL * most);
    let rates: Vec<f64> = telling.map(|r| r.0 / r.1).collect();
    Some(Bounds::new(
        rates.iter().copied().fold(f64::INFINITY, f64::min),
        pages / seconds,
        rates.iter().copied().fold(0.0, f64::max),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(pages: u64, zero_pages: u64, seconds: f64) -> Round {
        Round {
            pages,
            zero_pages,
            seconds,
            ..Round::default()
        }
    }

    fn rate_of(rounds: &[Round]) -> Bounds {
        let mut history = History::default();
        rounds.iter().for_each(|r| history.push(*r));
        history.pages_per_second().unwrap_or_default()
    }

    #[test]
    fn zeros_do_not_make_the_link_look_fast() {
        let rate = rate_of(&[round(100_000, 0, 1.0), round(0, 10_000_000, 1.0)]);
        assert_eq!(rate.likely, 100_000.0);
        // Nor slow, where a few contents came among them.
        let rate = rate_of(&[round(100_000, 0, 1.0), round(10, 10_000_000, 1.0)]);
        assert_eq!(rate.likely, 100_000.0);
        assert_eq!(rate_of(&[round(0, 500, 0.5)]).likely, 1000.0);
        assert_eq!(History::default().pages_per_second(), None);
    }

    #[test]
    fn an_old_rate_is_forgotten() {
        let mut rounds = vec![round(100_000, 0, 1.0)];
        rounds.extend([round(1000, 0, 1.0); WINDOW]);
        let rate = rate_of(&rounds);
        assert_eq!((rate.likely, rate.high), (1000.0, 1000.0));
    }

    #[test]
    fn a_few_pages_on_a_long_way_do_not_make_the_link_look_slow() {
        let mut history = History::default();
        history.push(round(100_000, 0, 1.0));
        history.round_trip_seconds = 0.050;
        history.push(round(10, 0, 0.051));
        let rate = history.pages_per_second().unwrap_or_default();
        assert!(rate.low > 90_000.0, "{rate:?}");
    }

    #[test]
    fn rates_that_differ_are_the_bounds() {
        let rate = rate_of(&[round(1000, 0, 1.0), round(1000, 0, 2.0)]);
        assert_eq!((rate.low, rate.high), (500.0, 1000.0));
        assert!(rate.low < rate.likely && rate.likely < rate.high);
    }

    #[test]
    fn a_round_earlier_is_what_was_known_then() {
        let mut history = History::default();
        let mut seen = Vec::new();
        for n in 1..6u32 {
            history.harvest_seconds = f64::from(n);
            history.push(Round {
                dirty_pages: n.into(),
                ..round(10, 0, 1.0)
            });
            seen.push(history.clone());
        }
        let earlier = history.before();
        assert_eq!(earlier.as_ref(), seen.get(3));
        assert_eq!(History::default().before(), None);
    }
}
