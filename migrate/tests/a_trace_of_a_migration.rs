//! What a guest dirties while it is migrated is in the trace, by when, and the migration does not depend on it.

#![allow(clippy::unwrap_used)] // helpers are not known to be tests

mod common;

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::ops::Range;
use std::time::Duration;

use common::*;
use gleaner_migrate::*;

const PAGES: u64 = 300;
/// Harvests before the switchover is let go.
const HARVESTS: u32 = 5;

/// Other pages in each round, and in the third one a new block, which is dirty as a whole.
fn script(guest: &mut Guest, harvest: u32) {
    let ram = guest.id("ram");
    for page in pages_of(harvest) {
        guest.write(ram, page, 0x20);
    }
    if harvest == 3 {
        guest.add_block("dimm", 20);
    }
}

/// Which the harvest of this number finds. The first one finds all.
fn pages_of(harvest: u32) -> Range<u64> {
    let first = u64::from(harvest) * 20;
    first..first + 7
}

/// A migration that is recorded.
fn migrate(out: impl Write + Send) -> (Report, Option<String>) {
    let mut source = ToySource::scripted(PAGES, script);
    let mut place = ToyDestination::default();
    let mut options = SenderOptions::new(MigrationId([7; 16]));
    let mut receiver = receiver_options();
    options.clock = Clock::stopped();
    receiver.clock = options.clock.clone();
    let clock = options.clock.clone();
    let guest = source.clone();
    options.hold = Some(Box::new(move || guest.guest().harvests >= HARVESTS));
    let mut wire = MemoryWire::new(&mut place, receiver)
        .latency(Duration::from_millis(1))
        .bandwidth(100 << 20);
    let mut recorder = Recorder::new(&mut source, out, clock);
    let report = Sender::new(&mut recorder, options).run_over(&mut wire);
    recorder.end();
    let failure = recorder.failure().map(str::to_owned);
    (report, failure)
}

#[test]
fn what_each_harvest_found_is_in_the_record_that_ends_with_it() {
    let mut file = Vec::new();
    let (report, failure) = migrate(&mut file);
    assert_eq!((report.status, failure), (Status::Completed, None));
    let trace = Trace::read(&file[..]).unwrap();
    let names: Vec<_> = trace
        .blocks()
        .iter()
        .map(|b| (b.name.as_str(), b.pages))
        .collect();
    assert_eq!(names, [("ram", PAGES), ("dimm", 20)]);
    let found: Vec<BTreeSet<u64>> = trace
        .records()
        .iter()
        .map(|record| {
            trace
                .runs(record)
                .flat_map(|run| run.first..run.end())
                .collect()
        })
        .collect();
    // What the last round leaves is leased with what saving the state dirtied, when the guest stands still.
    let last = pages_of(HARVESTS).chain([1]).collect();
    let wanted: Vec<BTreeSet<u64>> = (2..HARVESTS)
        .map(|harvest| {
            let new = if harvest == 3 {
                PAGES..PAGES + 20
            } else {
                0..0
            };
            pages_of(harvest).chain(new).collect()
        })
        .chain([last])
        .collect();
    assert_eq!(found, wanted);
    // The rounds of the report say how long each interval was; they count from before the
    // greeting, and until the destination has a new layout: a round trip of 2 ms more.
    let ends: Vec<f64> = trace
        .records()
        .iter()
        .map(|record| record.until as f64)
        .collect();
    for ((from, to), round) in ends
        .iter()
        .zip(&ends[1..ends.len() - 1])
        .zip(&report.progress[1..])
    {
        let off = round.dirty_ms * 1e3 - (to - from);
        assert!((-2.0..2002.0).contains(&off), "{round:?} {ends:?}");
    }
}

/// A disk with room for so many bytes.
struct Full(usize);

impl Write for Full {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.checked_sub(bytes.len()) {
            Some(left) => self.0 = left,
            None => return Err(io::Error::other("the disk is full")),
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_migration_goes_on_when_its_trace_cannot_be_written() {
    for room in [0, 20, 60] {
        let (report, failure) = migrate(Full(room));
        assert_eq!(report.status, Status::Completed);
        assert_eq!(failure.unwrap(), "can't write the trace: the disk is full");
    }
}
