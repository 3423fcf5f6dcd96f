//! A migration that verifies does not run a guest whose memory differs.

#![allow(clippy::unwrap_used)] // helpers are not known to be tests

mod common;

use common::*;
use gleaner_bitmap::{BlockId, PageRange};
use gleaner_migrate::wire::Message;
use gleaner_migrate::*;

const PAGES: u64 = 20_000;
const RAM: BlockId = BlockId(0);

fn verified(channels: u16) -> SenderOptions {
    SenderOptions {
        channels,
        verify: true,
        ..options()
    }
}

fn unix(dir: &tempfile::TempDir) -> Address {
    Address::Unix(dir.path().join("s"))
}

fn flip(place: &ToyDestination, page: u64, at: usize) {
    let place = place.place();
    let page = place.blocks[&RAM].1.slice(PageRange::new(page, 1)).unwrap();
    let byte = page.subslice(at, 1).unwrap();
    let mut value = [0u8];
    byte.copy_to(&mut value);
    byte.copy_from(&[value[0] ^ 1]);
}

/// Behind the receiver's back, after all pages have been applied: a page with contents, one of zeros, the first, the last.
#[test]
fn one_flipped_bit_is_named_and_the_guest_runs_on_at_the_source() {
    for channels in [1, 4] {
        for (page, at) in [(17, 4095), (18, 0), (0, 1), (PAGES - 1, 4000)] {
            for place in [ToyDestination::default(), ToyDestination::used(0xee)] {
                let dir = tempfile::tempdir().unwrap();
                let source = ToySource::new(PAGES);
                let there = place.clone();
                source.guest().shown = Some(Box::new(move || flip(&there, page, at)));
                let (report, received) =
                    migrate_to(&unix(&dir), &source, &place, verified(channels));
                let reason = report.reason.unwrap();
                let named = format!("page {page} of block ram (#0) differs");
                assert!(reason.contains(&named), "{channels}: {reason}");
                assert_eq!(report.status, Status::Failed);
                assert!(report.verified_pages < PAGES);
                assert_eq!(received.status, Status::Failed);
                assert!(place.place().aborted && place.place().state.is_empty());
                let mut guest = source.guest();
                assert!(guest.running && guest.no_leases());
                assert!(!guest.calls.contains(&"relinquish"));
                guest.shown = None;
                guest.touch();
                drop(guest);
                let again = ToyDestination::default();
                let (report, _) = migrate_to(&unix(&dir), &source, &again, verified(channels));
                assert_eq!(report.status, Status::Completed, "{:?}", report.reason);
                assert_same(&source, &again);
            }
        }
    }
}

/// Pages become zero, blocks come and go.
fn busy(guest: &mut Guest, harvest: u32) {
    for page in (0..PAGES).step_by(11) {
        match page % 2 {
            0 => guest.zero(RAM, page),
            _ => guest.write(RAM, page, u8::try_from(harvest).unwrap()),
        }
    }
    match harvest {
        2 => drop(guest.add_block("more", 3001)),
        3 => {
            let more = guest.id("more");
            guest.write(more, 3000, 7);
        }
        _ => {}
    }
}

#[test]
fn what_is_the_same_passes_and_every_page_is_counted() {
    for channels in [1, 4] {
        for place in [ToyDestination::default(), ToyDestination::used(0xee)] {
            let dir = tempfile::tempdir().unwrap();
            let source = ToySource::scripted(PAGES, busy);
            let guest = source.clone();
            let mut options = verified(channels);
            options.hold = Some(Box::new(move || guest.guest().harvests > 3));
            let (report, _) = migrate_to(&unix(&dir), &source, &place, options);
            assert_eq!(report.status, Status::Completed, "{:?}", report.reason);
            assert_same(&source, &place);
            assert_eq!(report.verified_pages, PAGES + 3001);
            assert!(report.verify_ms > 0.0 && report.verify_ms < report.downtime_ms);
        }
    }
}

#[test]
fn without_being_asked_nothing_is_compared() {
    let dir = tempfile::tempdir().unwrap();
    let (source, place) = (ToySource::new(100), ToyDestination::default());
    let there = place.clone();
    source.guest().shown = Some(Box::new(move || flip(&there, 1, 1)));
    let (report, _) = migrate_to(&unix(&dir), &source, &place, options());
    assert_eq!(report.status, Status::Completed);
    assert_eq!((report.verified_pages, report.verify_ms), (0, 0.0));
    assert_same(&source, &place);
}

#[test]
fn a_file_is_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest");
    let address = Address::File(path.clone());
    let source = ToySource::new(10);
    let report =
        Sender::new(&mut source.clone(), verified(1)).run_to(&Connector::new(address.clone()));
    assert!(matches!(report.error, Some(Error::Unverifiable)));
    assert!(source.guest().running && !path.exists());
    let report = Sender::new(&mut source.clone(), verified(1)).run(connect(&address).unwrap());
    assert!(matches!(report.error, Some(Error::Unverifiable)));
    assert_eq!(path.metadata().unwrap().len(), 0);
}

#[test]
fn a_source_that_cannot_show_its_memory_keeps_its_guest() {
    let dir = tempfile::tempdir().unwrap();
    let (source, place) = (ToySource::new(10), ToyDestination::default());
    source.guest().failing = Some("memory");
    let (report, _) = migrate_to(&unix(&dir), &source, &place, verified(2));
    assert_eq!(report.status, Status::Failed);
    assert!(report.reason.unwrap().contains("memory does not work"));
    assert!(source.guest().running && place.place().aborted);
}

/// A verified migration whose line breaks in the middle of a frame; and which frames had digests.
fn over_a_wire(source: &ToySource, breaks: Option<u64>) -> (Report, bool, Vec<u64>) {
    let mut place = ToyDestination::default();
    let there = place.clone();
    let (mut number, mut digests) = (0, Vec::new());
    let mut wire = MemoryWire::new(&mut place, receiver_options()).watch(|way, message| {
        if way == Way::Forth {
            if matches!(message, Message::Digests(_)) {
                digests.push(number);
            }
            number += 1;
        }
    });
    if let Some(frame) = breaks {
        wire = wire.break_at(Break {
            way: Way::Forth,
            frame,
            cut: Cut::Half,
            silent: false,
        });
    }
    source.guest().touch();
    let report = Sender::new(&mut source.clone(), verified(1)).run_over(&mut wire);
    drop(wire.end());
    let runs = there.place().running;
    (report, runs, digests)
}

#[test]
fn a_line_that_breaks_meanwhile_leaves_the_guest_at_the_source() {
    let (_, runs, digests) = over_a_wire(&ToySource::new(5000), None);
    assert!(runs && digests.len() == 5, "{digests:?}");
    let source = ToySource::new(5000);
    for frame in digests[0]..=digests[4] {
        let (report, runs, _) = over_a_wire(&source, Some(frame));
        assert!(
            matches!(report.error, Some(Error::Closed { .. })),
            "{frame}"
        );
        assert!(!runs && source.guest().running, "{frame}");
    }
    let (report, runs, _) = over_a_wire(&source, None);
    assert!(runs && report.status == Status::Completed);
}
