//! Throttles, one after the other.

use std::num::NonZeroU64;

use super::{Forecast, Goal, History};
use crate::{Error, Result, Throttle, Throttles};

/// What of a guest that does not converge is slowed down.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ThrottleGoal {
    /// Nothing.
    #[default]
    Never,
    /// What hurts the guest least, of what its source can slow down.
    Auto,
    /// All vCPUs alike.
    All,
    /// vCPUs that dirty too much memory, and no other.
    Writers,
}

impl ThrottleGoal {
    /// With a source that can do `able`.
    pub(crate) fn of(self, able: Throttles) -> Result<Throttles> {
        let what = match self {
            Self::Never => return Ok(Throttles::Nothing),
            Self::Auto => return Ok(able),
            Self::All if able >= Throttles::All => return Ok(Throttles::All),
            Self::Writers if able >= Throttles::Writers => return Ok(Throttles::Writers),
            Self::All => "throttle its vCPUs",
            Self::Writers => "tell which vCPU writes, so it can't throttle writers alone",
        };
        Err(Error::Unable { what })
    }
}

/// Rounds under one throttle before the next step: the first one may have begun under the last.
const ROUNDS: usize = 2;
/// The first step for all vCPUs, in percent, and what each further one adds: as QEMU's auto-converge does.
const FIRST: u8 = 20;
const STEP: u8 = 10;
const MOST: u8 = 99;
/// The share of what the link carries that the guest may dirty. A half of what is left goes with each round then.
const WRITERS: f64 = 0.5;
/// What is left of a limit at a further step, at most.
const WRITERS_STEP: f64 = 0.7;
/// A vCPU may always dirty this part of what the link carries.
const WRITERS_LEAST: f64 = 0.001;

/// The next throttle, when it is time for one.
pub(super) enum Step {
    /// Not wished for, of no use, or too early to tell.
    None,
    /// This one.
    To(Throttle),
    /// There is no further one.
    Exhausted,
}

/// For a guest that does not converge.
pub(super) fn next(history: &History, goal: &Goal, forecast: &Forecast) -> Step {
    // No throttle lessens the costs that do not depend on the guest.
    if goal.throttle == Throttles::Nothing || goal.held.is_some() || forecast.needs.share == 0.0 {
        return Step::None;
    }
    if history.rounds_at_throttle() < ROUNDS || !was_as_bad(history, goal) {
        return Step::None;
    }
    let next = match goal.throttle {
        Throttles::Nothing => return Step::None,
        Throttles::All => all(history.throttle),
        Throttles::Writers => writers(history, goal),
    };
    match next {
        Some(throttle) => Step::To(throttle),
        None if history.throttle != Throttle::Off => Step::Exhausted,
        None => Step::None,
    }
}

/// It did not converge a round earlier either.
fn was_as_bad(history: &History, goal: &Goal) -> bool {
    let earlier = history.before();
    earlier
        .and_then(|earlier| Forecast::of(&earlier, goal.downtime_limit))
        .is_some_and(|forecast| !forecast.converges)
}

fn all(now: Throttle) -> Option<Throttle> {
    match now {
        Throttle::All { percent } if percent >= MOST => None,
        Throttle::All { percent } => Some(Throttle::All {
            percent: percent.saturating_add(STEP).min(MOST),
        }),
        _ => Some(Throttle::All { percent: FIRST }),
    }
}

/// What each vCPU may dirty. How many of them write is not known: at first it is what the guest may dirty if one does, and
/// what it dirties then tells how much less is enough.
fn writers(history: &History, goal: &Goal) -> Option<Throttle> {
    let carried = history.pages_per_second()?.low;
    // What is dirtied during the overhead of a round is to fit into the limit as well.
    let overhead = history.harvest().likely + 2.0 * history.round_trip().likely;
    let limit = goal.downtime_limit.as_secs_f64();
    let wanted = WRITERS * carried * limit / (limit + overhead);
    let least = whole(carried * WRITERS_LEAST);
    let pages_per_second = match history.throttle {
        Throttle::Writers { pages_per_second } if pages_per_second <= least => return None,
        Throttle::Writers { pages_per_second } => {
            let enough = wanted / history.dirty_pages_per_second().max(1.0);
            whole(pages_per_second.get() as f64 * enough.min(WRITERS_STEP))
        }
        _ => whole(wanted),
    };
    Some(Throttle::Writers {
        pages_per_second: pages_per_second.max(least),
    })
}

/// At least one.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // saturates
fn whole(pages: f64) -> NonZeroU64 {
    NonZeroU64::new(pages as u64).unwrap_or(NonZeroU64::MIN)
}
