//! What a stock QEMU sends is kept whole, or it is an error. Streams are written down by hand from the format.

#![allow(clippy::unwrap_used)] // a test that can't go on fails

use std::collections::BTreeMap;
use std::io::{Read, Seek, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use gleaner_bitmap::PageRange;
use gleaner_migrate::{
    Address, CancelToken, Error, Images, Listener, MappedMemory, NewMemory, PageMemory,
    QemuReceived, QemuReceiver, Result, Status, Stream,
};

/// Memory that was used before.
const POISON: u8 = 0xee;

/// Bytes 300 and 301 of page 2 are new.
const DELTA: &[u8] = b"\0\0\0\0\0\0\x20\x40\x03a/b\x01\0\x05\xac\x02\x02\x09\x08";

/// What is kept, in memory.
#[derive(Default)]
struct Kept {
    blocks: BTreeMap<String, Arc<MappedMemory>>,
    device_state: Option<Vec<u8>>,
    /// Memory is new, and zero.
    fresh: bool,
}

impl Images for Kept {
    fn add_block(&mut self, name: &str, pages: u64) -> Result<NewMemory> {
        // The lengths of streams that were damaged are not to be had.
        if pages > 64 {
            return Err(Error::destination("no room"));
        }
        let memory = Arc::new(MappedMemory::anonymous(pages)?);
        self.blocks.insert(name.into(), Arc::clone(&memory));
        if self.fresh {
            return Ok(NewMemory::zero(memory));
        }
        for page in 0..pages {
            memory
                .slice(PageRange::new(page, 1))?
                .copy_from(&[POISON; 4096]);
        }
        Ok(NewMemory::used(memory))
    }

    fn complete(&mut self, device_state: &[u8]) -> Result<()> {
        self.device_state = Some(device_state.to_vec());
        Ok(())
    }
}

impl Kept {
    fn page(&self, block: &str, page: u64) -> [u8; 4096] {
        let mut bytes = [0; 4096];
        let memory = &self.blocks[block];
        memory
            .slice(PageRange::new(page, 1))
            .unwrap()
            .copy_to(&mut bytes);
        bytes
    }

    fn pages(&self) -> Vec<(String, u64, [u8; 4096])> {
        let all = self.blocks.iter();
        all.flat_map(|(name, memory)| {
            (0..memory.pages()).map(|page| (name.clone(), page, self.page(name, page)))
        })
        .collect()
    }
}

/// A stream, and which of its bytes are contents of pages.
#[derive(Default)]
struct Written {
    bytes: Vec<u8>,
    contents: Vec<Range<usize>>,
}

impl Written {
    fn put(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    fn contents(mut self, bytes: &[u8]) -> Self {
        let begin = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        self.contents.push(begin..self.bytes.len());
        self
    }

    /// Header, configuration, return path, a question, and the section that names 3 pages of `a/b` and one of `rom`.
    fn begun() -> Self {
        Self::default()
            .put(b"QEVM\0\0\0\x03\x07\0\0\0\x04none")
            .put(b"\x08\0\x01\0\0\x08\0\x02\0\x04abcd")
            .put(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\x40\x04")
            .put(b"\x03a/b\0\0\0\0\0\0\x30\0\x03rom\0\0\0\0\0\0\x10\0")
    }

    fn mark(self) -> Self {
        self.put(b"\0\0\0\0\0\0\x02\0")
    }

    fn end_of_section(self) -> Self {
        self.put(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02")
    }

    fn part(self) -> Self {
        self.put(b"\x02\0\0\0\x02")
    }

    fn last(self) -> Self {
        self.put(b"\x03\0\0\0\x02")
    }

    /// Devices, and the end.
    fn devices(self) -> Self {
        let text =
            br#"{"page_size":4096,"devices":[{"name":"timer","instance_id":0,"fields":[]}]}"#;
        let length = u32::try_from(text.len()).unwrap().to_be_bytes();
        self.put(b"\x04\0\0\0\x01\x05timer\0\0\0\0\0\0\0\x02some ticks\x7e\0\0\0\x01")
            .put(b"\0\x06")
            .put(&length)
            .put(text)
    }

    /// The last section, with a page of zeros for `rom`.
    fn zero_rom() -> Self {
        Self::default().last().put(b"\0\0\0\0\0\0\0\x02\x03rom\0")
    }

    /// A migration of one connection: whole pages, zeros, what has changed, in two rounds.
    fn whole() -> Self {
        Self::begun()
            .end_of_section()
            .part()
            .put(b"\0\0\0\0\0\0\0\x08\x03a/b")
            .contents(&[1; 4096])
            .put(b"\0\0\0\0\0\0\x10\x22\0")
            .put(b"\0\0\0\0\0\0\x20\x28")
            .contents(&[2; 4096])
            .put(b"\0\0\0\0\0\0\0\x08\x03rom")
            .contents(&[3; 4096])
            .end_of_section()
            .last()
            .put(DELTA)
            .end_of_section()
            .devices()
    }
}

/// What [`Written::whole`] makes.
fn expected() -> Vec<(String, u64, [u8; 4096])> {
    let mut changed = [2; 4096];
    changed[300..302].copy_from_slice(&[9, 8]);
    vec![
        ("a/b".into(), 0, [1; 4096]),
        ("a/b".into(), 1, [0; 4096]),
        ("a/b".into(), 2, changed),
        ("rom".into(), 0, [3; 4096]),
    ]
}

fn from_file(bytes: &[u8], kept: &mut Kept) -> QemuReceived {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    QemuReceiver::new(kept, CancelToken::new()).run(Stream::File(file))
}

#[test]
fn all_that_a_qemu_sends_is_kept() {
    for fresh in [false, true] {
        let mut kept = Kept {
            fresh,
            ..Kept::default()
        };
        let received = from_file(&Written::whole().bytes, &mut kept);
        assert_eq!(received.status, Status::Completed, "{:?}", received.reason);
        assert!(kept.pages() == expected());
        let state = Written::default().devices().bytes;
        assert_eq!(kept.device_state.as_deref(), Some(&state[..]));
        assert_eq!(received.machine, "none");
        let counts = [
            received.blocks,
            received.pages,
            received.zero_pages,
            received.delta_pages,
        ];
        assert_eq!(counts, [2, 3, 1, 1]);
        assert_eq!((received.sections, received.channels), (3, 0));
    }
}

#[test]
fn a_stream_cut_anywhere_is_an_error() {
    let whole = Written::whole();
    for length in 0..whole.bytes.len() {
        // Contents of pages are all alike.
        if whole
            .contents
            .iter()
            .any(|c| (c.start + 9..c.end - 9).contains(&length))
        {
            continue;
        }
        let mut kept = Kept::default();
        let received = from_file(&whole.bytes[..length], &mut kept);
        assert_eq!(received.status, Status::Failed, "{length}");
        assert_eq!(kept.device_state, None, "{length}");
    }
}

/// Nothing covers what comes again: there the format itself takes one page for another.
#[test]
fn a_bit_flipped_in_what_comes_once_never_makes_another_memory() {
    let whole = Written::whole();
    let again = whole.bytes.windows(DELTA.len()).position(|w| w == DELTA);
    let again = again.unwrap()..again.unwrap() + DELTA.len();
    let pages = |all: Vec<(String, u64, [u8; 4096])>| -> Vec<_> {
        // A block is as good by another name.
        all.into_iter()
            .map(|(_, page, bytes)| (page, bytes))
            .collect()
    };
    let mut taken = 0;
    for at in 0..whole.bytes.len() {
        let covered = whole.contents.iter().chain([&again]);
        if covered.into_iter().any(|range| range.contains(&at)) {
            continue;
        }
        for bit in 0..8 {
            let mut bytes = whole.bytes.clone();
            bytes[at] ^= 1 << bit;
            let mut kept = Kept::default();
            let received = from_file(&bytes, &mut kept);
            if received.status == Status::Completed {
                taken += 1;
                assert!(
                    pages(kept.pages()) == pages(expected()),
                    "byte {at} bit {bit}"
                );
            } else {
                assert_eq!(kept.device_state, None, "byte {at} bit {bit}");
                assert!(received.reason.is_some());
            }
        }
    }
    // The machine may have any name, to begin with.
    assert!(taken > 0);
}

#[test]
fn a_page_that_never_comes_is_missed() {
    let stream = Written::begun()
        .end_of_section()
        .last()
        .put(b"\0\0\0\0\0\0\0\x08\x03a/b")
        .contents(&[1; 4096])
        .put(b"\0\0\0\0\0\0\x20\x22\0")
        .put(b"\0\0\0\0\0\0\0\x02\x03rom\0")
        .end_of_section()
        .devices();
    let mut kept = Kept::default();
    let received = from_file(&stream.bytes, &mut kept);
    assert!(
        matches!(&received.error, Some(Error::NeverCame { block, page: 1 }) if block == "a/b"),
        "{received:?}"
    );
    assert_eq!(kept.device_state, None);
}

#[test]
fn what_is_no_stream_of_a_qemu_is_refused_in_words() {
    let page = |record: &[u8]| Written::begun().end_of_section().part().put(record).bytes;
    let begun = |bytes: &[u8]| Written::default().put(bytes).bytes;
    for (bytes, reason) in [
        (begun(b"GLNR\0\0\0\x01"), "not QEMU's stream"),
        (begun(b"QEVM\0\0\0\x02"), "version is 2"),
        (begun(b"QEVM\0\0\0\x03\x07\xff\0\0\0"), "machine's name"),
        (
            begun(b"QEVM\0\0\0\x03\x07\0\0\0\x01n\x08\0\x04\0\0"),
            "postcopy",
        ),
        (
            begun(b"QEVM\0\0\0\x03\x07\0\0\0\x01n\x05\x03cap\0\0\0\x01"),
            "mapped-ram",
        ),
        (page(b"\0\0\0\0\0\0\x30\x08\x03a/b"), "which has 0x3000"),
        (page(b"\0\0\0\0\0\0\0\x08\x04none"), "which there is not"),
        (page(b"\0\0\0\0\0\0\0\x28"), "names no block"),
        (
            page(b"\0\0\0\0\0\0\0\x40\x03a/b\x01\0\x01\0"),
            "the page itself has not",
        ),
        (page(b"\0\0\0\0\0\0\x01\0\x03a/b"), "compression"),
        (
            page(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x03"),
            "does not end as one",
        ),
    ] {
        let received = from_file(&bytes, &mut Kept::default());
        let said = received.reason.unwrap_or_default();
        assert!(said.contains(reason), "{said}, not {reason}");
    }
}

/// Of multifd, with the number that tells connections apart.
fn hello(channel: u8) -> Vec<u8> {
    let mut bytes = vec![0; 64];
    bytes[..8].copy_from_slice(b"\x11\x22\x33\x44\0\0\0\x01");
    bytes[24] = channel;
    bytes
}

/// Pages with contents `byte`, then pages of zeros.
fn packet(flags: u8, normal: &[u8], zero: &[u8], byte: u8) -> Vec<u8> {
    let mut bytes = vec![0; 1344];
    bytes[..8].copy_from_slice(b"\x11\x22\x33\x44\0\0\0\x01");
    bytes[11] = flags;
    bytes[15] = 128;
    bytes[19] = u8::try_from(normal.len()).unwrap();
    bytes[22] = bytes[19] * 16;
    bytes[35] = u8::try_from(zero.len()).unwrap();
    bytes[64..67].copy_from_slice(b"a/b");
    for (at, page) in (320..).step_by(8).zip(normal.iter().chain(zero)) {
        bytes[at + 6] = page * 16;
    }
    bytes.extend(normal.iter().flat_map(|_| [byte; 4096]));
    bytes
}

struct Lines {
    path: PathBuf,
    main: UnixStream,
    others: Vec<UnixStream>,
}

impl Lines {
    fn connect(path: &Path, count: u8) -> Self {
        let main = UnixStream::connect(path).unwrap();
        let mut lines = Self {
            path: path.to_owned(),
            main,
            others: Vec::new(),
        };
        for channel in 0..count {
            let line = lines.join(channel);
            lines.others.push(line);
        }
        lines
    }

    /// A further connection.
    fn join(&self, channel: u8) -> UnixStream {
        let mut line = UnixStream::connect(&self.path).unwrap();
        line.write_all(&hello(channel)).unwrap();
        line
    }

    /// All pages, over the first connection of multifd and the main one, which end well. Bytes on both.
    fn one_round(&mut self) -> usize {
        self.others[0]
            .write_all(&packet(SYNC, &[], &[], 0))
            .unwrap();
        let begun = Written::begun().end_of_section();
        self.main.write_all(&begun.bytes).unwrap();
        assert_eq!(&self.answer(), PONG);
        self.others[0]
            .write_all(&packet(SYNC, &[0, 2], &[1], 5))
            .unwrap();
        let last = Written::zero_rom().end_of_section().devices();
        self.main.write_all(&last.bytes).unwrap();
        begun.bytes.len() + last.bytes.len() + 64 + 1344 + 1344 + 2 * 4096
    }

    /// What the return path says next.
    fn answer(&mut self) -> [u8; 8] {
        let mut bytes = [0; 8];
        self.main.read_exact(&mut bytes).unwrap();
        bytes
    }
}

/// Lets `drive` send over several connections to one that receives.
fn over_multifd(count: u8, drive: impl FnOnce(&mut Lines) + Send) -> (QemuReceived, Kept) {
    expecting(count, count, drive)
}

/// Lets `drive` send over `count` connections to one that expects another number.
fn expecting(
    channels: u8,
    count: u8,
    drive: impl FnOnce(&mut Lines) + Send,
) -> (QemuReceived, Kept) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("in");
    let listener = Listener::bind(&Address::Unix(path.clone())).unwrap();
    let mut kept = Kept::default();
    let received = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut lines = Lines::connect(&path, count);
            drive(&mut lines);
            // Until the other end hangs up.
            let _ = lines.main.read_to_end(&mut Vec::new());
        });
        let receiver = QemuReceiver::new(&mut kept, CancelToken::new()).channels(channels);
        receiver.listen(&listener).unwrap()
    });
    (received, kept)
}

const SYNC: u8 = 1;
const PONG: &[u8; 8] = b"\0\x02\0\x04abcd";
const SHUT: &[u8; 8] = b"\0\x01\0\x04\0\0\0\0";
const FAILED: &[u8; 8] = b"\0\x01\0\x04\0\0\0\x01";

/// Page 0 goes over one connection in the first round, and over the other in the second; marks stand for themselves, or
/// sections' ends do.
fn two_rounds(lines: &mut Lines, marks: bool) {
    let mark = |written: Written| if marks { written.mark() } else { written };
    let sync = packet(SYNC, &[], &[], 0);
    for line in &mut lines.others {
        line.write_all(&sync).unwrap();
    }
    let begun = mark(Written::begun()).end_of_section();
    lines.main.write_all(&begun.bytes).unwrap();
    assert_eq!(&lines.answer(), PONG);
    // The second round is complete on its own connection before the first one's page has come.
    lines.others[1]
        .write_all(&packet(0, &[2], &[1], 5))
        .unwrap();
    lines.others[1].write_all(&sync).unwrap();
    lines.others[1]
        .write_all(&packet(SYNC, &[0], &[], 7))
        .unwrap();
    let round = mark(Written::default().part()).end_of_section();
    let last = mark(Written::zero_rom()).end_of_section().devices();
    lines.main.write_all(&round.bytes).unwrap();
    lines.main.write_all(&last.bytes).unwrap();
    lines.others[0]
        .write_all(&packet(SYNC, &[0], &[], 6))
        .unwrap();
    lines.others[0].write_all(&sync).unwrap();
    assert_eq!(&lines.answer(), SHUT);
}

#[test]
fn a_later_page_wins_on_whichever_connection_it_comes() {
    // Whoever does not wait is first by chance: in one of three runs it was seen.
    for marks in [false, true].repeat(10) {
        let (received, kept) = over_multifd(2, |lines| two_rounds(lines, marks));
        assert_eq!(received.status, Status::Completed, "{:?}", received.reason);
        for (page, byte) in [(0, 7), (1, 0), (2, 5)] {
            assert!(kept.page("a/b", page) == [byte; 4096], "{page}");
        }
        assert!(kept.page("rom", 0) == [0; 4096]);
        assert_eq!(received.channels, 2);
    }
}

#[test]
fn a_connection_that_breaks_off_is_told_and_the_source_hears_of_it() {
    let (received, kept) = over_multifd(2, |lines| {
        let sync = packet(SYNC, &[], &[], 0);
        for line in &mut lines.others {
            line.write_all(&sync).unwrap();
        }
        lines
            .main
            .write_all(&Written::begun().end_of_section().bytes)
            .unwrap();
        assert_eq!(&lines.answer(), PONG);
        lines.others[1]
            .write_all(&packet(0, &[2], &[], 5)[..2000])
            .unwrap();
        lines.others.pop();
        assert_eq!(&lines.answer(), FAILED);
    });
    assert_eq!(received.status, Status::Failed);
    assert!(
        matches!(received.error, Some(Error::Connection { number: 2, .. })),
        "{received:?}"
    );
    assert_eq!(kept.device_state, None);
}

#[test]
fn pages_that_no_sync_stands_behind_are_not_taken_for_whole() {
    let (received, kept) = over_multifd(1, |lines| {
        // So little fits that what is written has been read, but for the last few bytes.
        rustix::net::sockopt::set_socket_send_buffer_size(&lines.others[0], 1).unwrap();
        lines.others[0]
            .write_all(&packet(SYNC, &[], &[], 0))
            .unwrap();
        let begun = Written::begun().mark().end_of_section();
        lines.main.write_all(&begun.bytes).unwrap();
        assert_eq!(&lines.answer(), PONG);
        let round = packet(SYNC, &[0, 2], &[1], 5);
        lines.others[0].write_all(&round).unwrap();
        let mark = Written::default().part().mark().end_of_section();
        lines.main.write_all(&mark.bytes).unwrap();
        // All pages have come and met. One comes again, and half of another.
        let again = &packet(0, &[0, 1, 2], &[], 6)[..12_000];
        lines.others[0].write_all(again).unwrap();
        let last = Written::zero_rom().end_of_section().devices();
        lines.main.write_all(&last.bytes).unwrap();
        assert_eq!(&lines.answer(), FAILED);
    });
    assert_eq!(received.status, Status::Failed);
    assert_eq!(kept.device_state, None);
}

#[test]
fn pages_behind_the_last_mark_are_an_error_though_a_sync_stands_behind_them() {
    let (received, kept) = over_multifd(1, |lines| {
        lines.others[0]
            .write_all(&packet(SYNC, &[], &[], 0))
            .unwrap();
        let begun = Written::begun().end_of_section();
        lines.main.write_all(&begun.bytes).unwrap();
        assert_eq!(&lines.answer(), PONG);
        let line = &mut lines.others[0];
        line.write_all(&packet(SYNC, &[0, 2], &[1], 5)).unwrap();
        line.write_all(&packet(SYNC, &[1], &[], 6)).unwrap();
        let last = Written::zero_rom().end_of_section().devices();
        lines.main.write_all(&last.bytes).unwrap();
        assert_eq!(&lines.answer(), FAILED);
    });
    let said = received.reason.unwrap_or_default();
    assert!(said.contains("no mark"), "{said}");
    assert_eq!(kept.device_state, None);
}

#[test]
fn a_last_sync_without_pages_is_none_too_many() {
    let (received, _) = over_multifd(1, |lines| {
        lines.others[0]
            .write_all(&packet(SYNC, &[], &[], 0))
            .unwrap();
        let begun = Written::begun().mark().end_of_section();
        lines.main.write_all(&begun.bytes).unwrap();
        assert_eq!(&lines.answer(), PONG);
        let line = &mut lines.others[0];
        line.write_all(&packet(SYNC, &[0, 2], &[1], 5)).unwrap();
        // From 8.1 to 9.2 a last one belongs to no mark.
        line.write_all(&packet(SYNC, &[], &[], 0)).unwrap();
        let last = Written::zero_rom().mark().end_of_section().devices();
        lines.main.write_all(&last.bytes).unwrap();
        assert_eq!(&lines.answer(), SHUT);
    });
    assert_eq!(received.status, Status::Completed, "{:?}", received.reason);
}

#[test]
fn a_source_that_uses_multifd_unasked_is_told_of_channels() {
    let (received, kept) = expecting(0, 1, |lines| {
        let begun = Written::begun().end_of_section();
        lines.main.write_all(&begun.bytes).unwrap();
        assert_eq!(&lines.answer(), PONG);
        assert_eq!(&lines.answer(), FAILED);
    });
    assert!(
        matches!(received.error, Some(Error::MultifdUnasked)),
        "{received:?}"
    );
    assert!(received.reason.unwrap().contains("--channels"));
    assert_eq!(kept.device_state, None);
}

#[test]
fn connections_that_do_not_come_are_counted() {
    for came in [0, 1] {
        let (received, _) = expecting(2, came, |lines| {
            let begun = Written::begun().end_of_section();
            lines.main.write_all(&begun.bytes).unwrap();
            assert_eq!(&lines.answer(), PONG);
            assert_eq!(&lines.answer(), FAILED);
        });
        let said = received.reason.unwrap_or_default();
        assert!(said.contains(&format!("{came} of 2")), "{said}");
    }
}

#[test]
fn a_connection_is_awaited_before_any_page_is_taken() {
    let (received, kept) = expecting(1, 0, |lines| {
        let begun = Written::begun().end_of_section().part().end_of_section();
        lines.main.write_all(&begun.bytes).unwrap();
        // The other end is at the first mark soon.
        assert_eq!(&lines.answer(), PONG);
        let mut line = lines.join(0);
        line.write_all(&packet(SYNC, &[], &[], 0)).unwrap();
        line.write_all(&packet(SYNC, &[0, 2], &[1], 5)).unwrap();
        line.write_all(&packet(SYNC, &[], &[], 0)).unwrap();
        let last = Written::zero_rom().end_of_section().devices();
        lines.main.write_all(&last.bytes).unwrap();
        assert_eq!(&lines.answer(), SHUT);
    });
    assert_eq!(received.status, Status::Completed, "{:?}", received.reason);
    assert!(kept.page("a/b", 2) == [5; 4096]);
}

#[test]
fn a_stranger_among_the_connections_is_never_taken_for_one() {
    // One too many, or one with a number that is taken.
    for (channel, reason) in [(1, "--channels 1"), (0, "came twice")] {
        let (received, kept) = over_multifd(1, |lines| {
            let _stranger = lines.join(channel);
            let begun = Written::begun().end_of_section();
            lines.main.write_all(&begun.bytes).unwrap();
            assert_eq!(&lines.answer(), PONG);
            assert_eq!(&lines.answer(), FAILED);
        });
        let said = received.reason.unwrap_or_default();
        assert!(said.contains(reason), "{said}, not {reason}");
        assert_eq!(kept.device_state, None);
    }
    // One that comes when all are there.
    let (received, kept) = over_multifd(1, |lines| {
        let sync = packet(SYNC, &[], &[], 0);
        lines.others[0].write_all(&sync).unwrap();
        let begun = Written::begun().end_of_section();
        let question = b"\x08\0\x02\0\x04abcd";
        lines.main.write_all(&begun.put(question).bytes).unwrap();
        // The second answer comes from behind the first mark.
        assert_eq!([&lines.answer(), &lines.answer()], [PONG, PONG]);
        let mut stranger = lines.join(0);
        stranger.write_all(&packet(SYNC, &[0], &[], 9)).unwrap();
        let line = &mut lines.others[0];
        line.write_all(&packet(SYNC, &[0, 2], &[1], 5)).unwrap();
        let last = Written::zero_rom().end_of_section().devices();
        lines.main.write_all(&last.bytes).unwrap();
        assert_eq!(&lines.answer(), SHUT);
    });
    assert_eq!(received.status, Status::Completed, "{:?}", received.reason);
    assert!(kept.page("a/b", 0) == [5; 4096]);
}

#[test]
fn a_connection_left_of_a_source_that_has_gone_is_not_taken_for_a_new_ones() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("in");
    let listener = Listener::bind(&Address::Unix(path.clone())).unwrap();
    let mut gone = UnixStream::connect(&path).unwrap();
    gone.write_all(&hello(0)).unwrap();
    gone.write_all(&packet(SYNC, &[0], &[], 9)).unwrap();
    drop(gone);
    let mut kept = Kept::default();
    let received = std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut lines = Lines::connect(&path, 1);
            lines.one_round();
            assert_eq!(&lines.answer(), SHUT);
        });
        let receiver = QemuReceiver::new(&mut kept, CancelToken::new()).channels(1);
        receiver.listen(&listener).unwrap()
    });
    assert_eq!(received.status, Status::Completed, "{:?}", received.reason);
    assert!(kept.page("a/b", 0) == [5; 4096]);
}

#[test]
fn bytes_of_all_connections_are_counted() {
    let mut bytes = 0;
    let (received, _) = over_multifd(1, |lines| bytes = lines.one_round());
    assert_eq!(received.bytes, bytes as u64);
}

#[test]
fn packets_that_lie_are_refused_in_words() {
    let change = |at: usize, to: u8| {
        let mut bytes = packet(0, &[0], &[], 1);
        bytes[at] = to;
        bytes
    };
    for (bytes, reason) in [
        (change(3, 0), "does not"),
        (change(11, 2), "multifd-compression"),
        (change(19, 200), "200 pages"),
        (change(22, 0x20), "8192 bytes for 1 pages"),
        (change(64, b'x'), "which there is not"),
        (change(326, 0x30), "which has 0x3000"),
        (change(327, 1), "at byte 0x1"),
    ] {
        let (received, _) = over_multifd(1, |lines| {
            lines.others[0]
                .write_all(&packet(SYNC, &[], &[], 0))
                .unwrap();
            lines
                .main
                .write_all(&Written::begun().end_of_section().bytes)
                .unwrap();
            assert_eq!(&lines.answer(), PONG);
            lines.others[0].write_all(&bytes).unwrap();
        });
        let said = received.reason.unwrap_or_default();
        assert!(said.contains(reason), "{said}, not {reason}");
    }
}

#[test]
fn a_probe_of_the_port_is_nobody() {
    let (received, _) = {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("in");
        let listener = Listener::bind(&Address::Unix(path.clone())).unwrap();
        let mut kept = Kept::default();
        let received = std::thread::scope(|scope| {
            scope.spawn(|| {
                drop(UnixStream::connect(&path).unwrap());
                UnixStream::connect(&path)
                    .unwrap()
                    .write_all(b"GET / HTTP/1.1")
                    .unwrap();
                let mut main = UnixStream::connect(&path).unwrap();
                main.write_all(&Written::whole().bytes).unwrap();
                let _ = main.read_to_end(&mut Vec::new());
            });
            let receiver = QemuReceiver::new(&mut kept, CancelToken::new());
            receiver.listen(&listener).unwrap()
        });
        (received, kept)
    };
    assert_eq!(received.status, Status::Completed, "{:?}", received.reason);
}

#[test]
fn it_can_be_called_off_at_any_time() {
    let (mut near, far) = UnixStream::pair().unwrap();
    near.write_all(&Written::begun().end_of_section().bytes)
        .unwrap();
    let cancel = CancelToken::new();
    let mut kept = Kept::default();
    let received = std::thread::scope(|scope| {
        let stop = cancel.clone();
        scope.spawn(move || {
            // It has begun when it answers.
            near.read_exact(&mut [0; 8]).unwrap();
            stop.cancel();
            near.read_to_end(&mut Vec::new()).unwrap();
        });
        QemuReceiver::new(&mut kept, cancel).run(Stream::Unix(far))
    });
    assert_eq!(received.status, Status::Cancelled);
}
