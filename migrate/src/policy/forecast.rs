//! What is to be expected: of a switchover now, and of more rounds.

use std::time::Duration;

use super::{Bounds, Costs, Curve, History};

/// What forecasts are made of: a guest, a link, and what a switchover costs.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Model {
    /// Pages a second that the link takes.
    pub rate: Bounds,
    /// What the guest dirties.
    pub curve: Curve,
    /// What a switchover costs beside sending what is left.
    pub costs: Costs,
    /// Pages a second that the guest dirties until it stands still.
    pub burst: Bounds,
    /// Seconds that a round takes beside sending: its harvest, the last acknowledgement, and the question how long one takes.
    pub overhead: f64,
    /// Pages that the guest has.
    pub total_pages: f64,
}

/// What is to be expected. Times are in seconds; an infinite one means never.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Forecast {
    /// Downtime of a switchover now.
    pub downtime: Bounds,
    /// What of it must be within the limit; see [`Model::bound`].
    pub bound: f64,
    /// Downtime after one more round, likely.
    pub next_downtime: f64,
    /// Time until a switchover within the limit is possible.
    pub until: Bounds,
    /// Pages left that rounds come down to and no further, at this rate.
    pub floor_pages: f64,
    /// [`Model::bound`] with so many pages left.
    pub floor: f64,
    /// A switchover within the limit is possible sooner or later.
    pub converges: bool,
    /// What each by itself would make it converge.
    pub needs: Needs,
}

/// What each by itself would make a guest converge.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Needs {
    /// A link of so many pages a second; infinite where none is enough.
    pub pages_per_second: f64,
    /// A guest that runs for so much of its time, 0 to 1; 0 where no throttle is enough.
    pub share: f64,
    /// A limit of so many seconds of downtime.
    pub downtime: f64,
    /// The other two are the least: how fast the guest dirties its memory is known to be more than was seen.
    pub least: bool,
}

/// Rounds that are forecast at most.
const ROUNDS: u32 = 1000;

impl Model {
    /// From what was measured; `None` as long as a rate or the dirty curve is not known.
    #[must_use]
    pub fn of(history: &History) -> Option<Self> {
        Some(Self {
            rate: history.pages_per_second()?,
            curve: Curve::of(history)?,
            costs: Costs::of(history),
            burst: history.burst_pages_per_second(),
            overhead: 2.0 * history.round_trip().likely + history.harvest().likely,
            total_pages: history.total_pages() as f64,
        })
    }

    /// Seconds of downtime with so many pages left: they, what is dirtied until the guest stands still, and the fixed costs.
    #[must_use]
    pub fn downtime(&self, pages: f64) -> Bounds {
        let stopping = self.costs.harvest.plus(self.costs.stop);
        let late = Bounds::new(
            0.0,
            self.burst.likely * stopping.likely,
            self.burst.high * stopping.high,
        );
        let sending = Bounds::new(pages, pages, pages).plus(late).at(self.rate);
        self.costs.all().plus(sending)
    }

    /// The seconds of downtime that must be within the limit before the guest is stopped: the high bound of all that rounds
    /// measure (rates, harvests, round trips, what is dirtied), and the likely value of what only a switchover can measure.
    ///
    /// The high bound, since a limit is a promise and the next round may lower the bound. Not so the guesses: no number of
    /// rounds lowers them, so holding the guest back for their high bound would only make its migration fail.
    #[must_use]
    pub fn bound(&self, pages: f64) -> f64 {
        self.fixed() + (pages + self.late()) / self.rate.low.max(1e-9)
    }

    fn fixed(&self) -> f64 {
        self.costs.measured().high + self.costs.guessed().likely
    }

    fn late(&self) -> f64 {
        self.burst.high * (self.costs.harvest.high + self.costs.stop.likely)
    }

    /// Pages dirty after a round that sends so many.
    #[must_use]
    pub fn next(&self, pages: f64) -> f64 {
        self.curve
            .likely(pages / self.rate.likely.max(1e-9) + self.overhead)
    }

    /// The pages that rounds come down to: as many as are dirtied while they are sent.
    #[must_use]
    pub fn floor(&self) -> f64 {
        // The curve rises ever more slowly, so it crosses `next == pages` once.
        let (mut low, mut high) = (0.0, self.total_pages);
        for _ in 0..60 {
            let middle = f64::midpoint(low, high);
            if self.next(middle) > middle {
                low = middle;
            } else {
                high = middle;
            }
        }
        if high < 0.5 { 0.0 } else { high }
    }

    /// Seconds until so few pages are left that the bound is within `limit`, with `pages` left now; infinite: never.
    #[must_use]
    pub fn until(&self, pages: f64, limit: f64) -> Bounds {
        let course = |rate: f64, dirtied: &dyn Fn(f64) -> f64| {
            let (mut left, mut seconds) = (pages, 0.0);
            for _ in 0..ROUNDS {
                if self.bound(left) <= limit {
                    return seconds;
                }
                let round = left / rate.max(1e-9) + self.overhead;
                let next = dirtied(round);
                // From the second round on the course only goes on as it has begun.
                if next >= left && self.bound(next) > limit {
                    return f64::INFINITY;
                }
                (left, seconds) = (next, seconds + round);
            }
            f64::INFINITY
        };
        Bounds::new(
            course(self.rate.high, &|t| self.curve.pages(t).low),
            course(self.rate.likely, &|t| self.curve.likely(t)),
            course(self.rate.low, &|t| self.curve.pages(t).high),
        )
    }

    /// What each by itself would bring the floor to the limit.
    #[must_use]
    pub fn needs(&self, limit: f64) -> Needs {
        let downtime = self.bound(self.floor());
        let sending = limit - self.fixed();
        if sending <= 0.0 {
            return Needs {
                pages_per_second: f64::INFINITY,
                share: 0.0,
                downtime,
                least: false,
            };
        }
        // A round that lasts as long as the limit leaves for sending must leave no more than was sent in it.
        let round = sending + self.overhead;
        let carried = self.rate.low * sending;
        Needs {
            pages_per_second: (self.curve.likely(round) + self.late()) / sending,
            share: self.curve.share((carried - self.late()).max(0.0), round),
            downtime,
            least: self.curve.is_least(round),
        }
    }

    /// All of it, with `pages` left and a limit of downtime.
    #[must_use]
    pub fn forecast(&self, pages: f64, limit: Duration) -> Forecast {
        let limit = limit.as_secs_f64();
        let floor_pages = self.floor();
        let floor = self.bound(floor_pages);
        Forecast {
            downtime: self.downtime(pages),
            bound: self.bound(pages),
            next_downtime: self.downtime(self.next(pages)).likely,
            until: self.until(pages, limit),
            floor_pages,
            floor,
            converges: floor <= limit,
            needs: self.needs(limit),
        }
    }
}

impl Forecast {
    /// Seconds from start to end when `so_far` have passed: until a switchover is within the limit, and its downtime.
    #[must_use]
    pub fn total(&self, so_far: f64, limit: Duration) -> Bounds {
        let most = limit.as_secs_f64();
        let downtime = self.downtime;
        Bounds::new(
            so_far + self.until.low + downtime.low.min(most),
            so_far + self.until.likely + downtime.likely.min(most),
            so_far + self.until.high + downtime.high.min(most),
        )
    }

    /// After these rounds; `None` as long as it can't be told. A guest with nothing dirty needs no rate.
    #[must_use]
    pub fn of(history: &History, limit: Duration) -> Option<Self> {
        if let Some(model) = Model::of(history) {
            return Some(model.forecast(history.remaining_pages as f64, limit));
        }
        if history.remaining_pages > 0 {
            return None;
        }
        let costs = Costs::of(history);
        let bound = costs.measured().high + costs.guessed().likely;
        let converges = bound <= limit.as_secs_f64();
        // Only fixed costs are left, and no round lessens them.
        let until = if converges { 0.0 } else { f64::INFINITY };
        Some(Self {
            downtime: costs.all(),
            bound,
            next_downtime: costs.all().likely,
            until: Bounds::new(until, until, until),
            floor_pages: 0.0,
            floor: bound,
            converges,
            needs: Needs {
                pages_per_second: 0.0,
                share: 1.0,
                downtime: bound,
                least: false,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // helpers are not known to be tests
    use super::*;

    fn exactly(value: f64) -> Bounds {
        Bounds::new(value, value, value)
    }

    /// A link of 100,000 pages/s without any other cost, and a guest with this curve.
    fn model(points: &[(f64, f64)]) -> Model {
        let costs = Costs {
            harvest: exactly(0.0),
            round_trips: exactly(0.0),
            stop: exactly(0.0),
            state: exactly(0.0),
            build: exactly(0.0),
            go: exactly(0.0),
        };
        Model {
            rate: exactly(1e5),
            curve: Curve::fit(points.iter().copied(), 1e6).unwrap(),
            costs,
            burst: exactly(0.0),
            overhead: 0.0,
            total_pages: 1e6,
        }
    }

    fn near(found: f64, expected: f64) -> bool {
        (found / expected - 1.0).abs() < 1e-3
    }

    #[test]
    fn the_floor_is_what_is_dirtied_while_it_is_sent() {
        // A hot set stays whole.
        assert!(near(model(&[(0.1, 5e4), (10.0, 5e4)]).floor(), 5e4));
        // Half as fast as the link: half of it each round, so nothing in the end; twice as fast: everything.
        assert_eq!(model(&[(0.1, 5e3), (10.0, 5e5)]).floor(), 0.0);
        assert!(near(model(&[(0.1, 2e4), (1.0, 2e5)]).floor(), 1e6));
        // 1e5 * sqrt(t) pages, sent in 1e-5 seconds each: r = 1e5 * sqrt(r / 1e5).
        assert!(near(model(&[(0.01, 1e4), (1.0, 1e5)]).floor(), 1e5));
        // With an overhead of 10 ms there is always something: r = 5e4 * (r / 1e5 + 0.01).
        let slow = Model {
            overhead: 0.01,
            ..model(&[(0.1, 5e3), (10.0, 5e5)])
        };
        assert!(near(slow.floor(), 1e3));
    }

    #[test]
    fn the_way_to_the_limit_is_the_sum_of_its_rounds() {
        // Halved in each round: 1e6, 5e5, 2.5e5, 1.25e5 pages, of which the last are sent in 1.25 s.
        let halving = model(&[(0.1, 5e3), (10.0, 5e5)]);
        let until = halving.until(1e6, 1.3);
        assert!(near(until.likely, 10.0 + 5.0 + 2.5), "{until:?}");
        assert!(until.low < until.likely && until.likely < until.high);
        assert_eq!(halving.until(1e6, 11.0).likely, 0.0);
        let hot = model(&[(0.1, 5e4), (10.0, 5e4)]);
        assert_eq!(hot.until(1e6, 0.4).likely, f64::INFINITY);
        assert!(near(hot.until(1e6, 0.6).likely, 10.0));
    }

    #[test]
    fn what_it_needs_is_just_enough() {
        for points in [
            [(0.1, 5e4), (10.0, 5e4)],
            [(0.1, 2e4), (1.0, 2e5)],
            [(0.01, 1e4), (1.0, 1e5)],
        ] {
            let (limit, mut slow) = (0.3, model(&points));
            slow.overhead = 0.005;
            let needs = slow.needs(limit);
            assert!(slow.bound(slow.floor()) > limit, "{points:?}");
            let with = |rate: f64| Model {
                rate: exactly(rate),
                ..slow
            };
            let floor = |model: Model| model.bound(model.floor());
            assert!(floor(with(needs.pages_per_second * 1.01)) <= limit);
            assert!(floor(with(needs.pages_per_second * 0.97)) > limit);
            // A guest that runs for half of its time dirties in a second what it did in half a one.
            let slowed = |share: f64| Model {
                curve: Curve::fit(points.iter().map(|p| (p.0 / share, p.1)), 1e6).unwrap(),
                ..slow
            };
            // The curve does not reach to where a hot set is not yet dirty as a whole; the share is reckoned for there.
            if points[0].1 < points[1].1 {
                assert!(floor(slowed(needs.share * 0.99)) <= limit, "{points:?}");
                assert!(floor(slowed(needs.share * 1.03)) > limit, "{points:?}");
            } else {
                assert!(needs.share < 0.6, "{needs:?}");
            }
            assert!(near(needs.downtime, floor(slow)));
        }
    }

    #[test]
    fn no_link_is_fast_enough_where_the_fixed_costs_are_over_the_limit() {
        let mut far = model(&[(1.0, 10.0)]);
        far.costs.round_trips = exactly(0.6);
        let needs = far.needs(0.3);
        assert_eq!((needs.pages_per_second, needs.share), (f64::INFINITY, 0.0));
        assert!(near(needs.downtime, 0.6));
    }

    #[test]
    fn every_cost_is_in_the_downtime() {
        let mut model = model(&[(1.0, 10.0)]);
        let nothing = model.downtime(0.0).likely;
        let costs = &mut model.costs;
        let each = [
            &mut costs.harvest,
            &mut costs.round_trips,
            &mut costs.stop,
            &mut costs.state,
            &mut costs.build,
            &mut costs.go,
        ];
        for (n, cost) in (0..).zip(each) {
            *cost = exactly(f64::from(1 << n));
        }
        assert_eq!(nothing, 0.0);
        assert!(near(model.downtime(0.0).likely, 63.0));
        assert!(near(model.bound(1e5), 64.0));
        // 1 s of harvest and 4 s of stopping, at 1000 pages/s.
        model.burst = exactly(1000.0);
        assert!(near(model.downtime(0.0).likely, 63.0 + 5000.0 / 1e5));
    }
}
