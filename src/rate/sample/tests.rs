//! A sampler of a guest that is made up.

#![allow(clippy::unwrap_used)] // helpers are not known to be tests

use std::time::Duration;

use gleaner_bitmap::{BlockId, BlockInfo, PAGE_SIZE};

use super::{Goal, Random, Sampled, Sampler, Sight, Task};
use crate::rate::{Findings, Report};

const PAGES: u64 = 1 << 18;
/// CPU time of a look.
const LOOK: Duration = Duration::from_micros(2);

fn goal(seconds: u64) -> Goal {
    Goal {
        duration: Some(Duration::from_secs(seconds)),
        interval: Duration::from_secs(1),
        precision: 0.05,
        cpu: 0.02,
    }
}

/// Samples a guest of which `sees` says what is in a page at a time; until it is over, or called off.
fn run(
    goal: Goal,
    seed: u64,
    off: Option<Duration>,
    sees: impl Fn(u64, Duration) -> Sight,
) -> Report {
    let info = |id, name, pages| BlockInfo::new(BlockId(id), name, pages * PAGE_SIZE).unwrap();
    let blocks = vec![info(1, "low", PAGES / 4), info(2, "high", PAGES / 4 * 3)];
    let mut sampler = Sampler::new(goal, Sampled::new(goal, blocks), Duration::ZERO, LOOK, seed);
    let (mut now, mut spent) = (Duration::ZERO, Duration::ZERO);
    while let Some(due) = sampler.due() {
        now = now.max(due.min(off.unwrap_or(due)));
        if off.is_some_and(|off| now >= off) {
            sampler.finish(now);
        }
        sampler.spend(spent);
        let Some(task) = sampler.take(now) else {
            continue;
        };
        let sights = |task: &Task| -> Vec<Sight> {
            let pages = task.pages().iter();
            pages.map(|(page, _)| sees(*page, now)).collect()
        };
        let sights = sights(&task);
        sampler.see(&task, now, &sights);
        let took = LOOK * u32::try_from(sights.len()).unwrap();
        (now, spent) = (now + took, spent + took);
    }
    sampler.found().report()
}

/// Of this part of all pages, scattered, each is written 100 times a second.
fn scattered(part: f64) -> impl Fn(u64, Duration) -> Sight {
    move |page, now| {
        let chance = Random::new(page).bits() as f64 / u64::MAX as f64;
        let writes = now.as_millis() / 10;
        Some(if chance < part {
            u64::try_from(writes).unwrap() + 2
        } else {
            1
        })
    }
}

fn holds(interval: [f64; 2], truth: f64) -> bool {
    (interval[0]..=interval[1]).contains(&truth)
}

#[test]
fn every_figure_is_as_precise_as_was_asked_for_within_the_cpu_time() {
    for part in [0.01, 0.03, 0.3, 0.9] {
        let truth = (0..PAGES).filter(|p| scattered(part)(*p, Duration::from_secs(9)) != Some(1));
        let truth = truth.count() as f64;
        let rate = truth * PAGE_SIZE as f64;
        let (mut squares, mut whole) = (0.0, 0.0);
        for seed in 0..20 {
            let report = run(goal(20), seed, None, scattered(part));
            let sampling = report.sampling.unwrap();
            assert!(sampling.precision_reached.unwrap() < 0.052, "{sampling:?}");
            assert!(sampling.cpu_used < 0.0202, "{sampling:?}");
            assert_eq!(report.windows.bytes_per_second.samples, 20);
            squares += (report.dirty_bytes_per_second / rate - 1.0).powi(2);
            whole += (report.unique_pages as f64 / truth - 1.0).powi(2);
        }
        // Of 20 runs the standard deviation is known to 16 %: three times that.
        let [windows, whole] = [squares, whole].map(|sum: f64| (sum / 20.0).sqrt());
        assert!(
            windows < 0.075 && whole < 0.075,
            "{part}: {windows}, {whole}"
        );
    }
}

#[test]
fn the_interval_holds_what_is_true_in_19_of_20_runs() {
    let truth = (0..PAGES).filter(|p| scattered(0.02)(*p, Duration::from_secs(9)) != Some(1));
    let truth = truth.count() as f64;
    let (mut rates, mut wholes, mut short) = (0, 0, 0);
    for seed in 100..200 {
        let report = run(goal(5), seed, None, scattered(0.02));
        let interval = report.dirty_bytes_per_second_interval95;
        rates += u32::from(holds(interval, truth * PAGE_SIZE as f64));
        let interval = report.unique_pages_interval95.map(|pages| pages as f64);
        wholes += u32::from(holds(interval, truth));
        short += u32::from(holds(report.curve[0].interval95, truth));
    }
    // Fewer come out of one in 1000 such tests.
    for held in [rates, wholes, short] {
        assert!(held >= 88, "{rates}, {wholes}, {short} of 100");
    }
}

#[test]
fn more_changes_in_more_time_and_in_the_block_where_it_is_written() {
    // A page of the low block in 50 ms, of 50,000.
    let sweep = |page: u64, now: Duration| {
        let written = now.as_secs_f64() * 5000.0 > page as f64;
        Some(1 + u64::from(written && page < 50_000))
    };
    let report = run(goal(10), 1, None, sweep);
    let at = |ms: f64| report.curve.iter().find(|p| p.ms == ms).unwrap();
    for (ms, pages) in [
        (500.0, 2500.0),
        (1000.0, 5000.0),
        (5000.0, 25_000.0),
        (10_000.0, 50_000.0),
    ] {
        let point = at(ms);
        let [low, high] = point.interval95;
        assert!(
            (low - 200.0..=high + 200.0).contains(&pages),
            "{ms}: {point:?}"
        );
    }
    assert!(report.curve.is_sorted_by_key(|p| p.ms));
    assert_eq!(report.blocks[1].unique_pages, 0);
    assert!(
        report.blocks[0].unique_pages.abs_diff(50_000) < 1500,
        "{:?}",
        report.blocks
    );
}

#[test]
fn called_off_early_it_tells_what_was_until_then() {
    let early = Some(Duration::from_millis(3300));
    let report = run(goal(3600), 1, early, scattered(0.1));
    assert!(
        (3200.0..3500.0).contains(&report.duration_ms),
        "{}",
        report.duration_ms
    );
    let pages = PAGES as f64 * 0.1;
    assert!(
        (report.unique_pages as f64 / pages - 1.0).abs() < 0.15,
        "{}",
        report.unique_pages
    );
    // Before anything was looked at twice nothing is known.
    let report = run(goal(10), 1, Some(Duration::ZERO), scattered(0.1));
    assert_eq!(report.unique_pages_interval95, [0, PAGES]);
    assert!(report.curve.is_empty());
}

#[test]
fn without_end_it_goes_on_and_forgets_nothing() {
    let endless = Goal {
        duration: None,
        ..goal(1)
    };
    let report = run(endless, 1, Some(Duration::from_secs(2000)), scattered(0.05));
    assert!(report.windows.bytes_per_second.samples > 1900);
    assert!(
        (1.99e6..2.01e6).contains(&report.duration_ms),
        "{}",
        report.duration_ms
    );
    let rate = PAGES as f64 * 0.05 * PAGE_SIZE as f64;
    assert!((report.dirty_bytes_per_second / rate - 1.0).abs() < 0.03);
    assert!(report.sampling.unwrap().cpu_used < 0.0202);
}

#[test]
fn a_guest_that_writes_nothing_may_write_a_little() {
    let report = run(goal(2), 1, None, |_, _| Some(1));
    assert_eq!(
        (report.unique_pages, report.dirty_bytes_per_second),
        (0, 0.0)
    );
    assert_eq!(report.sampling.unwrap().precision_reached, None);
    let [low, high] = report.unique_pages_interval95;
    assert!(low == 0 && (10..500).contains(&high), "{high}");
}
