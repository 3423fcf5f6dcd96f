//! A migration in virtual time: rounds over a link, as decided, with a guest that is a formula.

use std::time::Duration;

use super::{BUILD, Decision, GO, History, Round, STATE, STOP, Verdict};
use crate::Throttle;

/// The way to the destination, and what a harvest costs.
#[derive(Clone, Copy)]
pub(crate) struct Road {
    /// Pages a second.
    pub(crate) rate: f64,
    /// Seconds.
    pub(crate) round_trip: f64,
    /// Seconds.
    pub(crate) harvest: f64,
}

impl Road {
    /// Seconds from the decision to switch over until the guest stands still: what it dirties in them is left as well.
    pub(crate) fn stopping(&self) -> f64 {
        self.harvest + STOP.likely
    }

    /// Seconds of downtime with so many pages left when the guest stands still.
    pub(crate) fn downtime(&self, pages: f64) -> f64 {
        let built = STATE.likely + BUILD.likely + GO.likely;
        self.stopping() + pages / self.rate + 3.0 * self.round_trip + built
    }
}

/// Where it led to.
#[derive(Debug)]
pub(crate) struct Course {
    /// The last decision.
    pub(crate) last: Decision,
    /// Rounds with the guest running.
    pub(crate) rounds: u32,
    /// Seconds until the last decision.
    pub(crate) seconds: f64,
    /// Pages sent until then.
    pub(crate) sent: f64,
    /// Pages left then.
    pub(crate) remaining: f64,
    /// What slows the guest then.
    pub(crate) throttle: Throttle,
}

/// Rounds that begin with `pages`, until `choose` switches over or gives up, at most `rounds`. `dirtied` tells the pages
/// that the guest dirties from one moment to another (seconds) under a throttle.
pub(crate) fn rehearse(
    road: Road,
    pages: f64,
    rounds: u32,
    mut dirtied: impl FnMut(f64, f64, Throttle) -> f64,
    mut choose: impl FnMut(&History) -> Decision,
) -> Course {
    let mut history = History::default();
    history.harvest_seconds = road.harvest;
    history.round_trip_seconds = road.round_trip;
    let (mut now, mut remaining, mut sent) = (0.0, pages, 0.0);
    let mut number = 0;
    loop {
        number += 1;
        let began = now;
        let seconds = remaining / road.rate + road.round_trip;
        now += seconds + road.round_trip + road.harvest;
        sent += remaining;
        let dirty = dirtied(began, now, history.throttle).floor();
        history.push(Round {
            pages: count(remaining),
            zero_pages: 0,
            bytes: count(remaining * gleaner_bitmap::PAGE_SIZE as f64),
            seconds,
            dirty_pages: count(dirty),
            dirty_seconds: now - began,
        });
        history.elapsed = Duration::try_from_secs_f64(now).unwrap_or(Duration::MAX);
        remaining = dirty;
        let last = choose(&history);
        if let Verdict::Throttle(throttle) = last.verdict {
            history.throttle = throttle;
        }
        let over = matches!(last.verdict, Verdict::SwitchOver | Verdict::GiveUp);
        if over || number >= rounds {
            return Course {
                last,
                rounds: number,
                seconds: now,
                sent,
                remaining,
                throttle: history.throttle,
            };
        }
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // saturates
fn count(pages: f64) -> u64 {
    pages as u64
}
