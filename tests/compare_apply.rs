//! Ways to apply changes of slots, compared on the model: what the table of `gleaner demo --compare-apply` must show.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used)] // a failed unwrap is a failed test

use std::process::Command;
use std::sync::{Arc, LazyLock};

use gleaner::compare::{Comparison, Row, Way, compare};
use gleaner::model::{ModelConfig, ModelKvm};
use gleaner::{Block, PAGE_SIZE, PageRange, Tracker, Tracking};
use vm_memory::GuestAddress;

static COMPARISON: LazyLock<Comparison> = LazyLock::new(|| compare().unwrap());

fn rows(way: Way) -> impl Iterator<Item = &'static Row> {
    COMPARISON.rows.iter().filter(move |row| row.way == way)
}

fn same_but_for(row: &Row, merged: bool, way: Way) -> &'static Row {
    let mut same = COMPARISON.rows.iter();
    same.find(|r| r.scenario == row.scenario && r.merged == merged && r.way == way)
        .unwrap()
}

#[test]
fn no_page_is_lost_and_no_access_misses_unless_calls_are_made_one_by_one_while_vcpus_run() {
    for row in &COMPARISON.rows {
        assert!(row.carried > 0, "{row:?}");
        if row.way == Way::Naive {
            assert!(row.lost > 0 && row.missed > 0, "{row:?}");
        } else {
            assert_eq!((row.lost, row.missed), (0, 0), "{row:?}");
        }
    }
}

#[test]
fn a_list_swaps_at_most_twice_a_transaction_however_many_changes_it_has() {
    for row in rows(Way::ListOneSwap) {
        assert_eq!(row.list_swaps, row.transactions, "{row:?}");
    }
    for row in rows(Way::List) {
        let (one, one_by_one) = (
            row.transactions,
            same_but_for(row, row.merged, Way::Stopped),
        );
        assert!(row.list_swaps > one && row.list_swaps <= 2 * one, "{row:?}");
        assert!(row.list_swaps < one_by_one.list_swaps, "{row:?}");
    }
}

#[test]
fn only_whoever_stops_vcpus_has_a_blackout_and_merged_changes_make_it_shorter() {
    for row in &COMPARISON.rows {
        assert_eq!(row.blackout_us > 0, row.way == Way::Stopped, "{row:?}");
        assert_eq!(row.wait_us > 0, row.way == Way::List, "{row:?}");
    }
    for heard in rows(Way::Stopped).filter(|row| !row.merged) {
        let merged = same_but_for(heard, true, Way::Stopped);
        assert!(merged.changes < heard.changes && merged.list_swaps < heard.list_swaps);
        assert!(merged.blackout_us < heard.blackout_us);
    }
}

#[test]
fn one_by_one_and_stopped_is_what_a_transaction_of_the_tracker_does() {
    const GIB: u64 = (1 << 30) / PAGE_SIZE;
    let kvm = ModelKvm::new(ModelConfig::default());
    let tracker = Tracker::on(Arc::new(kvm))
        .tracking(Tracking::Bitmap)
        .build()
        .unwrap();
    let ram = Block::memfd("ram", 16 * GIB * PAGE_SIZE).unwrap();
    let mut first = tracker.transaction();
    first
        .add_block(&ram)
        .create(0, GuestAddress(0), ram.extent(ram.info().all()));
    first.commit().unwrap();
    let mut punch = tracker.transaction();
    punch.punch(0, PageRange::new(GIB, GIB), 1);
    let report = punch.commit().unwrap();
    let row = rows(Way::Stopped).find(|row| row.merged && row.scenario.starts_with("1 GiB hole"));
    let row = row.unwrap();
    assert_eq!(row.changes, report.calls as u64);
    assert_eq!(row.list_swaps, u64::from(report.list_swaps));
}

#[test]
fn marks_on_their_way_need_the_invalid_step_and_rings_need_new_ids() {
    let mut lost = COMPARISON
        .trials
        .iter()
        .map(|trial| (trial.what, trial.lost > 0));
    for (what, loses) in [
        ("hole, one swap", false),
        ("hole, one swap, with PML", true),
        ("hole, invalid first, with PML", false),
        ("move, as a move, with PML", false),
        ("move, as delete and create, with PML", false),
        ("move, as a move, one swap, with PML", true),
        ("split, rings, id reused, read by the new slots", true),
        (
            "split, rings, id reused, read by the slots of their time",
            true,
        ),
        ("split, rings, new ids", false),
    ] {
        assert_eq!(lost.next(), Some((what, loses)));
    }
    assert_eq!(lost.next(), None);
}

#[test]
fn the_command_prints_one_object_that_is_the_same_each_time() {
    let output = Command::new(env!("CARGO_BIN_EXE_gleaner"))
        .args(["demo", "--compare-apply", "--json"])
        .output()
        .unwrap();
    assert!(output.status.success() && output.stderr.is_empty());
    let printed: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(printed, serde_json::to_value(&*COMPARISON).unwrap());
}
