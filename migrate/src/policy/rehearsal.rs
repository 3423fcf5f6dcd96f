//! A migration in virtual time: rounds over a link, as decided, with a guest that is a formula.

use std::time::Duration;

use super::{BUILD, Decision, GO, History, Round, STATE, STOP, Verdict};
use crate::{Throttle, early};

/// The way to the destination, and what a harvest costs.
#[derive(Clone, Copy)]
pub(crate) struct Road {
    /// Pages a second.
    pub(crate) rate: f64,
    /// Seconds.
    pub(crate) round_trip: f64,
    /// Seconds.
    pub(crate) harvest: f64,
    /// Rounds are harvested while they go on.
    pub(crate) early: bool,
}

/// A round that is under way.
#[derive(Clone, Copy)]
pub(crate) struct Leg {
    /// When it begins and ends: seconds.
    pub(crate) from: f64,
    pub(crate) to: f64,
    /// Pages that it sends.
    pub(crate) pages: f64,
    /// Pages of a part, with a harvest between two: the last part has fewer.
    pub(crate) part: f64,
    /// Seconds that one takes, with the harvest after it. The last one takes the rest.
    pub(crate) part_seconds: f64,
    /// What slows the guest.
    pub(crate) throttle: Throttle,
}

impl Leg {
    /// Parts that it is sent in.
    pub(crate) fn parts(&self) -> u32 {
        whole((self.pages / self.part).ceil()).max(1)
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // saturates
fn whole(parts: f64) -> u32 {
    parts as u32
}

impl Road {
    /// Seconds from the decision to switch over until the guest stands still: what it dirties in them is left as well.
    pub(crate) fn stopping(&self) -> f64 {
        self.harvest + STOP.likely
    }

    /// A round of so many pages that begins then, and the seconds until its last acknowledgement.
    fn leg(&self, from: f64, pages: f64, throttle: Throttle) -> (Leg, f64) {
        let part = match self.early {
            true => early::part(pages, self.rate, self.harvest),
            false => pages.max(1.0),
        };
        let between = (pages / part).ceil().max(1.0) - 1.0;
        let seconds = pages / self.rate + between * self.harvest + self.round_trip;
        let leg = Leg {
            from,
            to: from + seconds + self.round_trip + self.harvest,
            pages,
            part,
            part_seconds: part / self.rate + self.harvest,
            throttle,
        };
        (leg, seconds)
    }

    /// Seconds of downtime with so many pages left when the guest stands still. Where none are, none are waited for.
    pub(crate) fn downtime(&self, pages: f64) -> f64 {
        let built = STATE.likely + BUILD.likely + GO.likely;
        let round_trips = 2.0 + pages.min(1.0);
        self.stopping() + pages / self.rate + round_trips * self.round_trip + built
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
    /// What is known then.
    pub(crate) history: History,
}

/// Rounds that begin with `pages`, until `choose` switches over or gives up, at most `rounds`. `left` tells the pages
/// that are dirty after a round.
pub(crate) fn rehearse(
    road: Road,
    pages: f64,
    rounds: u32,
    mut left: impl FnMut(Leg) -> f64,
    mut choose: impl FnMut(&History) -> Decision,
) -> Course {
    let mut history = History::default();
    history.harvest_seconds = road.harvest;
    history.round_trip_seconds = road.round_trip;
    let (mut now, mut remaining, mut sent) = (0.0, pages, 0.0);
    let mut number = 0;
    loop {
        number += 1;
        let (leg, seconds) = road.leg(now, remaining, history.throttle);
        now = leg.to;
        sent += remaining;
        let dirty = left(leg).floor();
        history.push(Round {
            pages: count(remaining),
            zero_pages: 0,
            bytes: count(remaining * gleaner_bitmap::PAGE_SIZE as f64),
            seconds,
            dirty_pages: count(dirty),
            dirty_seconds: leg.to - leg.from,
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
                history,
            };
        }
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // saturates
fn count(pages: f64) -> u64 {
    pages as u64
}
