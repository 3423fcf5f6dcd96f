//! A trace through a rule.

use std::cell::RefCell;
use std::time::Duration;

use gleaner_bitmap::PAGE_SIZE;
use serde::{Serialize, Serializer};

use super::guest::TracedGuest;
use super::rule::{Chooser, Rule};
use crate::policy::rehearsal::{Road, rehearse};
use crate::policy::{Decision, Goal, OnTimeout, Verdict};
use crate::trace::Trace;
use crate::units::{YEAR, within_a_year};
use crate::{CancelToken, Error, Result, Throttle, Throttles};

/// What a migration is to be like.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Terms {
    /// Bytes a second that the link carries.
    pub bandwidth: u64,
    /// From a question to its answer.
    pub round_trip: Duration,
    /// The most downtime.
    pub downtime_limit: Duration,
    /// The most time in total. None: as long as it takes to send all memory 20 times over and to go through the trace once,
    /// and at least 10 min, but a year at most.
    pub timeout: Option<Duration>,
    /// What happens then.
    pub on_timeout: OnTimeout,
}

/// How a migration by a rule would go. In JSON a time over a year is null, and the reason says so.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Outcome {
    /// The rule.
    pub rule: Rule,
    /// The guest was moved; else the time was over.
    pub moved: bool,
    /// Rounds, the last one with the guest stopped included.
    pub rounds: u32,
    /// Milliseconds from start to end.
    #[serde(serialize_with = "milliseconds")]
    pub total_ms: f64,
    /// Bytes of page contents.
    pub bytes: f64,
    /// Milliseconds in which the guest runs nowhere; 0 when it was not moved.
    #[serde(serialize_with = "milliseconds")]
    pub downtime_ms: f64,
    /// Milliseconds of it over the limit.
    #[serde(serialize_with = "milliseconds")]
    pub overshoot_ms: f64,
    /// What slowed the guest in the end.
    pub throttle: Throttle,
    /// Why it ended, for people.
    pub reason: String,
}

/// Seconds of a harvest: of a small guest, and what each page that it has adds (10 ms for 1 TiB).
const HARVEST: f64 = 0.001;
const HARVEST_PAGE: f64 = 40e-12;

impl Terms {
    /// The most time that a replay takes.
    #[must_use]
    pub fn horizon(&self, trace: &Trace) -> Duration {
        const LEAST: f64 = 600.0;
        self.timeout.unwrap_or_else(|| {
            let once = trace.total_pages() as f64 / self.pages_per_second();
            let long = (20.0 * once + trace.microseconds() as f64 / 1e6).max(LEAST);
            Duration::from_secs_f64(long.min(YEAR))
        })
    }

    fn pages_per_second(&self) -> f64 {
        self.bandwidth.max(1) as f64 / PAGE_SIZE as f64
    }

    fn road(&self, trace: &Trace, early: bool) -> Road {
        Road {
            rate: self.pages_per_second(),
            round_trip: self.round_trip.as_secs_f64(),
            harvest: HARVEST + HARVEST_PAGE * trace.total_pages() as f64,
            early,
        }
    }
}

/// Lets the guest of a trace be migrated as a rule says. A round takes at least the time of a harvest, so a replay ends with
/// [`Terms::horizon`] if not before.
///
/// # Errors
/// [`Error::Cancelled`] soon after `cancel` was used.
pub fn replay(trace: &Trace, terms: &Terms, rule: Rule, cancel: &CancelToken) -> Result<Outcome> {
    replay_in(trace, terms, rule, rule.harvests_early(), cancel)
}

/// In rounds that are harvested while they go on, or not.
pub(super) fn replay_in(
    trace: &Trace,
    terms: &Terms,
    rule: Rule,
    early: bool,
    cancel: &CancelToken,
) -> Result<Outcome> {
    let road = terms.road(trace, early);
    let pages = trace.total_pages();
    let goal = Goal {
        downtime_limit: terms.downtime_limit,
        timeout: Some(terms.horizon(trace)),
        on_timeout: terms.on_timeout,
        throttle: Throttles::Nothing,
        held: None,
    };
    let guest = RefCell::new(TracedGuest::new(trace).until(cancel));
    let mut chooser = Chooser::new(rule, goal, pages);
    let went = rehearse(
        road,
        pages as f64,
        u32::MAX,
        |leg| guest.borrow_mut().round(leg),
        |history| {
            if cancel.is_cancelled() {
                return called_off();
            }
            chooser.choose(history, || {
                let late = guest.borrow_mut().more(road.stopping(), history.throttle);
                road.downtime(history.remaining_pages as f64 + late)
            })
        },
    );
    if cancel.is_cancelled() {
        return Err(Error::Cancelled);
    }
    let moved = went.last.verdict == Verdict::SwitchOver;
    let late = guest.borrow_mut().more(road.stopping(), went.throttle);
    let left = if moved { went.remaining + late } else { 0.0 };
    let downtime = if moved { road.downtime(left) } else { 0.0 };
    let limit = terms.downtime_limit.as_secs_f64();
    let total = went.seconds + downtime;
    let mut reason = went.last.reason;
    if total > YEAR {
        reason.push_str("; it takes over a year");
    }
    Ok(Outcome {
        rule,
        moved,
        rounds: went.rounds + u32::from(moved),
        total_ms: total * 1e3,
        bytes: (went.sent + left) * PAGE_SIZE as f64,
        downtime_ms: downtime * 1e3,
        overshoot_ms: (downtime - limit).max(0.0) * 1e3,
        throttle: went.throttle,
        reason,
    })
}

/// Ends the rounds of a replay that nobody waits for any more.
fn called_off() -> Decision {
    Decision {
        verdict: Verdict::GiveUp,
        forecast: None,
        reason: Error::Cancelled.to_string(),
    }
}

#[allow(clippy::trivially_copy_pass_by_ref)] // as serde calls it
fn milliseconds<S: Serializer>(ms: &f64, to: S) -> std::result::Result<S::Ok, S::Error> {
    within_a_year(*ms).serialize(to)
}
