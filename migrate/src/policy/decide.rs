//! The decision after each round.

use std::time::Duration;

use gleaner_bitmap::PAGE_SIZE;

use super::steps::{self, Step};
use super::{Decision, Forecast, Goal, History, OnTimeout, Verdict};
use crate::units::{Bytes, Seconds, YEAR};
use crate::{Throttle, Throttles};

/// Rounds that follow at most once a switchover is within the limit, for the sake of a shorter one.
pub const EXTRA_ROUNDS: usize = 5;
/// Another round must be forecast to take this part off the downtime.
const NOTICEABLE: f64 = 0.1;
/// And this many seconds: less is lost in the noise of schedulers and timers.
const NOISE: f64 = 0.001;

const UNKNOWN: &str = "no rate is known yet";

/// Decides what comes next. The same history and goal lead to the same decision, always.
///
/// * As long as the downtime of a switchover is over the limit, rounds go on.
/// * Within the limit, they go on while the next one is forecast to take 10 % and 1 ms off the downtime, for at most
///   [`EXTRA_ROUNDS`]: the guest is stopped where the rest is smallest, not where it fits for the first time.
/// * A guest that will not come down to the limit, as two rounds have shown, is throttled a step further where that is wished.
/// * When the time limit is over it ends, as asked.
#[must_use]
pub fn decide(history: &History, goal: &Goal) -> Decision {
    let forecast = Forecast::of(history, goal.downtime_limit);
    let (verdict, reason) = match (&forecast, goal.timeout) {
        (_, Some(timeout)) if history.elapsed >= timeout => {
            time_is_over(history, goal, timeout, forecast.as_ref())
        }
        (None, _) => (Verdict::Continue, UNKNOWN.into()),
        (Some(forecast), _) if forecast.bound <= goal.downtime_limit.as_secs_f64() => {
            fits(history, goal, forecast)
        }
        (Some(forecast), _) => over_the_limit(history, goal, forecast),
    };
    Decision {
        verdict,
        forecast,
        reason,
    }
}

fn time_is_over(
    history: &History,
    goal: &Goal,
    timeout: Duration,
    forecast: Option<&Forecast>,
) -> (Verdict, String) {
    let over = format!(
        "the time limit of {} is over",
        Seconds(timeout.as_secs_f64())
    );
    let downtime = forecast.map_or_else(|| "an unknown time".into(), told);
    let left = Bytes(history.remaining_pages as f64 * PAGE_SIZE as f64);
    match (goal.on_timeout, goal.held) {
        (OnTimeout::Switchover, Some(by)) => (
            Verdict::GiveUp,
            format!("{over}, and the switchover is still held back {by}"),
        ),
        (OnTimeout::Switchover, None) => (
            Verdict::SwitchOver,
            format!("{over}: switching over, which stops the guest for {downtime}"),
        ),
        (OnTimeout::Cancel, _) => (
            Verdict::GiveUp,
            format!(
                "{over}: {left} are left, and a switchover would stop the guest for {downtime}"
            ),
        ),
    }
}

/// A switchover now is within the limit.
fn fits(history: &History, goal: &Goal, forecast: &Forecast) -> (Verdict, String) {
    let (downtime, limit) = (told(forecast), Seconds(goal.downtime_limit.as_secs_f64()));
    if let Some(by) = goal.held {
        let reason =
            format!("the switchover is held back {by}; it would stop the guest for {downtime}");
        return (Verdict::Continue, reason);
    }
    let (now, next) = (forecast.downtime.likely, forecast.next_downtime);
    let within =
        format!("a switchover stops the guest for {downtime}, within the limit of {limit}");
    if now - next <= NOISE.max(NOTICEABLE * now) {
        let reason = format!("{within}; another round would not lessen it");
        return (Verdict::SwitchOver, reason);
    }
    let next = Seconds(next);
    let before = fitting_before(history, goal);
    if before >= EXTRA_ROUNDS {
        let reason = format!("{within}, as it was in the {before} rounds before");
        return (Verdict::SwitchOver, reason);
    }
    // What is left does not count here: with more of it there would not be less reason to go on.
    let late = history.elapsed.as_secs_f64() + history.last_seconds();
    if goal
        .timeout
        .is_some_and(|timeout| late >= timeout.as_secs_f64())
    {
        let reason = format!("{within}; another round might not be over in time");
        return (Verdict::SwitchOver, reason);
    }
    let extra = before + 1;
    (
        Verdict::Continue,
        format!("{within}; extra round {extra} of {EXTRA_ROUNDS} is to lessen it to {next}"),
    )
}

/// How many of the latest rounds left so little that a switchover fitted, up to the most that is of interest.
fn fitting_before(history: &History, goal: &Goal) -> usize {
    std::iter::successors(history.before(), History::before)
        .take(EXTRA_ROUNDS)
        .take_while(|earlier| {
            Forecast::of(earlier, goal.downtime_limit)
                .is_some_and(|forecast| forecast.bound <= goal.downtime_limit.as_secs_f64())
        })
        .count()
}

fn over_the_limit(history: &History, goal: &Goal, forecast: &Forecast) -> (Verdict, String) {
    let limit = Seconds(goal.downtime_limit.as_secs_f64());
    let over = if forecast.downtime.likely > goal.downtime_limit.as_secs_f64() {
        let downtime = told(forecast);
        format!("a switchover would stop the guest for {downtime}, over the limit of {limit}")
    } else {
        let (likely, bound) = (Seconds(forecast.downtime.likely), Seconds(forecast.bound));
        format!(
            "a switchover would probably stop the guest for {likely}, but it may be {bound}, over the limit of {limit}"
        )
    };
    let (verdict, why) = on_the_way(history, goal, forecast);
    (verdict, format!("{over}; {why}"))
}

/// Why a switchover is not within the limit, without what it would cost: for who tells that with bounds of its own.
pub(crate) fn obstacle(history: &History, goal: &Goal) -> String {
    match Forecast::of(history, goal.downtime_limit) {
        Some(forecast) => on_the_way(history, goal, &forecast).1,
        None => UNKNOWN.into(),
    }
}

/// What comes next of a guest that is over the limit, and whether it converges.
fn on_the_way(history: &History, goal: &Goal, forecast: &Forecast) -> (Verdict, String) {
    if forecast.converges {
        let until = forecast.until.likely;
        let when = match until {
            until if until <= YEAR => format!("within it in about {}", Seconds(until)),
            until if until.is_finite() => format!("within it in {}", Seconds(until)),
            _ => "the next rounds will tell when".into(),
        };
        let late = too_late(history, goal, until);
        return (Verdict::Continue, format!("converging: {when}{late}"));
    }
    let sent = history.pages_per_second().unwrap_or_default().likely;
    let not = format!(
        "not converging: {}/s dirtied, {}/s sent, never less than {} left{}",
        memory(history.dirty_pages_per_second()),
        memory(sent),
        memory(forecast.floor_pages),
        packed(history)
    );
    match steps::next(history, goal, forecast) {
        Step::To(throttle) => (
            Verdict::Throttle(throttle),
            format!("{not}; {}", throttling(throttle)),
        ),
        Step::Exhausted => {
            let late = too_late(history, goal, f64::INFINITY);
            let reason = format!("{not}, though it is throttled as far as it goes{late}");
            (Verdict::Continue, reason)
        }
        Step::None => {
            let late = too_late(history, goal, f64::INFINITY);
            let help = would_help(goal, forecast);
            (Verdict::Continue, format!("{not}; {help}{late}"))
        }
    }
}

/// What would make it converge.
fn would_help(goal: &Goal, forecast: &Forecast) -> String {
    let needs = &forecast.needs;
    let most = if needs.least { "more than " } else { "" };
    let mut ways = Vec::new();
    if needs.pages_per_second.is_finite() {
        let bandwidth = memory(needs.pages_per_second);
        ways.push(format!("a bandwidth of {most}{bandwidth}/s"));
    }
    if needs.share > 0.0 && goal.throttle == Throttles::Nothing {
        let percent = ((1.0 - needs.share) * 100.0).ceil();
        ways.push(format!("a throttle of {most}{percent:.0} %"));
    }
    let but = match ways.is_empty() {
        false if needs.least => {
            " (how much more is not known: most memory is dirty after every round)"
        }
        _ => "",
    };
    ways.push(format!("a downtime limit of {}", Seconds(needs.downtime)));
    format!("{} would do{but}", ways.join(" or "))
}

/// So many pages, as bytes of memory.
fn memory(pages: f64) -> Bytes {
    Bytes(pages * PAGE_SIZE as f64)
}

/// Said where memory is packed, so that nobody takes its bytes for those of the wire.
fn packed(history: &History) -> String {
    let share = history.bytes_per_page() / PAGE_SIZE as f64;
    if share > 0.95 {
        return String::new();
    }
    format!(
        " (all in bytes of memory, of which {:.0} % go over the wire)",
        (share * 100.0).ceil()
    )
}

/// Said when the time limit comes first.
fn too_late(history: &History, goal: &Goal, until: f64) -> String {
    let Some(timeout) = goal.timeout else {
        return String::new();
    };
    let left = timeout.saturating_sub(history.elapsed).as_secs_f64();
    if until < left {
        return String::new();
    }
    let then = match goal.on_timeout {
        OnTimeout::Cancel => "ends it",
        OnTimeout::Switchover => "switches over at any downtime",
    };
    format!(", but the time limit {then} in {}", Seconds(left))
}

fn throttling(throttle: Throttle) -> String {
    match throttle {
        Throttle::Off => "throttle off".into(),
        Throttle::All { percent } => format!("all vCPUs are throttled by {percent} %"),
        Throttle::Writers { pages_per_second } => format!(
            "each vCPU may dirty {}/s at most",
            Bytes(pages_per_second.get() as f64 * PAGE_SIZE as f64)
        ),
    }
}

fn told(forecast: &Forecast) -> String {
    forecast.downtime.told(|s| Seconds(s).to_string())
}
