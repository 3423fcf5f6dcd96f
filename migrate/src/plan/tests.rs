//! A replay is the rounds of a guest that does what its trace says; each rule is what it is said to be.
#![allow(clippy::unwrap_used)] // helpers are not known to be tests

use std::collections::BTreeSet;
use std::num::NonZeroU64;
use std::time::Duration;

use gleaner_bitmap::{PAGE_SIZE, PageRange};
use proptest::prelude::*;

use super::guest::TracedGuest;
use super::outcome::replay_in;
use super::*;
use crate::trace::{Followed, Trace, TraceWriter};
use crate::{CancelToken, Error, OnTimeout, Throttle};

const INTERVAL: u64 = 100_000;

/// A guest of so many pages that dirties these in each interval of 100 ms.
fn trace(pages: u64, dirtied: &[Vec<u64>]) -> Trace {
    let mut file = Vec::new();
    let mut writer = TraceWriter::new(&mut file, Followed::ALL).unwrap();
    let ram = writer.block("ram", pages).unwrap();
    for (n, pages) in (1..).zip(dirtied) {
        for page in pages {
            writer.dirtied(ram, PageRange::new(*page, 1));
        }
        writer.record(Duration::from_micros(n * INTERVAL)).unwrap();
    }
    Trace::read(&file[..]).unwrap()
}

fn dirtied() -> impl Strategy<Value = Vec<Vec<u64>>> {
    proptest::collection::vec(proptest::collection::vec(0u64..500, 0..60), 1..12)
}

fn different<'a>(of: impl Iterator<Item = &'a Vec<u64>>) -> f64 {
    of.flatten().collect::<BTreeSet<_>>().len() as f64
}

proptest! {
    #[test]
    fn over_whole_intervals_it_dirties_what_they_say_over_and_over(
        dirtied in dirtied(), windows in proptest::collection::vec(1usize..20, 1..8),
    ) {
        let trace = trace(500, &dirtied);
        let mut guest = TracedGuest::new(&trace);
        let mut at = 0;
        for window in windows {
            let wanted = different(dirtied.iter().cycle().skip(at).take(window));
            let seconds = INTERVAL as f64 / 1e6 * window as f64;
            prop_assert_eq!(guest.dirtied(seconds, Throttle::Off), wanted);
            at = (at + window) % dirtied.len();
        }
    }

    #[test]
    fn parts_of_an_interval_have_all_of_it_between_them(dirtied in dirtied(), cuts in proptest::collection::vec(1u32..10, 1..6)) {
        let trace = trace(500, &dirtied);
        let whole = different(dirtied.iter().take(1));
        let all: u32 = cuts.iter().sum();
        let mut guest = TracedGuest::new(&trace);
        let mut parts = 0.0;
        for cut in cuts {
            let part = guest.dirtied(0.1 * f64::from(cut) / f64::from(all), Throttle::Off);
            prop_assert!(part <= whole);
            parts += part;
        }
        prop_assert!(parts >= whole, "{} {}", parts, whole);
    }

    #[test]
    fn half_as_fast_it_dirties_what_it_would_in_half_the_time(dirtied in dirtied(), seconds in 0.0..3.0) {
        let trace = trace(500, &dirtied);
        let at_half = TracedGuest::new(&trace).dirtied(seconds, Throttle::All { percent: 50 });
        let half = TracedGuest::new(&trace).dirtied(seconds * 0.5, Throttle::Off);
        // The nanosecond may fall the other way.
        prop_assert!((at_half - half).abs() <= 1.0, "{} {}", at_half, half);
    }

    #[test]
    fn what_more_there_would_be_changes_nothing(dirtied in dirtied(), first in 0.0..2.0, then in 0.0..2.0) {
        let trace = trace(500, &dirtied);
        let (mut asked, mut not) = (TracedGuest::new(&trace), TracedGuest::new(&trace));
        let both = TracedGuest::new(&trace).dirtied(first + then, Throttle::Off);
        let more = {
            not.dirtied(first, Throttle::Off);
            let dirty = asked.dirtied(first, Throttle::Off);
            let more = asked.more(then, Throttle::Off);
            prop_assert_eq!(asked.more(then, Throttle::Off), more);
            dirty + more
        };
        prop_assert!((more - both).abs() <= 1.0, "{} {}", more, both);
        prop_assert_eq!(asked.dirtied(then, Throttle::Off), not.dirtied(then, Throttle::Off));
    }

    #[test]
    fn a_guest_whose_writers_are_slowed_dirties_no_more_than_they_may(
        dirtied in dirtied(), most in 50u64..2000, passes in 1.0..40.0,
    ) {
        let trace = trace(500, &dirtied);
        let seconds = INTERVAL as f64 / 1e6 * dirtied.len() as f64 * passes;
        let throttle = Throttle::Writers { pages_per_second: NonZeroU64::new(most).unwrap() };
        // In intervals, so that no page counts twice for coming back; 60 pages in 100 ms are 600 a second at most.
        let mut guest = TracedGuest::new(&trace);
        let mut sum = 0.0;
        let steps = 50;
        for _ in 0..steps {
            sum += guest.dirtied(seconds / f64::from(steps), throttle);
        }
        // A page that is written all the time is in each step.
        let always = 60.0 * f64::from(steps);
        prop_assert!(sum <= most as f64 * seconds * 1.01 + always, "{} {}", sum, most as f64 * seconds);
    }
}

#[test]
fn a_page_of_five_intervals_in_a_row_is_in_any_part_of_the_middle_one() {
    let hot: Vec<u64> = (0..100).collect();
    let often = trace(500, &vec![hot; 8]);
    let mut guest = TracedGuest::new(&often);
    guest.dirtied(0.35, Throttle::Off);
    assert_eq!(guest.dirtied(0.001, Throttle::Off), 100.0);
    let once = trace(500, &[vec![], vec![], (0..100).collect(), vec![], vec![]]);
    let mut guest = TracedGuest::new(&once);
    guest.dirtied(0.25, Throttle::Off);
    assert!(guest.dirtied(0.001, Throttle::Off) < 20.0);
}

fn replay(trace: &Trace, terms: &Terms, rule: Rule) -> Outcome {
    super::replay(trace, terms, rule, &CancelToken::new()).unwrap()
}

/// The same, of that many rounds, harvested while they go on or not.
fn rounds(trace: &Trace, terms: &Terms, rounds: u32, early: bool) -> Outcome {
    replay_in(
        trace,
        terms,
        Rule::Rounds(rounds),
        early,
        &CancelToken::new(),
    )
    .unwrap()
}

/// 1 GiB over 256 MiB a second.
fn terms() -> Terms {
    Terms {
        bandwidth: 256 << 20,
        round_trip: Duration::from_millis(1),
        downtime_limit: Duration::from_millis(300),
        timeout: None,
        on_timeout: OnTimeout::Cancel,
    }
}

fn made(workload: Workload, seed: u64) -> Trace {
    let mut file = Vec::new();
    let synthetic = Synthetic {
        followed: Followed::one_of(4).unwrap(),
        ..Synthetic::new(workload, 1 << 18, Duration::from_secs(60), seed)
    };
    synthetic.write(&mut file).unwrap();
    Trace::read(&file[..]).unwrap()
}

#[test]
fn a_guest_that_does_nothing_is_sent_once_by_every_rule() {
    let idle = trace(1 << 18, &vec![vec![]; 10]);
    for rule in Rule::ALL {
        let outcome = replay(&idle, &terms(), rule);
        assert!(
            outcome.moved && outcome.bytes == f64::from(1 << 30),
            "{outcome:?}"
        );
        assert!(
            (4000.0..4100.0).contains(&outcome.total_ms) || outcome.rounds > 4,
            "{outcome:?}"
        );
        // 5 ms of guesses, 1 ms of harvest, two round trips: nothing is left to wait for.
        assert!((outcome.downtime_ms - 8.0).abs() < 0.1, "{outcome:?}");
    }
}

#[test]
fn the_clairvoyant_stops_at_the_first_round_that_any_number_of_rounds_could_have_stopped_at() {
    let mut compared = 0;
    for workload in Workload::ALL {
        for seed in 0..2 {
            let trace = made(workload, seed);
            let clairvoyant = replay(&trace, &terms(), Rule::Clairvoyant);
            let fixed = (1..=30).map(|n| rounds(&trace, &terms(), n, true));
            let best = fixed
                .filter(|outcome| outcome.overshoot_ms == 0.0)
                .min_by(|a, b| a.bytes.total_cmp(&b.bytes));
            if let Some(best) = best {
                assert_eq!(
                    (clairvoyant.rounds, clairvoyant.bytes),
                    (best.rounds, best.bytes)
                );
                compared += 1;
            } else {
                assert!(!clairvoyant.moved || clairvoyant.rounds > 31);
            }
        }
    }
    assert!(compared >= 6, "{compared}");
}

#[test]
fn what_is_written_before_its_turn_is_not_sent_again() {
    // 1 GiB in 1 s. The first sixteenth is written when the first half has gone, the last one too.
    let (pages, part) = (1u64 << 18, 1u64 << 14);
    let mut records = vec![vec![]; 10];
    records[4] = (0..part).chain(pages - part..pages).collect();
    let once = trace(pages, &records);
    let terms = Terms {
        bandwidth: 1 << 30,
        ..terms()
    };
    let again = |early, expected: u64| {
        let outcome = rounds(&once, &terms, 1, early);
        let off = outcome.bytes / PAGE_SIZE as f64 - (pages + expected) as f64;
        assert!(off.abs() < 0.5, "{early} {off}");
    };
    again(true, part);
    again(false, 2 * part);
}

#[test]
fn each_rule_stops_where_it_says() {
    // All of its memory each 100 ms: no round ever leaves less.
    let busy = trace(1 << 14, &vec![(0..1 << 14).collect(); 20]);
    let terms = Terms {
        bandwidth: 32 << 20,
        ..terms()
    };
    let by = |rule| replay(&busy, &terms, rule);
    // And one round with the guest stopped.
    assert_eq!(by(Rule::Rounds(7)).rounds, 8);
    assert_eq!(by(Rule::CloudHypervisor).rounds, 6);
    assert_eq!(by(Rule::LocalMinimum).rounds, 2);
    for rule in [Rule::CloudHypervisor, Rule::LocalMinimum] {
        assert!(by(rule).overshoot_ms > 1000.0);
    }
    for rule in [Rule::Gleaner, Rule::Clairvoyant] {
        let outcome = by(rule);
        assert!(
            !outcome.moved && outcome.total_ms >= 600_000.0,
            "{outcome:?}"
        );
    }
    assert!(by(Rule::Gleaner).reason.contains("not converging"));
    // Two seconds a round, each of them bad: 20 % after the second, and 10 % more after each second one.
    let qemu = by(Rule::Qemu);
    assert_eq!(qemu.throttle, Throttle::All { percent: 99 });
    // Half of the memory in each round is not more than half of what was sent.
    let half = trace(1 << 14, &vec![(0..1 << 13).collect(); 20]);
    assert_eq!(
        replay(&half, &terms, Rule::Qemu).throttle,
        Throttle::All { percent: 99 }
    );
}

#[test]
fn a_time_limit_ends_every_rule_as_asked() {
    let busy = trace(1 << 14, &vec![(0..1 << 14).collect(); 20]);
    for on_timeout in [OnTimeout::Cancel, OnTimeout::Switchover] {
        let terms = Terms {
            bandwidth: 8 << 20,
            timeout: Some(Duration::from_secs(20)),
            on_timeout,
            ..terms()
        };
        for rule in [
            Rule::Gleaner,
            Rule::Qemu,
            Rule::Clairvoyant,
            Rule::Rounds(9),
        ] {
            let outcome = replay(&busy, &terms, rule);
            assert_eq!(
                outcome.moved,
                on_timeout == OnTimeout::Switchover,
                "{outcome:?}"
            );
            // Rounds take 8 s.
            assert!((20e3..40e3).contains(&outcome.total_ms), "{outcome:?}");
        }
    }
}

#[test]
fn a_replay_that_is_called_off_has_no_outcome() {
    let cancel = CancelToken::new();
    cancel.cancel();
    let busy = made(Workload::Stress, 1);
    for rule in Rule::ALL {
        let outcome = super::replay(&busy, &terms(), rule, &cancel);
        assert!(matches!(outcome, Err(Error::Cancelled)), "{outcome:?}");
    }
}

#[test]
fn what_takes_over_a_year_is_null_for_scripts_and_told_in_words() {
    // 1 GiB at 16 B/s: two years for the first round.
    let terms = Terms {
        bandwidth: 16,
        ..terms()
    };
    let idle = trace(1 << 18, &vec![vec![]; 10]);
    assert_eq!(terms.horizon(&idle), Duration::from_secs(365 * 86_400));
    for rule in [Rule::Rounds(3), Rule::Gleaner] {
        let outcome = replay(&idle, &terms, rule);
        assert!(outcome.reason.ends_with("over a year"), "{outcome:?}");
        let object = serde_json::to_value(&outcome).unwrap();
        assert!(object["total_ms"].is_null(), "{object}");
        assert!(object["overshoot_ms"].is_number(), "{object}");
    }
}

#[test]
fn the_same_trace_is_made_again_and_another_seed_is_another_guest() {
    let bytes = |seed| {
        let mut file = Vec::new();
        let database = Synthetic::new(Workload::Database, 1 << 16, Duration::from_secs(5), seed);
        database.write(&mut file).unwrap();
        file
    };
    assert_eq!(bytes(1), bytes(1));
    assert_ne!(bytes(1), bytes(2));
}

#[test]
fn made_up_guests_do_what_they_are_named_after() {
    for seed in 0..10 {
        let rates = |workload| -> Vec<u64> {
            made(workload, seed)
                .records()
                .iter()
                .map(|record| record.pages)
                .collect()
        };
        let (most, least) = (
            |r: &[u64]| *r.iter().max().unwrap(),
            |r: &[u64]| *r.iter().min().unwrap(),
        );
        let idle = rates(Workload::Idle);
        assert!(most(&idle) < 20, "{idle:?}");
        let swings = rates(Workload::Oscillating);
        assert!(most(&swings) > 4 * least(&swings).max(1), "{swings:?}");
        let growing = made(Workload::Growing, seed);
        let mut guest = TracedGuest::new(&growing);
        let tens: Vec<f64> = (0..6).map(|_| guest.dirtied(10.0, Throttle::Off)).collect();
        assert!(tens[5] > 2.0 * tens[0], "{tens:?}");
        assert!(least(&rates(Workload::Stress)) > 10 * most(&idle));
    }
}

#[test]
fn an_hour_of_a_tebibyte_takes_some_megabytes() {
    // A minute of it, for the sake of the time that this takes.
    for workload in Workload::ALL {
        let mut file = Vec::new();
        let minute = Synthetic::new(workload, 1 << 28, Duration::from_secs(60), 1);
        minute.write(&mut file).unwrap();
        assert!(file.len() * 60 < 50 << 20, "{workload}: {}", file.len());
    }
}
