//! Would a migration of it converge, and if not, what would make it?

use std::time::Duration;

use gleaner_migrate::policy::{Bounds, Goal};
use gleaner_migrate::units::{Bytes, Seconds};
use gleaner_migrate::{Forecasts, OnTimeout, Scene, Throttles};
use serde::Serialize;

use super::{Dirtied, Findings, Metered};

/// What a migration would go over, and what is asked of it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Link {
    /// Bytes a second that it carries.
    pub bandwidth: u64,
    /// The most downtime.
    pub downtime_limit: Duration,
}

/// How a migration would go.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Verdict {
    /// A switchover within the limit of downtime is likely to be reached.
    pub converges: bool,
    /// It is so even if the guest dirties as much as is hardly to be feared.
    pub surely: bool,
    /// Why.
    pub reason: String,
    /// Bytes a second that the link is taken to carry.
    pub bandwidth: u64,
    /// The most downtime, in milliseconds.
    pub downtime_limit_ms: f64,
    /// Rounds, time, bytes and downtime.
    #[serde(flatten)]
    pub forecast: Forecasts,
    /// What each by itself would make it converge; `None` where nothing is needed.
    pub needs: Option<Needs>,
}

/// What each by itself would make a guest converge. The high bound makes it sure. Infinite, which JSON writes as null: no
/// amount does.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Needs {
    /// Bytes a second that the link carries.
    pub bandwidth: Bounds,
    /// Per cent of its time that every vCPU is kept from running.
    pub throttle_percent: Bounds,
    /// The most downtime, in milliseconds.
    pub downtime_limit_ms: Bounds,
}

/// No link is faster, in bytes a second.
const FASTEST: f64 = (1u64 << 42) as f64;
/// No guest is stopped for longer, in seconds.
const LONGEST: f64 = 3600.0;
/// The most that can be taken from vCPUs, in per cent.
const MOST: f64 = 99.0;
/// Of what is searched, in its unit: bytes a second, percent, seconds.
const SMALLEST: f64 = 1e-6;
/// How near to the least amount a need is found.
const NEAR: f64 = 1.01;

/// How a migration of what was measured would go; `None` before anything was.
#[must_use]
pub fn judge(measured: &dyn Findings, metered: &Metered, link: Link) -> Option<Verdict> {
    let (mut verdict, trial) = tried(measured, metered, link)?;
    verdict.needs = (!verdict.surely).then(|| trial.needs());
    Some(verdict)
}

/// As [`judge`], but for what it needs, which takes most of the time to find: for who asks again and again.
#[cfg(feature = "cli")]
pub(crate) fn glance(measured: &dyn Findings, metered: &Metered, link: Link) -> Option<Verdict> {
    tried(measured, metered, link).map(|(verdict, _)| verdict)
}

fn tried(measured: &dyn Findings, metered: &Metered, link: Link) -> Option<(Verdict, Trial)> {
    let report = measured.report();
    if report.curve.is_empty() {
        return None;
    }
    // Pages that had no contents yet in the beginning have some now.
    let written = report.blocks.iter().map(|block| block.unique_pages).sum();
    let trial = Trial {
        scene: Scene {
            data_pages: metered.data_pages.max(written),
            harvest: Duration::from_secs_f64(report.harvests.map_or(0.0, |h| h.mean_ms / 1e3)),
            bandwidth: link.bandwidth,
        },
        dirtied: measured.dirtied(),
        limit: link.downtime_limit,
    };
    let found = trial
        .scene
        .rehearse(|t| trial.dirtied.pages(t), goal(trial.limit));
    let reason = if found.converges {
        found.reason
    } else {
        format!(
            "{}/s dirtied, {}/s carried, and never so little left that a switchover is within {}",
            Bytes(report.dirty_bytes_per_second),
            Bytes(link.bandwidth as f64),
            Seconds(link.downtime_limit.as_secs_f64())
        )
    };
    let verdict = Verdict {
        converges: found.converges,
        surely: found.surely,
        reason,
        bandwidth: link.bandwidth,
        downtime_limit_ms: link.downtime_limit.as_secs_f64() * 1e3,
        forecast: found.forecast,
        needs: None,
    };
    Some((verdict, trial))
}

fn goal(downtime_limit: Duration) -> Goal {
    Goal {
        downtime_limit,
        timeout: None,
        on_timeout: OnTimeout::Cancel,
        throttle: Throttles::Nothing,
        held: None,
    }
}

/// Migrations that are tried out, none of them real.
struct Trial {
    scene: Scene,
    dirtied: Dirtied,
    limit: Duration,
}

/// Which of its bounds the guest dirties.
type Guess = fn(Bounds) -> f64;

impl Trial {
    fn needs(&self) -> Needs {
        let bandwidth = self.scene.bandwidth as f64;
        let limit = self.limit.as_secs_f64();
        Needs {
            bandwidth: bounds(|guess| {
                least(bandwidth, FASTEST, |rate| {
                    self.converges(guess, rate, 0.0, limit)
                })
            }),
            throttle_percent: bounds(|guess| {
                least(1.0, MOST, |percent| {
                    self.converges(guess, bandwidth, percent / 100.0, limit)
                })
            }),
            downtime_limit_ms: bounds(|guess| {
                least(limit, LONGEST, |limit| {
                    self.converges(guess, bandwidth, 0.0, limit)
                })
            })
            .times(1e3),
        }
    }

    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // saturates
    fn converges(&self, guess: Guess, bandwidth: f64, throttle: f64, limit: f64) -> bool {
        let scene = Scene {
            bandwidth: bandwidth as u64,
            ..self.scene
        };
        let dirtied = |time: f64| guess(self.dirtied.pages(time * (1.0 - throttle)));
        scene.converges(dirtied, goal(Duration::from_secs_f64(limit)))
    }
}

fn bounds(of: impl Fn(Guess) -> f64) -> Bounds {
    Bounds::new(of(|b| b.low), of(|b| b.likely), of(|b| b.high))
}

/// The least amount that is enough, up to [`NEAR`]; infinite where none is.
fn least(from: f64, to: f64, enough: impl Fn(f64) -> bool) -> f64 {
    if enough(from) {
        return from;
    }
    if from >= to || !enough(to) {
        return f64::INFINITY;
    }
    // The search goes by ratios, in which nothing is endlessly far from something.
    let (mut low, mut high) = (from.max(SMALLEST), to);
    while high / low > NEAR {
        let middle = (low * high).sqrt();
        if enough(middle) {
            high = middle;
        } else {
            low = middle;
        }
    }
    high
}

impl Verdict {
    /// In a word.
    #[must_use]
    pub const fn word(&self) -> &'static str {
        match (self.converges, self.surely) {
            (true, true) => "converges",
            (true, false) => "probably converges",
            (false, _) => "does not converge",
        }
    }
}

impl Needs {
    /// What would help, for people.
    #[must_use]
    pub fn told(&self) -> String {
        let mut ways = Vec::new();
        let mut way = |needed: Bounds, text: &dyn Fn(f64) -> String| {
            if needed.likely.is_finite() {
                let [likely, low] = [needed.likely, needed.low].map(text);
                let high = if needed.high.is_finite() {
                    text(needed.high)
                } else {
                    "no bound".into()
                };
                ways.push(format!("{likely} ({low} to {high})"));
            }
        };
        way(self.bandwidth, &|rate| format!("{}/s", Bytes(rate)));
        way(self.throttle_percent, &|percent| {
            format!("{:.0} %", percent.ceil())
        });
        way(self.downtime_limit_ms, &|ms| Seconds(ms / 1e3).to_string());
        let what = [
            (self.bandwidth, "a bandwidth of"),
            (self.throttle_percent, "vCPUs throttled by"),
            (self.downtime_limit_ms, "a downtime limit of"),
        ];
        let what = what.iter().filter(|(needed, _)| needed.likely.is_finite());
        let ways: Vec<String> = what
            .zip(ways)
            .map(|((_, what), way)| format!("{what} {way}"))
            .collect();
        if ways.is_empty() {
            return "nothing by itself would do".into();
        }
        ways.join(", or ")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // helpers are not known to be tests
    use super::*;
    use crate::PAGE_SIZE;
    use crate::rate::{Look, Measurement};
    use gleaner_bitmap::{BlockId, BlockInfo, Extent};

    /// A guest of 1 GiB that sweeps over its first `span` pages, `step` pages in 50 ms, looked at for 10 s.
    fn sweeping(span: u64, step: u64) -> (Measurement, Metered) {
        let mut measured = Measurement::new(Duration::from_secs(1));
        let block = BlockId(1);
        let mut next = 0;
        for number in 1..=200u32 {
            let mut look = Look {
                at: Duration::from_millis(50) * number,
                harvest: Duration::from_millis(1),
                ..Look::default()
            };
            if number == 1 {
                let info = BlockInfo::new(block, "ram", (1 << 18) * PAGE_SIZE).unwrap();
                look.blocks.push(info);
            }
            let mut left = step.min(span);
            while left > 0 {
                let run = left.min(span - next);
                look.written.push(Extent::new(block, next, run));
                next = (next + run) % span;
                left -= run;
            }
            measured.add(&look).unwrap();
        }
        let metered = Metered {
            tracking: "ring".into(),
            data_pages: 1 << 18,
            throttles: Throttles::Writers,
        };
        (measured, metered)
    }

    fn judged(guest: &(Measurement, Metered), bandwidth: f64, limit: f64) -> Verdict {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // small
        let link = Link {
            bandwidth: bandwidth as u64,
            downtime_limit: Duration::from_secs_f64(limit),
        };
        judge(&guest.0, &guest.1, link).unwrap()
    }

    #[test]
    fn with_what_it_needs_it_converges_and_with_less_it_does_not() {
        // 40,000 pages/s all over, and a hot set of 20,000 pages that is whole after 0.25 s.
        for guest in [sweeping(1 << 18, 2000), sweeping(20_000, 4000)] {
            let (bandwidth, limit) = (100e6, 0.1);
            let verdict = judged(&guest, bandwidth, limit);
            assert!(!verdict.converges, "{verdict:?}");
            assert!(verdict.forecast.total_ms.likely.is_infinite());
            let needs = verdict.needs.unwrap();
            let wide = needs.bandwidth.likely;
            assert!(judged(&guest, wide * 1.001, limit).converges, "{needs:?}");
            assert!(!judged(&guest, wide / 1.05, limit).converges, "{needs:?}");
            let long = needs.downtime_limit_ms.likely / 1e3;
            assert!(
                judged(&guest, bandwidth, long * 1.001).converges,
                "{needs:?}"
            );
            assert!(
                !judged(&guest, bandwidth, long / 1.05).converges,
                "{needs:?}"
            );
        }
    }

    #[test]
    fn a_throttle_that_it_needs_slows_it_to_what_the_link_carries() {
        // 40,000 pages/s over a link of 25,000 a second.
        let guest = sweeping(1 << 18, 2000);
        let needs = judged(&guest, 25_000.0 * 4096.0, 0.3).needs.unwrap();
        let percent = needs.throttle_percent;
        assert!((37.0..60.0).contains(&percent.likely), "{percent:?}");
        assert!(percent.low <= percent.likely && percent.likely <= percent.high);
    }

    #[test]
    fn a_limit_of_no_downtime_at_all_needs_a_longer_one() {
        let guest = sweeping(20_000, 4000);
        let verdict = judged(&guest, 100e6, 0.0);
        assert!(!verdict.converges, "{verdict:?}");
        let needed = verdict.needs.unwrap().downtime_limit_ms.likely;
        assert!(
            judged(&guest, 100e6, needed * 1.001 / 1e3).converges,
            "{needed}"
        );
    }

    #[test]
    fn an_idle_guest_converges_and_needs_nothing() {
        let guest = sweeping(1 << 18, 0);
        let verdict = judged(&guest, 1e9, 0.3);
        assert!(verdict.converges && verdict.surely, "{verdict:?}");
        assert_eq!(verdict.needs, None);
        // 1 GiB, at 1 GB/s.
        let total = verdict.forecast.total_ms;
        assert!(1000.0 < total.low && total.high < 1500.0, "{total:?}");
    }
}
