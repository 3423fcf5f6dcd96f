//! What a page held when its turn came was sent: a write before that is not sent again.

#![allow(clippy::unwrap_used)] // helpers are not known to be tests

mod common;

use std::time::Duration;

use common::*;
use gleaner_migrate::*;

/// Pages of a lease.
const LEASE: u64 = 4096;
const PAGES: u64 = 3 * LEASE;
/// It goes with the first lease, and is written after that.
const GONE: u64 = 6;
/// It goes with the last one, and is written before that.
const WAITING: u64 = PAGES - 3;

/// The second harvest is the one after the first lease, where a round is harvested on its way, and else the one at its end.
fn write_both(guest: &mut Guest, harvest: u32) {
    if harvest == 2 {
        let ram = guest.id("ram");
        guest.write(ram, GONE, 0x21);
        guest.write(ram, WAITING, 0x22);
    }
}

fn fail_early(guest: &mut Guest, harvest: u32) {
    guest.failing = Some("harvest early");
    write_both(guest, harvest);
}

fn plug(guest: &mut Guest, harvest: u32) {
    if harvest == 2 {
        guest.add_block("dimm", 20);
    }
}

struct Migrated {
    source: ToySource,
    place: ToyDestination,
    report: Report,
}

fn migrate(script: Script, recorded: bool) -> Migrated {
    let mut source = ToySource::scripted(PAGES, script);
    let mut place = ToyDestination::default();
    let mut options = SenderOptions::new(MigrationId([7; 16]));
    let mut receiver = receiver_options();
    options.clock = Clock::stopped();
    receiver.clock = options.clock.clone();
    let clock = options.clock.clone();
    let guest = source.clone();
    let mut wire = MemoryWire::new(&mut place, receiver)
        .latency(Duration::from_millis(1))
        .bandwidth(100 << 20);
    let report = if recorded {
        let mut recorder = Recorder::new(&mut source, Vec::new(), clock);
        Sender::new(&mut recorder, options).run_over(&mut wire)
    } else {
        Sender::new(&mut source, options).run_over(&mut wire)
    };
    drop(wire);
    assert_eq!(report.status, Status::Completed, "{report:?}");
    Migrated {
        source: guest,
        place,
        report,
    }
}

/// Pages that went beside all of them once and what saving the state dirties.
fn again(report: &Report) -> u64 {
    report.pages_sent + report.zero_pages - PAGES - 1
}

#[test]
fn a_page_that_is_written_before_its_turn_goes_once() {
    let migrated = migrate(write_both, false);
    assert_eq!(again(&migrated.report), 1);
    assert_same(&migrated.source, &migrated.place);
}

#[test]
fn a_round_that_cannot_be_harvested_on_its_way_goes_on() {
    let migrated = migrate(fail_early, false);
    // Both writes are found at the end of the round.
    assert_eq!(again(&migrated.report), 2);
    assert_same(&migrated.source, &migrated.place);
}

#[test]
fn a_migration_that_is_recorded_is_harvested_between_rounds_alone() {
    let migrated = migrate(write_both, true);
    assert_eq!(again(&migrated.report), 2);
    assert_same(&migrated.source, &migrated.place);
}

#[test]
fn a_block_that_is_plugged_on_the_way_is_sent() {
    let migrated = migrate(plug, false);
    assert_eq!(again(&migrated.report), 20);
    assert_same(&migrated.source, &migrated.place);
}
