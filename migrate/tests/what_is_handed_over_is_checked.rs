//! A destination takes over no memory that could harm it, and keeps no descriptor that it has no use for.

#![allow(clippy::unwrap_used)] // helpers are not known to be tests

mod common;

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;

use common::*;
use gleaner_bitmap::{BlockId, BlockInfo, Extent, Generation, PAGE_SIZE};
use gleaner_migrate::wire::*;
use gleaner_migrate::*;
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// Most descriptors that go along with a frame here.
const MANY: usize = 200;

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
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MANY))];
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

fn hello(local: bool, channels: u16) -> Message {
    Message::Hello(Hello {
        version: VERSION,
        id: MigrationId([7; 16]),
        name: "peer".into(),
        page_size: PAGE_SIZE,
        channels,
        local,
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
    raw.say(&hello(local, channels), &[], &[]);
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
    let said = handed(&unsealed, 0);
    assert!(said.contains("sealed against shrinking"), "{said}");
    let regular = tempfile::tempfile().unwrap();
    regular.set_len(PAGES * PAGE_SIZE).unwrap();
    let (socket, _other) = UnixStream::pair().unwrap();
    let socket = File::from(OwnedFd::from(socket));
    for file in [regular, File::open("/dev/zero").unwrap(), socket] {
        let said = handed(&file, 0);
        assert!(said.contains("it is no memfd"), "{said}");
    }
    let path = format!("/proc/self/fd/{}", good.as_raw_fd());
    let again = rustix::fs::open(path, OFlags::RDONLY, Mode::empty()).unwrap();
    assert!(handed(&again.into(), 0).contains("not for writing"));
}

/// Pages of 2 MiB need room of their own, and come and go as a whole.
#[test]
fn huge_pages_are_not_taken_over() {
    let flags = MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB;
    let Ok(huge) = memfd_create("ram", flags).map(File::from) else {
        eprintln!("skipped: this kernel has no huge pages");
        return;
    };
    huge.set_len(2 << 20).unwrap();
    fcntl_add_seals(&huge, SealFlags::SHRINK).unwrap();
    let said = handed(&huge, 0);
    assert!(said.contains("it is no memfd"), "{said}");
}

#[test]
fn where_no_descriptor_goes_along_nothing_is_begun() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (far, _) = listener.accept().unwrap();
    let message = hello(true, 1);
    let metadata = message.encode().unwrap();
    let header = Header::encode(message.kind(), 0, &metadata, 0).unwrap();
    near.write_all(&[&header[..], &metadata].concat()).unwrap();
    near.shutdown(std::net::Shutdown::Write).unwrap();
    let mut place = ToyDestination::failing("begin_local");
    let received = Receiver::new(&mut place, receiver_options()).run(far.into());
    let error = received.error.unwrap();
    assert!(matches!(error, Error::NotLocal { .. }), "{error}");
}

/// Descriptors of this process that are of the memfd of that name.
fn open_of(name: &str) -> usize {
    let open = std::fs::read_dir("/proc/self/fd").unwrap();
    let named = |entry: std::io::Result<std::fs::DirEntry>| {
        let to = std::fs::read_link(entry.unwrap().path());
        to.is_ok_and(|to| to.to_string_lossy().starts_with(&format!("/memfd:{name} ")))
    };
    open.filter_map(|entry| named(entry).then_some(())).count()
}

#[test]
fn descriptors_that_nobody_needs_are_closed() {
    const NAME: &str = "counted";
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create(NAME, flags).unwrap());
    file.set_len(PAGES * PAGE_SIZE).unwrap();
    let short = |raw: &mut Raw, count| {
        raw.say(&layout(1, &["ram"]), &[], &[]);
        raw.say(&memory(1, 3, 0), &[], &vec![file.as_fd(); count]);
    };
    // Not sealed yet: refused.
    drop(spoken(true, 1, |raw| short(raw, 1)));
    assert_eq!(open_of(NAME), 1);
    fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
    for count in [1, 2, 3, MANY] {
        // Taken over, until the source was gone.
        let (error, place) = spoken(true, 1, |raw| short(raw, count));
        assert!(matches!(error, Error::Closed { .. }), "{count}: {error}");
        // The toy keeps what it was given; the block has one.
        assert_eq!(open_of(NAME), 2, "{count}");
        drop(place);
        assert_eq!(open_of(NAME), 1, "{count}");
    }
    // With frames that none belongs to.
    let (error, _) = spoken(true, 1, |raw| {
        raw.say(&layout(1, &["ram"]), &[], &[file.as_fd(), file.as_fd()]);
        raw.say(&Message::Sync, &[], &[file.as_fd()]);
    });
    assert!(matches!(error, Error::Closed { .. }), "{error}");
    assert_eq!(open_of(NAME), 1);
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
