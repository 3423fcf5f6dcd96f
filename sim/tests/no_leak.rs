//! A guest that has migrated away gives its memory back when its VMM drops the tracker.

#![allow(clippy::unwrap_used)] // a test that can't go on fails

use gleaner_sim::migration::migrate;

/// Mappings of this process.
fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps")
        .unwrap()
        .lines()
        .count()
}

#[test]
fn guests_that_have_migrated_away_leave_no_memory_behind() {
    migrate(1, 0).unwrap();
    let before = mappings();
    for index in 1..=300 {
        migrate(1, index).unwrap();
    }
    let left = mappings().saturating_sub(before);
    assert!(left < 100, "{left} mappings are left of 300 migrations");
}
