//! What decisions hold to, for any history and for guests of many shapes.

#![allow(clippy::unwrap_used)] // helpers are not known to be tests

use std::num::NonZeroU64;
use std::time::Duration;

use proptest::prelude::*;

use super::simulated::{BUSY, CONVERGING, GOAL, Guest, ROAD, Road};
use super::*;
use crate::{Throttle, Throttles};

/// 100,000 pages/s were sent, nothing was dirtied, `remaining` pages are left.
fn history(remaining: u64) -> History {
    let mut history = History::default();
    history.elapsed = Duration::from_secs(10);
    history.push(Round {
        pages: 100_000,
        seconds: 1.0,
        dirty_seconds: 1.0,
        ..Round::default()
    });
    history.remaining_pages = remaining;
    history
}

fn verdict(history: &History) -> Verdict {
    decide(history, &GOAL).verdict
}

#[test]
fn nothing_is_known_before_the_first_round_unless_nothing_is_dirty() {
    let mut none = History::default();
    none.remaining_pages = 1;
    assert_eq!(verdict(&none), Verdict::Continue);
    none.remaining_pages = 0;
    assert_eq!(verdict(&none), Verdict::SwitchOver);
}

#[test]
fn fixed_costs_count() {
    let mut slow = history(0);
    assert_eq!(verdict(&slow), Verdict::SwitchOver);
    slow.round_trip_seconds = 0.2;
    let decision = decide(&slow, &GOAL);
    assert_eq!(decision.verdict, Verdict::Continue);
    // No bandwidth and no throttle helps against that.
    assert!(
        decision
            .reason
            .ends_with("; a downtime limit of 605 ms would do"),
        "{decision:?}"
    );
    slow.round_trip_seconds = 0.0;
    slow.harvest_seconds = 0.4;
    assert_eq!(verdict(&slow), Verdict::Continue);
}

#[test]
fn what_is_dirtied_until_the_guest_stands_still_counts() {
    let mut busy = history(0);
    busy.harvest_seconds = 0.02;
    busy.push(Round {
        pages: 25_000,
        seconds: 0.25,
        dirty_pages: 22_000,
        dirty_seconds: 0.25,
        ..Round::default()
    });
    let slower = decide(&busy, &GOAL).forecast.unwrap();
    // 88,000 pages/s during the 20 ms of the harvest and the 1 ms of the stop.
    let expected = 0.02 + 0.005 + (22_000.0 + 88_000.0 * 0.021) / 1e5;
    assert!(
        (slower.downtime.likely - expected).abs() < 1e-6,
        "{slower:?}"
    );
    assert!(slower.bound > slower.downtime.likely);
}

#[test]
fn without_a_timeout_it_goes_on_and_says_what_would_help() {
    let course = BUSY[0].migrate(ROAD, 20, |history| decide(history, &GOAL));
    let reason = &course.last.reason;
    assert_eq!(course.last.verdict, Verdict::Continue);
    assert!(reason.contains("not converging"), "{reason}");
    for way in ["a bandwidth of ", "a throttle of ", "a downtime limit of "] {
        assert!(reason.contains(way), "{reason}");
    }
}

/// What is said of a link that carries 10,000 pages/s, each as so many bytes, and of a guest of 100,000 pages that dirties
/// these in these seconds.
fn slow_link(dirtied: &[(f64, u64)], bytes: u64) -> String {
    let mut history = History::default();
    history.elapsed = Duration::from_secs(30);
    history.push(Round {
        pages: 100_000,
        bytes: 100_000 * bytes,
        seconds: 10.0,
        dirty_pages: 100_000,
        dirty_seconds: 10.0,
        ..Round::default()
    });
    for (seconds, dirty_pages) in dirtied {
        history.push(Round {
            pages: 10_000,
            bytes: 10_000 * bytes,
            seconds: 1.0,
            dirty_pages: *dirty_pages,
            dirty_seconds: *seconds,
            ..Round::default()
        });
    }
    decide(&history, &GOAL).reason
}

#[test]
fn what_helps_is_a_least_where_most_memory_is_seen_dirty() {
    let most = slow_link(&[(10.0, 99_000), (9.0, 97_000)], 4096);
    for least in [
        "a bandwidth of more than ",
        "a throttle of more than ",
        " would do (how much more is not known",
    ] {
        assert!(most.contains(least), "{most}");
    }
    let seen = slow_link(&[(0.1, 30_000), (1.0, 40_000)], 4096);
    let exact = seen.contains("would do") && !seen.contains("more than");
    assert!(exact, "{seen}");
}

#[test]
fn memory_that_is_packed_is_told_of_in_its_own_bytes() {
    let dirtied = [(10.0, 99_000), (9.0, 97_000)];
    let (plain, packed) = (slow_link(&dirtied, 4096), slow_link(&dirtied, 1024));
    let said = " (all in bytes of memory, of which 25 % go over the wire)";
    assert!(packed.contains(said), "{packed}");
    assert_eq!(packed.replace(said, ""), plain);
}

#[test]
fn a_guest_at_its_floor_is_known_to_stay_there() {
    // 1 - e^(-1.5 u) = u: it dirties so much of its memory while so much of it is sent.
    let floor = 0.583e6;
    for rounds in 4..40 {
        let course = BUSY[1].migrate(ROAD, rounds, |history| decide(history, &GOAL));
        let forecast = course.last.forecast.unwrap();
        let near = (forecast.floor_pages / floor - 1.0).abs() < 0.05;
        assert!(near && !forecast.converges, "{rounds} rounds: {forecast:?}");
    }
}

#[test]
fn the_limit_that_is_said_to_do_does() {
    for guest in &BUSY[..2] {
        let before = guest.migrate(ROAD, 12, |history| decide(history, &GOAL));
        let needs = before.last.forecast.unwrap().needs;
        let goal = Goal {
            downtime_limit: Duration::from_secs_f64(needs.downtime * 1.05),
            ..GOAL
        };
        let after = guest.migrate(ROAD, 100, |history| decide(history, &goal));
        assert_eq!(after.last.verdict, Verdict::SwitchOver, "{after:?}");
        let faster = Road {
            rate: needs.pages_per_second * 1.05,
            ..ROAD
        };
        let after = guest.migrate(faster, 200, |history| decide(history, &GOAL));
        assert_eq!(
            after.last.verdict,
            Verdict::SwitchOver,
            "{}: {after:?}",
            guest.name
        );
    }
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
    assert!(decision.reason.contains("3.8 GiB are left"), "{decision:?}");
    goal.on_timeout = OnTimeout::Switchover;
    assert_eq!(decide(&history, &goal).verdict, Verdict::SwitchOver);
    goal.held = Some("by a test");
    assert_eq!(decide(&history, &goal).verdict, Verdict::GiveUp);
}

#[test]
fn a_time_limit_that_comes_first_is_foretold() {
    let goal = Goal {
        timeout: Some(Duration::from_secs(12)),
        ..GOAL
    };
    let reason = decide(&history(1_000_000), &goal).reason;
    assert!(
        reason.contains("converging: within it in about 10 s"),
        "{reason}"
    );
    assert!(
        reason.ends_with("but the time limit ends it in 2.0 s"),
        "{reason}"
    );
}

#[test]
fn guests_of_many_shapes_are_stopped_within_the_limit_after_few_rounds() {
    for guest in &CONVERGING {
        let course = guest.migrate(ROAD, 60, |history| decide(history, &GOAL));
        assert_eq!(
            course.last.verdict,
            Verdict::SwitchOver,
            "{}: {course:?}",
            guest.name
        );
        assert!(course.downtime <= 0.3, "{}: {course:?}", guest.name);
        let forecast = course.last.forecast.unwrap().downtime;
        let held = forecast.low <= course.downtime && course.downtime <= forecast.high;
        assert!(held, "{}: {course:?}", guest.name);
    }
}

#[test]
fn the_smallest_rest_is_no_larger_than_the_first_that_fits() {
    let first_that_fits = |history: &History| {
        let mut decision = decide(history, &GOAL);
        if decision.forecast.unwrap().bound <= 0.3 {
            decision.verdict = Verdict::SwitchOver;
        }
        decision
    };
    let mut gained = 0;
    for guest in &CONVERGING {
        let first = guest.migrate(ROAD, 60, first_that_fits);
        let smallest = guest.migrate(ROAD, 60, |history| decide(history, &GOAL));
        // A round takes 1 ms of the noise that is not worth one.
        let name = guest.name;
        assert!(
            smallest.downtime <= first.downtime + 0.001,
            "{name}: {smallest:?} {first:?}"
        );
        assert!(smallest.rounds <= first.rounds + 5, "{name}");
        gained += u32::from(smallest.downtime < 0.7 * first.downtime);
    }
    assert!(gained >= 3, "{gained}");
}

#[test]
fn guests_that_do_not_converge_end_with_their_time() {
    for guest in &BUSY {
        for on_timeout in [OnTimeout::Cancel, OnTimeout::Switchover] {
            let goal = Goal {
                timeout: Some(Duration::from_secs(40)),
                on_timeout,
                ..GOAL
            };
            let course = guest.migrate(ROAD, 1000, |history| decide(history, &goal));
            assert!(
                course.seconds >= 40.0 && course.seconds < 60.0,
                "{course:?}"
            );
            let expected = match on_timeout {
                OnTimeout::Cancel => Verdict::GiveUp,
                OnTimeout::Switchover => Verdict::SwitchOver,
            };
            assert_eq!(course.last.verdict, expected);
        }
    }
}

#[test]
fn a_throttled_guest_converges() {
    for throttle in [Throttles::All, Throttles::Writers] {
        let goal = Goal { throttle, ..GOAL };
        for guest in &BUSY {
            let mut steps = Vec::new();
            let course = guest.migrate(ROAD, 60, |history| {
                let decision = decide(history, &goal);
                if let Verdict::Throttle(step) = decision.verdict {
                    assert!(!decision.forecast.unwrap().converges);
                    steps.push(step);
                }
                decision
            });
            let name = guest.name;
            assert_eq!(
                course.last.verdict,
                Verdict::SwitchOver,
                "{name}: {course:?}"
            );
            assert!(course.downtime <= 0.3, "{name}: {course:?}");
            assert_eq!(steps.last(), Some(&course.throttle), "{name}");
            if throttle == Throttles::All {
                assert_eq!(steps[0], Throttle::All { percent: 20 });
            }
        }
        for guest in &CONVERGING {
            // One that is busy for its first 20 s can't be told from one that stays so.
            let course = guest.migrate(ROAD, 60, |history| decide(history, &goal));
            let throttled = course.throttle != Throttle::Off;
            assert_eq!(throttled, guest.name == "calm after 20 s", "{}", guest.name);
        }
    }
}

#[test]
fn where_no_throttle_helps_it_goes_on_and_says_so() {
    // It has another hot set each time that it is looked at.
    let stubborn = Guest {
        name: "stubborn",
        pages: 1e6,
        hot: |_| 1e6,
        writes: |_| 1e9,
        cold: 0.0,
    };
    let goal = Goal {
        throttle: Throttles::All,
        ..GOAL
    };
    let course = stubborn.migrate(ROAD, 60, |history| decide(history, &goal));
    assert_eq!(course.last.verdict, Verdict::Continue);
    assert_eq!(course.throttle, Throttle::All { percent: 99 });
    assert!(
        course.last.reason.contains("throttled as far as it goes"),
        "{course:?}"
    );
}

#[test]
fn a_step_is_given_two_rounds_before_the_next_one() {
    let goal = Goal {
        throttle: Throttles::All,
        ..GOAL
    };
    let mut history = history(0);
    // Dirtied three times as fast as sent, whatever the throttle.
    let mut after_another_round = || {
        history.push(Round {
            pages: 100_000,
            seconds: 1.0,
            dirty_pages: 300_000,
            dirty_seconds: 1.0,
            ..Round::default()
        });
        history.remaining_pages = 300_000;
        let verdict = decide(&history, &goal).verdict;
        if let Verdict::Throttle(throttle) = verdict {
            history.throttle = throttle;
        }
        verdict
    };
    let first = Verdict::Throttle(Throttle::All { percent: 20 });
    assert!((0..6).any(|_| after_another_round() == first));
    for percent in [30, 40, 50] {
        // It may have begun before the step: it says nothing of it.
        assert_eq!(after_another_round(), Verdict::Continue, "{percent}");
        let next = Verdict::Throttle(Throttle::All { percent });
        assert_eq!(after_another_round(), next);
    }
}

/// Rounds of any kind.
fn histories() -> impl Strategy<Value = History> {
    let throttle = prop_oneof![
        3 => Just(Throttle::Off),
        1 => Just(Throttle::All { percent: 30 }),
        1 => Just(Throttle::All { percent: 99 }),
        1 => Just(Throttle::Writers { pages_per_second: NonZeroU64::new(500).unwrap() }),
    ];
    let pages = || prop_oneof![Just(0u64), 0..2000u64, 0..1_000_000u64];
    let seconds = || prop_oneof![Just(0.0), 1e-6..0.1, 0.0..50.0];
    let round = (pages(), pages(), seconds(), pages(), seconds());
    let rest = (0.0..0.3, 0.0..0.3, throttle);
    (
        proptest::collection::vec((round, rest), 0..24),
        pages(),
        0u64..60,
    )
        .prop_map(|(rounds, remaining, elapsed)| {
            let mut history = History::default();
            for ((pages, zero_pages, seconds, dirty_pages, dirty_seconds), rest) in rounds {
                (history.harvest_seconds, history.round_trip_seconds) = (rest.0, rest.1);
                history.throttle = rest.2;
                history.push(Round {
                    pages,
                    zero_pages,
                    bytes: pages * 4096,
                    seconds,
                    dirty_pages,
                    dirty_seconds,
                });
            }
            history.remaining_pages = remaining;
            history.elapsed = Duration::from_secs(elapsed);
            history
        })
}

fn goals() -> impl Strategy<Value = Goal> {
    let throttle = [Throttles::Nothing, Throttles::All, Throttles::Writers];
    let on_timeout = [OnTimeout::Cancel, OnTimeout::Switchover];
    (
        0u64..5000,
        proptest::option::of(0u64..60),
        proptest::sample::select(on_timeout.to_vec()),
        proptest::sample::select(throttle.to_vec()),
        any::<bool>(),
    )
        .prop_map(|(limit, timeout, on_timeout, throttle, held)| Goal {
            downtime_limit: Duration::from_millis(limit),
            timeout: timeout.map(Duration::from_secs),
            on_timeout,
            throttle,
            held: held.then_some("by a test"),
        })
}

proptest! {
    #[test]
    fn a_switchover_is_never_begun_held_back_nor_over_the_limit(history in histories(), goal in goals()) {
        let decision = decide(&history, &goal);
        let limit = goal.downtime_limit.as_secs_f64();
        let over = goal.timeout.is_some_and(|timeout| history.elapsed >= timeout);
        if decision.verdict == Verdict::SwitchOver {
            prop_assert!(goal.held.is_none());
            prop_assert!(over || decision.forecast.unwrap().bound <= limit);
            prop_assert!(!over || goal.on_timeout == OnTimeout::Switchover);
        }
        prop_assert_eq!(
            over && decision.verdict != Verdict::SwitchOver,
            decision.verdict == Verdict::GiveUp
        );
        if let Verdict::Throttle(_) = decision.verdict {
            prop_assert!(goal.throttle != Throttles::Nothing && goal.held.is_none());
            prop_assert!(!decision.forecast.unwrap().converges);
        }
        prop_assert!(!decision.reason.is_empty() && !decision.reason.contains('\n'));
        prop_assert!(!decision.reason.contains("NaN") && !decision.reason.contains("inf"), "{}", decision.reason);
        prop_assert_eq!(&decision, &decide(&history, &goal));
    }

    #[test]
    fn more_to_send_is_no_reason_to_stop_the_guest(
        history in histories(), goal in goals(), more in 1u64..100_000,
    ) {
        let mut fuller = history.clone();
        fuller.remaining_pages += more;
        if decide(&history, &goal).verdict == Verdict::Continue {
            prop_assert_ne!(decide(&fuller, &goal).verdict, Verdict::SwitchOver);
        }
    }

    #[test]
    fn bounds_of_a_forecast_are_in_order(history in histories(), limit in 0u64..5000) {
        let limit = Duration::from_millis(limit);
        if let Some(forecast) = Forecast::of(&history, limit) {
            for bounds in [forecast.downtime, forecast.until, forecast.total(1.0, limit)] {
                prop_assert!(bounds.low >= 0.0 && bounds.low <= bounds.likely && bounds.likely <= bounds.high);
            }
            prop_assert!(forecast.bound <= forecast.downtime.high * (1.0 + 1e-9));
            prop_assert!((0.0..=1.0).contains(&forecast.needs.share));
            prop_assert_eq!(forecast.until.likely == 0.0, forecast.bound <= limit.as_secs_f64());
        }
    }
}
