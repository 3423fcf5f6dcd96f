//! A guest and a link as formulas, in virtual time.

use std::time::Duration;

pub(super) use super::rehearsal::Road;
use super::rehearsal::{Leg, rehearse};
use super::{Decision, Goal, History, Verdict};
use crate::{Throttle, Throttles};

/// What a guest does. Times are seconds since the migration began.
pub(super) struct Guest {
    pub(super) name: &'static str,
    /// Pages it has.
    pub(super) pages: f64,
    /// Pages it comes back to.
    pub(super) hot: fn(f64) -> f64,
    /// Writes a second to these.
    pub(super) writes: fn(f64) -> f64,
    /// Writes a second all over its memory.
    pub(super) cold: f64,
}

pub(super) const ROAD: Road = Road {
    rate: 100_000.0,
    round_trip: 0.001,
    harvest: 0.002,
    early: false,
};

/// How it went.
#[derive(Debug)]
pub(super) struct Course {
    pub(super) last: Decision,
    pub(super) rounds: u32,
    pub(super) seconds: f64,
    /// What the downtime became; 0 when the guest was not stopped.
    pub(super) downtime: f64,
    pub(super) throttle: Throttle,
}

impl Guest {
    /// Different pages written from one moment to another.
    fn dirtied(&self, from: f64, to: f64, throttle: Throttle) -> f64 {
        const STEPS: u32 = 400;
        let step = (to - from) / f64::from(STEPS);
        let (mut hot, mut cold) = (0.0f64, 0.0f64);
        for n in 0..STEPS {
            let now = from + step * (f64::from(n) + 0.5);
            let slowed = |writes: f64| match throttle {
                Throttle::Off => writes,
                Throttle::All { percent } => writes * (1.0 - f64::from(percent) / 100.0),
                Throttle::Writers { pages_per_second } => writes.min(pages_per_second.get() as f64),
            };
            // Some of them go to pages that are dirty already.
            let set = (self.hot)(now).max(1.0);
            hot += set.min(slowed((self.writes)(now)) * step) * (1.0 - hot / set).max(0.0);
            cold += slowed(self.cold) * step * (1.0 - cold / self.pages).max(0.0);
        }
        (hot + cold).min(self.pages)
    }

    /// Rounds over `road` as `choose` decides, at most `rounds`.
    pub(super) fn migrate(
        &self,
        road: Road,
        rounds: u32,
        choose: impl FnMut(&History) -> Decision,
    ) -> Course {
        let left = |leg: Leg| self.dirtied(leg.from, leg.to, leg.throttle);
        let went = rehearse(road, self.pages, rounds, left, choose);
        let mut downtime = 0.0;
        if went.last.verdict == Verdict::SwitchOver {
            let stopped = went.seconds + road.stopping();
            let late = self.dirtied(went.seconds, stopped, went.throttle);
            downtime = road.downtime(went.remaining + late);
        }
        Course {
            last: went.last,
            rounds: went.rounds,
            seconds: went.seconds,
            downtime,
            throttle: went.throttle,
        }
    }
}

/// With a limit of 300 ms, which leaves about 28,000 pages.
pub(super) const GOAL: Goal = Goal {
    downtime_limit: Duration::from_millis(300),
    timeout: None,
    on_timeout: super::OnTimeout::Cancel,
    throttle: Throttles::Nothing,
    held: None,
};

/// Whether time is in the first half of a period.
fn first_half(now: f64, period: f64) -> bool {
    now % period < period / 2.0
}

/// Guests that come down to the limit of [`GOAL`] on [`ROAD`].
pub(super) const CONVERGING: [Guest; 7] = [
    guest("idle", |_| 0.0, |_| 0.0, 0.0),
    guest("a few pages all over", |_| 0.0, |_| 0.0, 300.0),
    guest("many pages all over", |_| 0.0, |_| 0.0, 60_000.0),
    guest("a hot set below the limit", |_| 15_000.0, |_| 2e6, 500.0),
    guest(
        "writing by fits and starts",
        |_| 60_000.0,
        |now| {
            if first_half(now, 0.5) {
                70_000.0
            } else {
                1000.0
            }
        },
        100.0,
    ),
    guest(
        "calm after 20 s",
        |now| if now < 20.0 { 200_000.0 } else { 3000.0 },
        |now| if now < 20.0 { 400_000.0 } else { 50_000.0 },
        0.0,
    ),
    guest("growing", |now| 2000.0 + 50.0 * now, |_| 1e6, 0.0),
];

/// Guests that never do.
pub(super) const BUSY: [Guest; 3] = [
    guest("a hot set above the limit", |_| 100_000.0, |_| 5e5, 0.0),
    guest("faster than the link", |_| 0.0, |_| 0.0, 150_000.0),
    guest(
        "busy after 5 s",
        |now| if now < 5.0 { 60_000.0 } else { 300_000.0 },
        |_| 4e5,
        0.0,
    ),
];

const fn guest(
    name: &'static str,
    hot: fn(f64) -> f64,
    writes: fn(f64) -> f64,
    cold: f64,
) -> Guest {
    Guest {
        name,
        pages: 1e6,
        hot,
        writes,
        cold,
    }
}
