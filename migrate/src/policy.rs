//! When to stop the guest. A pure function of what was measured.

use std::collections::VecDeque;
use std::time::Duration;

use gleaner_bitmap::PAGE_SIZE;
use serde::Serialize;

/// What to do when the time allowed is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnTimeout {
    /// End the migration; the guest runs on at the source.
    #[default]
    Cancel,
    /// Switch over, whatever downtime it costs.
    Switchover,
}

/// What was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Goal {
    /// The most downtime.
    pub downtime_limit: Duration,
    /// The most time in total.
    pub timeout: Option<Duration>,
    /// What happens then.
    pub on_timeout: OnTimeout,
    /// Somebody asks not to switch over yet.
    pub held: bool,
}

/// What a round measured.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Round {
    /// Pages sent with their contents.
    pub pages: u64,
    /// Pages sent as zeros.
    pub zero_pages: u64,
    /// Seconds from its first lease to its last acknowledgement.
    pub seconds: f64,
}

/// What is known when a decision is due, after a harvest.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct History {
    /// The latest rounds, the last one at the end.
    recent: VecDeque<Round>,
    /// Pages dirty now.
    pub remaining_pages: u64,
    /// Pages dirtied a second since the harvest before.
    pub dirty_pages_per_second: f64,
    /// Seconds that the last harvest took: the last one with the guest stopped will take as long.
    pub harvest_seconds: f64,
    /// Seconds from a question to its answer over the stream.
    pub round_trip_seconds: f64,
    /// Time since the migration began.
    pub elapsed: Duration,
}

/// What comes next.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Another round with the guest running.
    Continue,
    /// Stop the guest and switch over.
    SwitchOver,
    /// End the migration.
    GiveUp,
    /// The switchover has taken place.
    Done,
}

/// A verdict and its grounds.
#[derive(Clone, PartialEq, Debug)]
pub struct Decision {
    /// What comes next.
    pub verdict: Verdict,
    /// The downtime that a switchover now would cost, once a rate is known.
    pub forecast: Option<Duration>,
    /// Why, for people.
    pub reason: String,
}

/// Rounds that count. The link was able to what the best of them showed; an older one may tell of another link.
const WINDOW: usize = 3;
/// Stopping vCPUs, saving state and building it again, as long as it is not measured: seconds.
const STOP_AND_BUILD: f64 = 0.005;
/// Round trips in a switchover: last acknowledgement, READY, RUNNING.
const ROUND_TRIPS: f64 = 3.0;

impl History {
    /// Adds a round.
    pub fn push(&mut self, round: Round) {
        if self.recent.len() == WINDOW {
            self.recent.pop_front();
        }
        self.recent.push_back(round);
    }

    /// Pages a second that the way to the destination takes: the best of the latest rounds, pages of zeros counting
    /// only where nothing else was sent.
    #[must_use]
    pub fn pages_per_second(&self) -> Option<f64> {
        let best = |count: fn(&Round) -> u64| {
            self.recent
                .iter()
                .filter(|round| count(round) > 0)
                .map(|round| count(round) as f64 / round.seconds.max(1e-6))
                .reduce(f64::max)
        };
        best(|round| round.pages).or_else(|| best(|round| round.zero_pages))
    }

    /// The downtime that a switchover now would cost; `None` as long as no rate is known and there is something left.
    #[must_use]
    pub fn forecast(&self) -> Option<Duration> {
        let fixed = self.harvest_seconds + ROUND_TRIPS * self.round_trip_seconds + STOP_AND_BUILD;
        // What the guest dirties until it stands still comes on top.
        let pages =
            self.remaining_pages as f64 + self.dirty_pages_per_second * self.harvest_seconds;
        let sending = match self.pages_per_second() {
            Some(rate) => pages / rate,
            None if self.remaining_pages == 0 => 0.0,
            None => return None,
        };
        Duration::try_from_secs_f64(fixed + sending).ok()
    }
}

/// Decides what comes next.
#[must_use]
pub fn decide(history: &History, goal: &Goal) -> Decision {
    let forecast = history.forecast();
    let decision = |verdict, reason| Decision {
        verdict,
        forecast,
        reason,
    };
    let limit = goal.downtime_limit.as_millis();
    if let Some(timeout) = goal.timeout.filter(|timeout| history.elapsed >= *timeout) {
        let over = format!("the time limit of {} ms is over", timeout.as_millis());
        return match goal.on_timeout {
            OnTimeout::Switchover if goal.held => decision(
                Verdict::GiveUp,
                format!("{over}, and the switchover is still held back"),
            ),
            OnTimeout::Switchover => decision(
                Verdict::SwitchOver,
                format!("{over}: switching over at any downtime"),
            ),
            OnTimeout::Cancel => decision(
                Verdict::GiveUp,
                format!(
                    "{over}: {} pages are left, and a switchover would stop the guest for {}",
                    history.remaining_pages,
                    told(forecast)
                ),
            ),
        };
    }
    match forecast {
        Some(downtime) if downtime <= goal.downtime_limit && goal.held => {
            decision(Verdict::Continue, "the switchover is held back".into())
        }
        Some(downtime) if downtime <= goal.downtime_limit => decision(
            Verdict::SwitchOver,
            format!(
                "downtime of {} is within the limit of {limit} ms",
                told(forecast)
            ),
        ),
        Some(_) => {
            let sent = history.pages_per_second().unwrap_or_default();
            let dirtied = history.dirty_pages_per_second;
            let trend = if dirtied < sent {
                "converging"
            } else {
                "not converging"
            };
            decision(
                Verdict::Continue,
                format!(
                    "downtime would be {}, over the limit of {limit} ms; {trend}: {dirtied:.0} pages/s dirtied, \
                     {sent:.0} pages/s sent",
                    told(forecast)
                ),
            )
        }
        None => decision(Verdict::Continue, "no rate is known yet".into()),
    }
}

/// Bytes a second, from pages a second.
pub(crate) fn bytes_per_second(pages: f64) -> f64 {
    pages * PAGE_SIZE as f64
}

fn told(forecast: Option<Duration>) -> String {
    forecast.map_or_else(
        || "an unknown time".into(),
        |time| format!("{:.1} ms", time.as_secs_f64() * 1e3),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOAL: Goal = Goal {
        downtime_limit: Duration::from_millis(300),
        timeout: None,
        on_timeout: OnTimeout::Cancel,
        held: false,
    };

    /// 100,000 pages/s were sent, `remaining` are left.
    fn history(remaining: u64) -> History {
        let mut history = History {
            remaining_pages: remaining,
            elapsed: Duration::from_secs(10),
            ..History::default()
        };
        history.push(Round {
            pages: 100_000,
            zero_pages: 0,
            seconds: 1.0,
        });
        history
    }

    #[test]
    fn nothing_is_known_before_the_first_round_unless_nothing_is_dirty() {
        let mut none = History {
            remaining_pages: 1,
            ..History::default()
        };
        assert_eq!(decide(&none, &GOAL).verdict, Verdict::Continue);
        none.remaining_pages = 0;
        assert_eq!(decide(&none, &GOAL).verdict, Verdict::SwitchOver);
    }

    #[test]
    fn the_limit_is_where_it_is() {
        // 29,000 pages take 290 ms and the fixed part 5 ms.
        assert_eq!(decide(&history(29_000), &GOAL).verdict, Verdict::SwitchOver);
        assert_eq!(decide(&history(30_000), &GOAL).verdict, Verdict::Continue);
    }

    #[test]
    fn fixed_costs_count() {
        let mut slow = history(10);
        slow.round_trip_seconds = 0.2;
        let decision = decide(&slow, &GOAL);
        assert_eq!(decision.verdict, Verdict::Continue);
        slow.round_trip_seconds = 0.0;
        slow.harvest_seconds = 0.4;
        assert_eq!(decide(&slow, &GOAL).verdict, Verdict::Continue);
    }

    #[test]
    fn what_is_dirtied_during_the_last_harvest_counts() {
        let mut busy = history(25_000);
        busy.harvest_seconds = 0.02;
        assert_eq!(decide(&busy, &GOAL).verdict, Verdict::SwitchOver);
        busy.dirty_pages_per_second = 200_000.0;
        assert_eq!(decide(&busy, &GOAL).verdict, Verdict::Continue);
    }

    #[test]
    fn without_a_timeout_it_goes_on_and_says_that_it_does_not_converge() {
        let mut busy = history(1_000_000);
        busy.dirty_pages_per_second = 150_000.0;
        busy.elapsed = Duration::from_secs(1_000_000);
        let decision = decide(&busy, &GOAL);
        assert_eq!(decision.verdict, Verdict::Continue);
        assert!(decision.reason.contains("not converging"), "{decision:?}");
    }

    #[test]
    fn a_timeout_ends_it_as_asked() {
        let mut goal = Goal {
            timeout: Some(Duration::from_secs(10)),
            ..GOAL
        };
        let history = history(1_000_000);
        let decision = decide(&history, &goal);
        assert_eq!(decision.verdict, Verdict::GiveUp);
        assert!(decision.reason.contains("1000000 pages"), "{decision:?}");
        goal.on_timeout = OnTimeout::Switchover;
        assert_eq!(decide(&history, &goal).verdict, Verdict::SwitchOver);
        goal.held = true;
        assert_eq!(decide(&history, &goal).verdict, Verdict::GiveUp);
    }

    #[test]
    fn held_back_it_goes_on() {
        let goal = Goal { held: true, ..GOAL };
        assert_eq!(decide(&history(0), &goal).verdict, Verdict::Continue);
    }

    #[test]
    fn zeros_do_not_make_the_link_look_fast() {
        let mut history = history(100_000);
        history.push(Round {
            pages: 0,
            zero_pages: 10_000_000,
            seconds: 1.0,
        });
        assert_eq!(decide(&history, &GOAL).verdict, Verdict::Continue);
    }

    #[test]
    fn an_old_rate_is_forgotten() {
        let mut history = history(29_000);
        for _ in 0..WINDOW {
            history.push(Round {
                pages: 1000,
                zero_pages: 0,
                seconds: 1.0,
            });
        }
        assert_eq!(decide(&history, &GOAL).verdict, Verdict::Continue);
    }
}
