//! On one host the destination goes on with the source's own memory: nothing of it is sent, and neither end touches what
//! is the other's.

#![allow(clippy::unwrap_used)] // helpers are not known to be tests

mod common;

use common::*;
use gleaner_bitmap::{BlockId, PageRange};
use gleaner_migrate::*;

const RAM: BlockId = BlockId(0);

fn local() -> SenderOptions {
    SenderOptions {
        local: true,
        ..options()
    }
}

fn page(memory: &MappedMemory, page: u64) -> [u8; 4096] {
    let mut copy = [0; 4096];
    let from = memory.slice(PageRange::new(page, 1)).unwrap();
    from.copy_to(&mut copy);
    copy
}

/// What the destination writes is in the source's memory.
fn assert_shared(source: &ToySource, place: &ToyDestination) {
    let (guest, place) = (source.guest(), place.place());
    for (id, (info, here)) in &guest.blocks {
        let there = &place.blocks[id].1;
        let last = PageRange::new(info.pages - 1, 1);
        there.slice(last).unwrap().copy_from(&[0x5a_u8; 4096]);
        assert_eq!(page(here, info.pages - 1), [0x5a; 4096]);
    }
}

#[test]
fn the_destination_goes_on_with_the_very_memory_and_none_of_it_is_sent() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = Vec::new();
    for pages in [64, 70_000] {
        let (source, place) = (ToySource::new(pages), ToyDestination::default());
        let address = Address::Unix(dir.path().join("s"));
        let (report, received) = migrate_to(&address, &source, &place, local());
        assert_eq!(report.status, Status::Completed, "{:?}", report.reason);
        assert_eq!(received.status, Status::Completed);
        assert_eq!((report.pages_sent, report.zero_pages), (0, 0));
        assert_eq!((received.pages, received.blocks), (0, 1));
        assert!(!received.may_be_asked);
        assert_same(&source, &place);
        assert_shared(&source, &place);
        assert_eq!(place.place().state, b"state of the guest");
        assert!(place.place().running && !source.guest().running);
        // Nobody needs to know what is dirty.
        let harvested = |call: &&str| ["harvest", "lease", "ack", "release"].contains(call);
        assert!(!source.guest().calls.iter().any(harvested));
        bytes.push(report.bytes_on_wire);
    }
    // A number of pages is a little longer when it is greater.
    assert!(bytes[0] < 1000 && bytes[1] - bytes[0] < 20, "{bytes:?}");
}

#[test]
fn blocks_that_come_and_go_before_it_is_stopped_are_handed_over_as_they_are_then() {
    let (source, place) = (ToySource::new(100), ToyDestination::default());
    let mut options = local();
    let guest = source.clone();
    let mut asked = 0;
    options.hold = Some(Box::new(move || {
        asked += 1;
        let mut guest = guest.guest();
        match asked {
            1 => drop(guest.add_block("dimm", 7)),
            2 => guest.remove_block("dimm"),
            3 => drop(guest.add_block("dimm", 9)),
            _ => {}
        }
        asked >= 3
    }));
    let (near, far) = pair();
    let (report, received) = migrate(&source, &place, options, receiver_options(), near, far);
    assert_eq!(report.status, Status::Completed, "{:?}", report.reason);
    assert_eq!((received.blocks, received.layouts), (2, 4));
    assert_same(&source, &place);
    assert_shared(&source, &place);
}

/// Over a wire that breaks in the middle of a frame; whether the guest runs at the destination, and frames each way.
fn over_a_wire(source: &ToySource, breaks: Option<Break>) -> (Report, bool, [u64; 2]) {
    let mut place = ToyDestination::default();
    let there = place.clone();
    let mut wire = MemoryWire::new(&mut place, receiver_options());
    if let Some(breaks) = breaks {
        wire = wire.break_at(breaks);
    }
    let report = Sender::new(&mut source.clone(), local()).run_over(&mut wire);
    let frames = [Way::Forth, Way::Back].map(|way| wire.frames(way));
    drop(wire.end());
    let runs = there.place().running;
    (report, runs, frames)
}

#[test]
fn wherever_the_line_breaks_there_is_one_guest_and_its_memory_is_whole() {
    let (report, runs, frames) = over_a_wire(&ToySource::new(50), None);
    assert!(runs && report.status == Status::Completed);
    for (way, frames) in [Way::Forth, Way::Back].into_iter().zip(frames) {
        for frame in 0..frames {
            for cut in [Cut::Before, Cut::Half, Cut::After] {
                let source = ToySource::new(50);
                let before: Vec<_> = (2..50)
                    .map(|n| page(&source.guest().blocks[&RAM].1, n))
                    .collect();
                let silent = false;
                let breaks = Break {
                    way,
                    frame,
                    cut,
                    silent,
                };
                let (report, runs, _) = over_a_wire(&source, Some(breaks));
                let case = format!("{way:?} {frame} {cut:?}: {:?}", report.reason);
                let here = source.guest().running;
                assert!(!(here && runs), "{case}");
                assert_eq!(here, report.status == Status::Failed, "{case}");
                assert!(here || runs || report.status == Status::InDoubt, "{case}");
                for (n, before) in (2..).zip(before) {
                    assert_eq!(page(&source.guest().blocks[&RAM].1, n), before, "{case}");
                }
            }
        }
    }
}

#[test]
fn a_destination_that_takes_no_memory_over_says_so_before_the_guest_is_stopped() {
    let (source, place) = (ToySource::new(10), ToyDestination::failing("begin_local"));
    let (near, far) = pair();
    let (report, _) = migrate(&source, &place, local(), receiver_options(), near, far);
    assert_eq!(report.status, Status::Failed);
    assert!(report.reason.unwrap().contains("no begin_local"));
    let guest = source.guest();
    assert!(guest.running && !guest.calls.contains(&"stop"));
}

#[test]
fn either_end_that_fails_leaves_the_guest_at_the_source() {
    for (here, there) in [
        (Some("hand_over"), None),
        (Some("stop"), None),
        (Some("state"), None),
        (Some("relinquish"), None),
        (None, Some("adopt_block")),
        (None, Some("ready")),
        (None, Some("run")),
    ] {
        let (source, place) = (ToySource::new(10), ToyDestination::default());
        source.guest().failing = here;
        place.place().failing = there;
        let (near, far) = pair();
        let (report, received) = migrate(&source, &place, local(), receiver_options(), near, far);
        assert_eq!(report.status, Status::Failed, "{here:?} {there:?}");
        assert_ne!(received.status, Status::Completed, "{here:?} {there:?}");
        assert!(source.guest().running && place.place().aborted);
    }
}

#[test]
fn what_can_not_be_local_is_refused_before_anything_is_sent() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("guest");
    let file = format!("file:{}", path.display());
    type Change = fn(&mut SenderOptions);
    let cases: [(&str, Change, &str); 5] = [
        ("tcp:127.0.0.1:9", |_| (), "Unix socket"),
        (&file, |_| (), "Unix socket"),
        ("unix:/nowhere", |o| o.channels = 2, "one connection"),
        ("unix:/nowhere", |o| o.verify = true, "verify"),
        ("unix:/nowhere", |o| o.compress = Compress::Lz4, "compress"),
    ];
    for (address, change, why) in cases {
        let source = ToySource::new(10);
        let mut options = local();
        change(&mut options);
        let report = Sender::new(&mut source.clone(), options)
            .run_to(&Connector::new(address.parse().unwrap()));
        assert!(
            matches!(report.error, Some(Error::NotLocal { .. })),
            "{address}: {:?}",
            report.reason
        );
        assert!(report.reason.unwrap().contains(why), "{address}");
        assert!(source.guest().running && !path.exists());
    }
    let (near, _far, _) = tcp_line([Fault::default(); 2]);
    let report = Sender::new(&mut ToySource::new(10), local()).run(near);
    assert!(matches!(report.error, Some(Error::NotLocal { .. })));
}
