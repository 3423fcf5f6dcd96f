//! How many pages are looked at: as many as the precision takes, and no more than the CPU time allows.

use std::time::Duration;

/// What is asked for.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Goal {
    /// How long; without end if `None`.
    pub duration: Option<Duration>,
    /// Length of the windows whose dirty rate is told.
    pub interval: Duration,
    /// Standard error of the dirty rate over the rate itself.
    pub precision: f64,
    /// CPU time over time, of one CPU.
    pub cpu: f64,
}

/// The part dirty that a sample is made for before anything is known.
const FIRST_GUESS: f64 = 0.01;
/// So many times the pages that are just enough: some windows come late, and none after the end; and how much is dirty is a guess
/// itself.
pub(super) const MARGIN: f64 = 1.25;
/// Windows of a metering without end that are together as precise as was asked for.
const TOGETHER: f64 = 10.0;
/// A metering without end is planned so far.
const AHEAD: Duration = Duration::from_secs(300);
/// The part of the CPU time that what is watched for the whole time may take.
const WHOLE_TIME: f64 = 0.4;

impl Goal {
    /// Pages of one sample that is precise enough, if that part of `pages` is dirty: more scattered than it may be.
    pub(super) fn pages(&self, part: f64, pages: u64) -> f64 {
        let part = part.clamp(1e-9, 1.0);
        let endless = (1.0 - part) / (part * self.precision * self.precision);
        endless / (1.0 + endless / pages as f64)
    }

    /// Pages that are watched for the whole time, each of which takes so many looks of so many seconds.
    pub(super) fn panel(&self, pages: u64, looks: f64, per_look: f64) -> u64 {
        let time = self.duration.unwrap_or(AHEAD).as_secs_f64();
        let allowed = WHOLE_TIME * self.cpu * time / (looks * per_look);
        count((MARGIN * self.pages(FIRST_GUESS, pages)).min(allowed))
    }

    /// Pages of the next window, each of which takes `looks` looks of `per_look` seconds.
    pub(super) fn window(&self, so_far: &SoFar, pages: u64, looks: f64) -> u64 {
        let (done, left) = match self.duration {
            Some(duration) => {
                let left = duration.saturating_sub(so_far.now).as_secs_f64();
                let left = (left / self.interval.as_secs_f64()).round().max(1.0);
                (so_far.windows as f64, left)
            }
            None => (0.0, TOGETHER),
        };
        let all = done + left;
        let part = so_far.part.unwrap_or(FIRST_GUESS);
        // The mean of all windows has a variance of their sum over the square of their number, and each of them that of its pages.
        let of_page = part * (1.0 - part);
        let target = (self.precision * part * all).powi(2);
        let missing = target - if done > 0.0 { so_far.variance } else { 0.0 };
        let wanted = if missing > 0.0 && part > 0.0 {
            MARGIN * left * of_page / missing
        } else {
            f64::INFINITY
        };
        let end = self
            .duration
            .unwrap_or(so_far.now + self.interval.mul_f64(TOGETHER));
        let budget = self.cpu * end.as_secs_f64() - so_far.spent - so_far.reserved;
        let allowed = budget / left / (looks * so_far.per_look);
        count(wanted.min(allowed).min(pages as f64))
    }
}

/// What is known when a window begins.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct SoFar {
    pub now: Duration,
    /// Windows that have begun.
    pub windows: u64,
    /// The part dirty, and the sum of the variances of the windows.
    pub part: Option<f64>,
    pub variance: f64,
    /// CPU time so far, and what other looks will take.
    pub spent: f64,
    pub reserved: f64,
    /// CPU time of a look.
    pub per_look: f64,
}

/// At least some strata.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // saturates
fn count(pages: f64) -> u64 {
    pages.max(64.0).round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 18;

    fn goal() -> Goal {
        Goal {
            duration: Some(Duration::from_secs(20)),
            interval: Duration::from_secs(1),
            precision: 0.05,
            cpu: 0.02,
        }
    }

    fn so_far(part: Option<f64>) -> SoFar {
        SoFar {
            now: Duration::ZERO,
            windows: 0,
            part,
            variance: 0.0,
            spent: 0.0,
            reserved: 0.0,
            per_look: 1e-6,
        }
    }

    #[test]
    fn one_percent_to_five_percent_takes_forty_thousand_pages() {
        // 0.99 / (0.01 * 0.05^2), of a guest without end.
        assert!((goal().pages(0.01, u64::MAX) - 39_600.0).abs() < 1.0);
        // And of all pages no more than there are.
        assert!((goal().pages(0.01, GIB) - 34_403.0).abs() < 1.0);
        assert!(goal().pages(1e-9, GIB) <= GIB as f64);
        // In 20 windows together, and a margin.
        let about = |pages: u64, want: f64| (pages as f64 / want - 1.0).abs() < 1e-4;
        assert!(about(
            goal().window(&so_far(None), GIB, 2.0),
            39_600.0 / 20.0 * MARGIN
        ));
        let unbounded = Goal { cpu: 1.0, ..goal() };
        assert!(about(unbounded.panel(GIB, 2.0, 1e-6), 34_403.0 * MARGIN));
    }

    #[test]
    fn what_is_known_of_the_guest_makes_the_sample_smaller_or_larger() {
        let window = |part| goal().window(&so_far(Some(part)), GIB, 2.0);
        assert_eq!(window(0.3), 64);
        assert!(window(0.005) > 4500);
        // Half of the windows were too rough: the others make up for it.
        let rough = SoFar {
            now: Duration::from_secs(10),
            windows: 10,
            variance: 10.0 * 0.0099 / 1200.0,
            ..so_far(Some(0.01))
        };
        let next = goal().window(&rough, GIB, 2.0) as f64;
        let all = rough.variance + MARGIN * 10.0 * 0.0099 / next;
        assert!((all.sqrt() / 20.0 / 0.01 - 0.05).abs() < 0.0001, "{next}");
    }

    #[test]
    fn it_takes_no_more_cpu_time_than_it_may() {
        let rare = so_far(Some(1e-5));
        // 0.4 s in 20 windows, 2 looks of 1 us.
        assert_eq!(goal().window(&rare, GIB, 2.0), 10_000);
        let spent = SoFar {
            now: Duration::from_secs(19),
            windows: 19,
            spent: 0.3,
            reserved: 0.09,
            ..rare
        };
        assert_eq!(goal().window(&spent, GIB, 2.0), 5000);
        let over = SoFar { spent: 9.0, ..rare };
        assert_eq!(goal().window(&over, GIB, 2.0), 64);
        assert_eq!(goal().panel(GIB, 2.0, 1e-5), 8000);
    }
}
