//! The museum: bugs that lost or misplaced guest pages in systems that were shipped. Each is planted here, and each is found.
//!
//! A killer is run twice in each mode of tracking that can have the bug: without it, when it must find nothing; and with it,
//! when it must. Bugs of kernels are planted in the model of KVM, all others where our own code would have them.

#![allow(clippy::unwrap_used)] // helpers of tests

mod bitmaps;
#[path = "../common/mod.rs"]
mod common;
mod exhibits;
mod kernels;
mod migrations;
mod rings;
mod slots;
#[path = "../../migrate/tests/common/mod.rs"]
mod toy;
mod world;
mod writers;

use std::time::{Duration, Instant};

use exhibits::{EXHIBITS, Exhibit, Plant};
use gleaner::Tracking;
use gleaner::model::Bug;
use gleaner_bitmap::mutant::{self, Mutant};

/// What a killer is run with.
#[derive(Clone, Copy)]
pub struct Case {
    /// How dirty pages are tracked.
    pub tracking: Tracking,
    /// The bug of the kernel.
    pub bug: Option<Bug>,
    /// How long a killer tries that depends on chance.
    pub patience: Duration,
}

/// Without a bug; and with one, which is found much sooner where two threads have a CPU each.
const PATIENCE: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(30)];

/// Runs an exhibit's killer in one mode, with the bug or without.
fn run(exhibit: &Exhibit, tracking: Tracking, planted: bool) -> world::Found {
    let (ours, bug): (Option<Mutant>, _) = match exhibit.plant {
        _ if !planted => (None, None),
        Plant::Here(mutant) => (Some(mutant), None),
        Plant::Kernel(bug) => (None, Some(bug)),
    };
    let _planted = mutant::plant(ours);
    (exhibit.killer)(Case {
        tracking,
        bug,
        patience: PATIENCE[usize::from(planted)],
    })
}

/// Shows an exhibit; whether its bug was killed in each mode, and by nothing but the bug.
fn show(exhibit: &Exhibit) -> bool {
    let start = Instant::now();
    let mut killed = true;
    let mut found = Vec::new();
    for &(mode, tracking) in exhibit.modes {
        if let Err(wrong) = run(exhibit, tracking, false) {
            killed = false;
            found.push(format!("{mode}: without the bug, {wrong}"));
        }
        match run(exhibit, tracking, true) {
            Ok(()) => {
                killed = false;
                found.push(format!("{mode}: LIVES"));
            }
            Err(wrong) => found.push(format!("{mode}: {wrong}")),
        }
    }
    println!(
        "{:>2}  {:<24} {}\n    planted: {:?}\n    killed by {} in {} ms ({})",
        exhibit.number,
        exhibit.place,
        exhibit.what,
        exhibit.plant,
        exhibit.name,
        start.elapsed().as_millis(),
        found.join("; "),
    );
    if let Some(rule) = exhibit.rule {
        println!("    ruled out by type: {rule}");
    }
    killed
}

#[test]
fn every_bug_of_the_museum_can_be_planted_and_is_killed() {
    let start = Instant::now();
    let _watchdog = common::Watchdog::new("an exhibit");
    let numbers: Vec<u32> = EXHIBITS.iter().map(|e| e.number).collect();
    assert_eq!(numbers, Vec::from_iter(1..=28));
    let alive: Vec<u32> = EXHIBITS
        .iter()
        .filter(|e| !show(e))
        .map(|e| e.number)
        .collect();
    println!(
        "{} of {} killed in {:.1} s",
        EXHIBITS.len() - alive.len(),
        EXHIBITS.len(),
        start.elapsed().as_secs_f64()
    );
    assert!(
        alive.is_empty(),
        "{alive:?} live, or their killers find what is not there"
    );
}
