//! On one host the destination goes on with the source's own memory: nothing of it is sent, and neither end touches what
//! is the other's.

#![allow(clippy::unwrap_used)] // helpers are not known to be tests

mod common;

use std::fs::File;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::thread;

use common::*;
use gleaner_bitmap::{BlockId, BlockInfo, Extent, Generation, PAGE_SIZE, PageRange};
use gleaner_migrate::wire::*;
use gleaner_migrate::*;
use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

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

/// A source that breaks the rules.
struct Raw {
    stream: UnixStream,
    sequence: u64,
}

impl Raw {
    fn say(&mut self, message: &Message, payload: &[u8], files: &[BorrowedFd<'_>]) {
        let metadata = message.encode().unwrap();
        let length = payload.len() as u64;
        let header = Header::encode(message.kind(), self.sequence, &metadata, length).unwrap();
        self.sequence += 1;
        let bytes = [&header[..], &metadata, payload].concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(files)));
        }
        // One that has refused may have hung up.
        let pieces = [IoSlice::new(&bytes)];
        let _ = sendmsg(&self.stream, &pieces, &mut control, SendFlags::NOSIGNAL);
    }
}

const PAGES: u64 = 10;
const BLOCK: BlockId = BlockId(3);

fn layout(generation: u64, names: &[&str]) -> Message {
    let blocks = (3..).zip(names).map(|(id, name)| BlockInfo {
        id: BlockId(id),
        name: (*name).into(),
        pages: PAGES,
    });
    Message::Layout(LayoutBody {
        generation: Generation(generation),
        blocks: blocks.collect(),
        slots: vec![],
    })
}

fn memory(generation: u64, block: u64, offset: u64) -> Message {
    Message::Memory(MemoryBody {
        generation: Generation(generation),
        block: BlockId(block),
        offset,
    })
}

fn state() -> Message {
    Message::State(StateBody {
        generation: Generation(1),
        crc: crc32fast::hash(b"state"),
    })
}

/// Speaks to a receiver, then ends the stream.
fn spoken(local: bool, channels: u16, speak: impl FnOnce(&mut Raw)) -> (Error, ToyDestination) {
    let (near, far) = UnixStream::pair().unwrap();
    let place = ToyDestination::default();
    let mut there = place.clone();
    let receiving =
        thread::spawn(move || Receiver::new(&mut there, receiver_options()).run(far.into()));
    let mut raw = Raw {
        stream: near,
        sequence: 0,
    };
    let hello = Hello {
        version: VERSION,
        id: MigrationId([7; 16]),
        name: "peer".into(),
        page_size: PAGE_SIZE,
        channels,
        local,
    };
    raw.say(&Message::Hello(hello), &[], &[]);
    speak(&mut raw);
    raw.stream.shutdown(std::net::Shutdown::Write).unwrap();
    let _ = raw.stream.read_to_end(&mut Vec::new());
    let received = receiving.join().unwrap();
    assert_eq!(received.status, Status::Failed);
    assert!(!place.place().running);
    (received.error.unwrap(), place)
}

/// What a receiver says to a block's memory.
fn handed(file: &File, offset: u64) -> String {
    let (error, place) = spoken(true, 1, |raw| {
        raw.say(&layout(1, &["ram"]), &[], &[]);
        raw.say(&memory(1, 3, offset), &[], &[file.as_fd()]);
    });
    assert_eq!(
        place.place().blocks.len(),
        usize::from(matches!(error, Error::Closed { .. }))
    );
    error.to_string()
}

#[test]
fn memory_that_could_kill_whoever_touches_it_is_not_taken_over() {
    let good = memfd(PAGES);
    assert!(handed(&good, 0).contains("the stream ended"));
    assert!(handed(&memfd(PAGES + 2), 2 * PAGE_SIZE).contains("the stream ended"));
    for offset in [PAGE_SIZE, u64::MAX - 4095, 1 << 60] {
        let said = handed(&good, offset);
        assert!(said.contains("are more than its"), "{offset}: {said}");
    }
    assert!(handed(&memfd(PAGES + 1), 1).contains("is not whole pages"));
    assert!(handed(&memfd(PAGES - 1), 0).contains("are more than its"));
    let unsealed = memfd_create("ram", MemfdFlags::ALLOW_SEALING).unwrap();
    let unsealed = File::from(unsealed);
    unsealed.set_len(PAGES * PAGE_SIZE).unwrap();
    let regular = tempfile::tempfile().unwrap();
    regular.set_len(PAGES * PAGE_SIZE).unwrap();
    for file in [unsealed, regular, File::open("/dev/zero").unwrap()] {
        let said = handed(&file, 0);
        assert!(said.contains("sealed against shrinking"), "{said}");
    }
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", good.as_raw_fd());
    let again = rustix::fs::open(path, OFlags::RDONLY, Mode::empty()).unwrap();
    assert!(handed(&again.into(), 0).contains("not for writing"));
    let (socket, _other) = UnixStream::pair().unwrap();
    let socket = File::from(std::os::fd::OwnedFd::from(socket));
    assert!(handed(&socket, 0).contains("sealed against shrinking"));
}

#[test]
fn frames_that_make_no_sense_where_memory_is_handed_over() {
    let file = memfd(PAGES);
    let fd = file.as_fd();
    let pages = Extents {
        generation: Generation(1),
        extents: vec![Extent::new(BLOCK, 0, 1)],
    };
    let said = |local, frames: &[(Message, &[u8], &[BorrowedFd<'_>])]| {
        let (error, _) = spoken(local, 1, |raw| {
            raw.say(&layout(1, &["ram", "dimm"]), &[], &[]);
            for (message, payload, files) in frames {
                raw.say(message, payload, files);
            }
        });
        error
    };
    // No pages; and no memory where pages come.
    for (message, payload) in [
        (Message::Pages(pages.clone()), &[1; 4096][..]),
        (Message::Zeros(pages.clone()), &[]),
        (Message::Digests(pages), &[1; 8]),
    ] {
        let error = said(true, &[(message, payload, &[])]);
        assert!(matches!(error, Error::OutOfState { .. }), "{error}");
    }
    let one = &[fd][..];
    let memory_of = |block| (memory(1, block, 0), &[][..], one);
    let error = said(false, &[memory_of(3)]);
    assert!(matches!(error, Error::OutOfState { kind: "Memory", .. }));
    // Blocks that there are, each once, and its descriptor with it.
    assert!(matches!(
        said(true, &[memory_of(9)]),
        Error::UnknownBlock { block: BlockId(9) }
    ));
    let stale = (memory(2, 3, 0), &[][..], &[fd][..]);
    assert!(matches!(said(true, &[stale]), Error::Stale { .. }));
    let twice = said(true, &[memory_of(3), memory_of(3)]);
    assert!(twice.to_string().contains("already"), "{twice}");
    let bare = (memory(1, 3, 0), &[][..], &[][..]);
    let early = (Message::Sync, &[][..], &[fd][..]);
    for frames in [vec![bare.clone()], vec![early, bare]] {
        let error = said(true, &frames);
        assert!(error.to_string().contains("no descriptor"), "{error}");
    }
    // Two descriptors where one is due: the first one counts.
    let two = (memory(1, 3, 0), &[][..], &[fd, fd][..]);
    assert!(matches!(said(true, &[two]), Error::Closed { .. }));
    // All of them before the state, and no other layout in between.
    let built = (state(), &b"state"[..], &[][..]);
    let error = said(true, &[memory_of(3), built.clone()]);
    assert!(error.to_string().contains("dimm"), "{error}");
    let error = said(true, &[memory_of(3), (layout(2, &["ram"]), &[], &[])]);
    assert!(matches!(error, Error::OutOfState { kind: "Layout", .. }));
    let error = said(true, &[memory_of(3), memory_of(4), built, memory_of(4)]);
    assert!(matches!(error, Error::OutOfState { kind: "Memory", .. }));
    let error = said(true, &[(layout(1, &["ram"]), &[], &[])]);
    assert!(matches!(error, Error::Stale { .. }));
    let (error, _) = spoken(true, 1, |raw| raw.say(&state(), b"state", &[]));
    assert!(matches!(error, Error::Stale { .. }));
    let (error, _) = spoken(true, 2, |_| ());
    assert!(matches!(error, Error::Channels { .. }));
}
