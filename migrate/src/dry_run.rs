//! Whether a migration would converge, from a short look at the guest. Nothing is sent, and the guest is not stopped.

use std::time::Duration;

use gleaner_bitmap::{PAGE_SIZE, PageRange};
use serde::Serialize;

use crate::patience::TICK;
use crate::policy::rehearsal::{Course, Leg, Road, rehearse};
use crate::policy::{Bounds, Curve, Goal, ThrottleGoal, Verdict, decide, milliseconds, obstacle};
use crate::units::Seconds;
use crate::{CancelToken, Clock, Error, LeasedPart, Result, Source, Throttle, Throttles};

/// Between two harvests. Rounds take longer and longer or shorter and shorter, so do these.
const WINDOWS: [Duration; 6] = [
    Duration::from_millis(25),
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(400),
    Duration::from_millis(800),
];
/// Rounds that are rehearsed at most.
const ROUNDS: u32 = 200;
/// Bytes of a page on the stream are these and hardly more.
const PAGE: f64 = PAGE_SIZE as f64;
/// Pages of a lease.
const LEASE_PAGES: u64 = 1 << 16;
/// The round trip of a link that nobody has asked anything: seconds, from a rack to a continent.
const ROUND_TRIP: Bounds = Bounds::new(0.000_1, 0.001, 0.020);

/// Pages dirtied in a time.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Sample {
    /// The time, in milliseconds.
    pub dirty_ms: f64,
    /// Different pages dirtied in it.
    pub dirty_pages: u64,
}

/// What is to be expected of a migration.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Forecasts {
    /// Rounds, the last one with the guest stopped included, likely.
    pub rounds: u32,
    /// Time from start to end, in milliseconds. Infinite: it does not end by itself. JSON has null for that, and for what is
    /// over a year, here and in the downtime; `told` has it in words.
    #[serde(serialize_with = "milliseconds")]
    pub total_ms: Bounds,
    /// Time in which the guest runs nowhere, in milliseconds.
    #[serde(serialize_with = "milliseconds")]
    pub downtime_ms: Bounds,
    /// Bytes of page contents, infinite as the time is.
    pub bytes: Bounds,
    /// What slows the guest down in the end, likely.
    pub throttle: Throttle,
}

/// What a dry run found.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct DryRun {
    /// A switchover within the limit of downtime is likely to be reached, and within the time limit.
    pub converges: bool,
    /// It does so even if the guest dirties and the link carries as is hardly to be feared.
    pub surely: bool,
    /// Why, and what would help.
    pub reason: String,
    /// Pages that the guest has.
    pub total_pages: u64,
    /// Those that may have contents, the others being holes: what the first round sends.
    pub data_pages: u64,
    /// Bytes a second that the guest dirtied in the longest sample.
    pub dirty_bytes_per_second: f64,
    /// What it dirtied in which time.
    pub samples: Vec<Sample>,
    /// The curve through that.
    pub curve: Option<Curve>,
    /// Bytes a second that the link is taken to carry.
    pub bandwidth: u64,
    /// What is to be expected.
    pub forecast: Forecasts,
}

/// What a migration is rehearsed with, beside the guest's writes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Scene {
    /// Pages that may have contents: what the first round sends.
    pub data_pages: u64,
    /// What a harvest takes.
    pub harvest: Duration,
    /// Bytes a second that the link carries.
    pub bandwidth: u64,
}

/// How a migration would go.
#[derive(Clone, PartialEq, Debug)]
pub struct Rehearsal {
    /// As [`DryRun::converges`].
    pub converges: bool,
    /// As [`DryRun::surely`].
    pub surely: bool,
    /// As [`DryRun::reason`].
    pub reason: String,
    /// What is to be expected.
    pub forecast: Forecasts,
}

/// Looks at the guest for under 2 s, and tells how its migration would go over a link of `bandwidth` bytes a second. The
/// attempt at the source is over afterwards.
///
/// # Errors
/// [`Error::Cancelled`]; what the source says: the guest runs on, unless ending the attempt is what failed.
pub fn dry_run(
    source: &mut dyn Source,
    mut goal: Goal,
    throttle: ThrottleGoal,
    bandwidth: u64,
    cancel: &CancelToken,
) -> Result<DryRun> {
    let looked = look(source, throttle, cancel);
    let ended = source.resume();
    let look = looked?;
    ended?;
    goal.throttle = look.throttles;
    Ok(look.rehearse(goal, bandwidth))
}

/// What was seen of a guest.
struct Look {
    throttles: Throttles,
    total_pages: u64,
    data_pages: u64,
    harvest: Duration,
    samples: Vec<Sample>,
}

fn look(source: &mut dyn Source, throttle: ThrottleGoal, cancel: &CancelToken) -> Result<Look> {
    let clock = Clock::real();
    let mut look = Look {
        throttles: match throttle {
            ThrottleGoal::Never => Throttles::Nothing,
            goal => goal.of(source.throttles()?)?,
        },
        total_pages: source.layout()?.blocks().map(|block| block.pages).sum(),
        data_pages: 0,
        harvest: Duration::ZERO,
        samples: Vec::new(),
    };
    // All pages are dirty at first.
    let mut since = clock.now();
    source.harvest()?;
    look.data_pages = drain(source)?;
    for window in WINDOWS {
        while clock.since(since) < window {
            if cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let rest = window.saturating_sub(clock.since(since));
            clock.sleep(rest.min(TICK));
        }
        let now = clock.now();
        let dirty_pages = source.harvest()?.dirty_pages;
        look.harvest = look.harvest.max(clock.since(now));
        look.samples.push(Sample {
            dirty_ms: (now - since).as_secs_f64() * 1e3,
            dirty_pages,
        });
        since = now;
        drain(source)?;
    }
    Ok(look)
}

/// Takes every dirty page as if it were sent; the next attempt begins with all of them dirty. Returns how many may have
/// contents.
fn drain(source: &mut dyn Source) -> Result<u64> {
    let mut data = 0;
    while let Some(lease) = source.lease(LEASE_PAGES)? {
        data += lease.parts.iter().map(data_pages).sum::<u64>();
        source.ack(lease.id)?;
    }
    Ok(data)
}

fn data_pages(part: &LeasedPart) -> u64 {
    let mut rest = part.extent().range;
    let mut found = 0;
    while rest.pages > 0
        && let Some(data) = part.data(rest)
    {
        found += data.pages;
        let past = data.first + data.pages;
        rest = PageRange::new(past, (rest.first + rest.pages).saturating_sub(past));
    }
    found
}

impl Scene {
    /// How it would go. `dirtied` tells how many different pages the guest dirties in so many seconds.
    #[must_use]
    pub fn rehearse(&self, dirtied: impl Fn(f64) -> Bounds, goal: Goal) -> Rehearsal {
        let low = self.course(ROUND_TRIP.low, |time| dirtied(time).low, goal);
        let likely = self.course(ROUND_TRIP.likely, |time| dirtied(time).likely, goal);
        let high = self.course(ROUND_TRIP.high, |time| dirtied(time).high, goal);
        let of = |what: fn(&Course) -> Bounds| {
            Bounds::new(what(&low).low, what(&likely).likely, what(&high).high)
        };
        let total = of(total);
        let in_time = |seconds: f64| goal.timeout.is_none_or(|most| seconds < most.as_secs_f64());
        let converges = likely.last.verdict == Verdict::SwitchOver;
        // The downtime is told once, with the bounds of all three.
        let mut reason = if converges {
            let limit = Seconds(goal.downtime_limit.as_secs_f64());
            format!("what is left in the end goes over within the limit of {limit}")
        } else {
            obstacle(
                &likely.history,
                &Goal {
                    timeout: None,
                    ..goal
                },
            )
        };
        if converges && let Some(most) = goal.timeout.filter(|_| !in_time(total.likely)) {
            let (takes, most) = (Seconds(total.likely), Seconds(most.as_secs_f64()));
            reason = format!("{reason}; but it takes {takes}, and the time limit is {most}");
        }
        Rehearsal {
            converges: converges && in_time(total.likely),
            surely: high.last.verdict == Verdict::SwitchOver && in_time(total.high),
            reason,
            forecast: Forecasts {
                rounds: likely.rounds + 1,
                total_ms: total.times(1e3),
                downtime_ms: of(downtime).times(1e3),
                bytes: of(bytes),
                throttle: likely.throttle,
            },
        }
    }

    /// Whether rounds would bring a guest within the limit that dirties as many pages as `dirtied` says, no more and no
    /// less, over a link that is neither near nor far.
    #[must_use]
    pub fn converges(&self, dirtied: impl Fn(f64) -> f64, goal: Goal) -> bool {
        let course = self.course(ROUND_TRIP.likely, dirtied, goal);
        course.last.verdict == Verdict::SwitchOver
    }

    fn course(&self, round_trip: f64, pages: impl Fn(f64) -> f64, goal: Goal) -> Course {
        // Whether it ends in time is asked afterwards, so that the reason tells of the guest.
        let endless = Goal {
            timeout: None,
            held: None,
            ..goal
        };
        let road = Road {
            rate: self.bandwidth.max(1) as f64 / PAGE,
            round_trip,
            harvest: self.harvest.as_secs_f64(),
            early: true,
        };
        let dirtied = |time: f64, throttle| match throttle {
            Throttle::Off => pages(time),
            Throttle::All { percent } => pages(time * (1.0 - f64::from(percent) / 100.0)),
            Throttle::Writers { pages_per_second } => {
                pages(time).min(pages_per_second.get() as f64 * time)
            }
        };
        // Of the pages that are sent, each part may be written from its turn on; the others all the time. The guest is taken
        // to write to the ones as to the others.
        let left = |leg: Leg| {
            let (time, parts) = (leg.to - leg.from, leg.parts());
            let after = |n: u32| dirtied(time * f64::from(n) / f64::from(parts), leg.throttle);
            let sent = (1..=parts).map(after).sum::<f64>() / f64::from(parts);
            let share = (leg.pages / (self.data_pages as f64).max(1.0)).min(1.0);
            share * sent + (1.0 - share) * after(parts)
        };
        let decide = |history: &_| decide(history, &endless);
        rehearse(road, self.data_pages as f64, ROUNDS, left, decide)
    }
}

impl Look {
    fn rehearse(self, goal: Goal, bandwidth: u64) -> DryRun {
        let points = self.samples.iter().rev();
        let points = points.map(|s| (s.dirty_ms / 1e3, s.dirty_pages as f64));
        let curve = Curve::fit(points, self.total_pages as f64);
        let pages = |time: f64| curve.map_or(Bounds::default(), |curve| curve.pages(time));
        let scene = Scene {
            data_pages: self.data_pages,
            harvest: self.harvest,
            bandwidth,
        };
        let found = scene.rehearse(pages, goal);
        let last = self.samples.last();
        DryRun {
            converges: found.converges,
            surely: found.surely,
            reason: found.reason,
            total_pages: self.total_pages,
            data_pages: self.data_pages,
            dirty_bytes_per_second: last.map_or(0.0, |s| {
                s.dirty_pages as f64 * PAGE / (s.dirty_ms / 1e3).max(1e-6)
            }),
            curve,
            bandwidth,
            forecast: found.forecast,
            samples: self.samples,
        }
    }
}

/// Seconds of downtime; of a guest that does not converge, what a switchover at the end of all rounds would cost.
fn downtime(course: &Course) -> Bounds {
    course.last.forecast.map_or(NEVER, |f| f.downtime)
}

/// Seconds from start to end.
fn total(course: &Course) -> Bounds {
    let so_far = Bounds::new(course.seconds, course.seconds, course.seconds);
    match course.last.verdict {
        Verdict::SwitchOver => so_far.plus(downtime(course)),
        _ => NEVER,
    }
}

/// Bytes of page contents from start to end.
fn bytes(course: &Course) -> Bounds {
    let sent = (course.sent + course.remaining) * PAGE;
    match course.last.verdict {
        Verdict::SwitchOver => Bounds::new(sent, sent, sent),
        _ => NEVER,
    }
}

const NEVER: Bounds = Bounds::new(f64::INFINITY, f64::INFINITY, f64::INFINITY);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::OnTimeout;

    const GOAL: Goal = Goal {
        downtime_limit: Duration::from_millis(300),
        timeout: None,
        on_timeout: OnTimeout::Cancel,
        throttle: Throttles::Nothing,
        held: None,
    };

    /// A guest of 1 GiB that was seen to dirty so many pages in each of the windows.
    fn run(dirtied: impl Fn(f64) -> f64, goal: Goal, bandwidth: u64) -> DryRun {
        let sample = |window: &Duration| Sample {
            dirty_ms: window.as_secs_f64() * 1e3,
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // small
            dirty_pages: dirtied(window.as_secs_f64()) as u64,
        };
        let look = Look {
            throttles: Throttles::Nothing,
            total_pages: 1 << 18,
            data_pages: 1 << 17,
            harvest: Duration::from_millis(1),
            samples: WINDOWS.iter().map(sample).collect(),
        };
        look.rehearse(goal, bandwidth)
    }

    #[test]
    fn an_idle_guest_takes_as_long_as_its_memory() {
        let found = run(|_| 0.0, GOAL, 1 << 28);
        assert!(found.converges && found.surely, "{found:?}");
        assert_eq!(found.forecast.rounds, 2);
        assert_eq!(found.forecast.bytes.likely, f64::from(1 << 29));
        let total = found.forecast.total_ms;
        assert!(2000.0 < total.low && total.high < 2500.0, "{total:?}");
    }

    #[test]
    fn the_downtime_is_told_once() {
        // Within the limit, and not: in the reason it would have other bounds than in the forecast.
        for bandwidth in [200 << 20, 100 << 20] {
            let found = run(|_| 10_000.0, GOAL, bandwidth);
            assert!(!found.reason.contains("the guest for"), "{found:?}");
            assert!(!found.reason.contains(" to "), "{found:?}");
        }
    }

    #[test]
    fn a_hot_set_converges_where_it_fits_into_the_limit() {
        // 10,000 pages, 39 MiB, within 270 ms or so.
        let hot = |_: f64| 10_000.0;
        assert!(run(hot, GOAL, 200 << 20).converges);
        let slow = run(hot, GOAL, 100 << 20);
        assert!(
            !slow.converges && slow.reason.contains("a bandwidth of"),
            "{slow:?}"
        );
        assert!(slow.forecast.total_ms.likely.is_infinite());
    }

    #[test]
    fn a_guest_faster_than_the_link_converges_when_it_is_throttled() {
        let fast = |seconds: f64| 50_000.0 * seconds;
        let link = 150 << 20; // 38,400 pages/s
        assert!(!run(fast, GOAL, link).converges);
        let throttle = Throttles::All;
        let slowed = run(fast, Goal { throttle, ..GOAL }, link);
        assert!(slowed.converges, "{slowed:?}");
        assert_ne!(slowed.forecast.throttle, Throttle::Off);
    }

    #[test]
    fn one_that_takes_longer_than_it_may_does_not_converge_in_time() {
        let timeout = Some(Duration::from_secs(1));
        let late = run(|_| 0.0, Goal { timeout, ..GOAL }, 1 << 28);
        assert!(
            !late.converges && late.reason.contains("the time limit is 1.0 s"),
            "{late:?}"
        );
    }
}
