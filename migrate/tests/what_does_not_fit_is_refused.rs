//! Whatever a peer sends: a typed refusal, never a panic, never memory beyond the caps.

#![allow(clippy::unwrap_used)] // helpers are not known to be tests

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use common::*;
use gleaner_bitmap::{BlockId, BlockInfo, Extent, Generation};
use gleaner_migrate::wire::*;
use gleaner_migrate::*;
use proptest::prelude::*;

/// A frame as a peer would send it.
fn frame(sequence: u64, message: &Message, payload: &[u8]) -> Vec<u8> {
    let metadata = message.encode().unwrap();
    let length = payload.len() as u64;
    let header = Header::encode(message.kind(), sequence, &metadata, length).unwrap();
    [&header[..], &metadata, payload].concat()
}

fn hello() -> Message {
    Message::Hello(Hello {
        version: VERSION,
        id: MigrationId([7; 16]),
        name: "peer".into(),
        page_size: 4096,
        channels: 1,
        local: false,
    })
}

fn layout(generation: u64, pages: u64) -> Message {
    Message::Layout(LayoutBody {
        generation: Generation(generation),
        blocks: vec![BlockInfo {
            id: BlockId(3),
            name: "ram".into(),
            pages,
        }],
        slots: vec![],
    })
}

fn extents(list: &[(u64, u64, u64)]) -> Extents {
    let extents = list
        .iter()
        .map(|(b, first, pages)| Extent::new(BlockId(*b), *first, *pages));
    Extents {
        generation: Generation(1),
        extents: extents.collect(),
    }
}

/// Feeds bytes to a receiver, then ends the stream.
fn feed(bytes: &[u8]) -> (Received, ToyDestination) {
    let (mut near, far) = UnixStream::pair().unwrap();
    let place = ToyDestination::default();
    let mut there = place.clone();
    let receiving =
        thread::spawn(move || Receiver::new(&mut there, receiver_options()).run(far.into()));
    let _ = near.write_all(bytes);
    near.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answers = Vec::new();
    let _ = near.read_to_end(&mut answers);
    (receiving.join().unwrap(), place)
}

fn refused(frames: &[(Message, &[u8])]) -> Error {
    let bytes: Vec<u8> = frames
        .iter()
        .enumerate()
        .flat_map(|(n, (message, payload))| frame(n as u64, message, payload))
        .collect();
    let (received, place) = feed(&bytes);
    assert_eq!(received.status, Status::Failed);
    assert!(place.place().aborted && !place.place().running);
    received.error.unwrap()
}

#[test]
fn frames_that_make_no_sense() {
    let page = &[1u8; 4096][..];
    let start = || vec![(hello(), &[][..]), (layout(1, 10), &[][..])];
    let after = |message, payload| {
        let mut frames = start();
        frames.push((message, payload));
        refused(&frames)
    };
    let pages = |list: &[_]| Message::Pages(extents(list));
    assert!(matches!(
        after(pages(&[(4, 0, 1)]), page),
        Error::UnknownBlock { block: BlockId(4) }
    ));
    for bad in [
        (3, 10, 1),
        (3, 9, 2),
        (3, u64::MAX, 2),
        (3, 0, u64::MAX),
        (3, 0, 0),
    ] {
        assert!(
            matches!(after(pages(&[bad]), page), Error::OutsideBlock { .. }),
            "{bad:?}"
        );
        let zeros = Message::Zeros(extents(&[bad]));
        assert!(
            matches!(after(zeros, &[]), Error::OutsideBlock { .. }),
            "{bad:?}"
        );
    }
    assert!(matches!(
        after(pages(&[(3, 0, 2)]), page),
        Error::PayloadLength { .. }
    ));
    assert!(matches!(
        after(pages(&[]), page),
        Error::PayloadLength { .. }
    ));
    let late = Message::Pages(Extents {
        generation: Generation(2),
        ..extents(&[(3, 0, 1)])
    });
    assert!(matches!(after(late, page), Error::Stale { .. }));
    let digests = |list: &[_]| Message::Digests(extents(list));
    assert!(matches!(
        after(digests(&[(4, 0, 1)]), &page[..8]),
        Error::UnknownBlock { .. }
    ));
    for bad in [(3, 10, 1), (3, 9, 2), (3, 0, u64::MAX), (3, 0, 0)] {
        assert!(
            matches!(
                after(digests(&[bad]), &page[..8]),
                Error::OutsideBlock { .. }
            ),
            "{bad:?}"
        );
    }
    for length in [0, 7, 9, 16] {
        assert!(
            matches!(
                after(digests(&[(3, 0, 1)]), &page[..length]),
                Error::PayloadLength { .. }
            ),
            "{length}"
        );
    }
    assert!(matches!(
        after(digests(&[(3, 2, 1)]), &page[..8]),
        Error::Differs { page: 2, .. }
    ));
    assert!(matches!(
        after(layout(2, 11), &[]),
        Error::BlockChanged { .. }
    ));
    assert!(matches!(after(layout(1, 10), &[]), Error::Stale { .. }));
    for early in [
        Message::Go,
        hello(),
        Message::Ready,
        Message::Query(MigrationId([0; 16])),
    ] {
        assert!(matches!(after(early, &[]), Error::OutOfState { .. }));
    }
    let early = Message::Digests(extents(&[(3, 0, 1)]));
    assert!(matches!(
        refused(&[(hello(), &[]), (early.clone(), &page[..8])]),
        Error::Stale { .. }
    ));
    let late = Message::State(StateBody {
        generation: Generation(1),
        crc: crc32fast::hash(b"state"),
    });
    let mut frames = start();
    frames.extend([(late, &b"state"[..]), (early, &page[..8])]);
    assert!(matches!(refused(&frames), Error::OutOfState { .. }));
    assert!(matches!(
        refused(&[(Message::Sync, &[])]),
        Error::OutOfState { .. }
    ));
    assert!(matches!(
        refused(&[(hello(), &[]), (Message::Go, &[])]),
        Error::OutOfState { .. }
    ));
    let damaged = Message::State(StateBody {
        generation: Generation(1),
        crc: 1,
    });
    assert!(matches!(
        after(damaged, b"state"),
        Error::Checksum { what: "state" }
    ));
    let pages = u64::MAX / 4096;
    assert!(matches!(
        refused(&[(hello(), &[]), (layout(1, pages), &[])]),
        Error::TooLong { .. }
    ));
    assert!(matches!(
        refused(&[(hello(), &[]), (layout(1, 0), &[])]),
        Error::TooLong { .. }
    ));
}

fn packed(list: &[(u64, u64, u64)], codec: Compress, encodings: &[Encoding]) -> Message {
    Message::Packed(PackedBody {
        pages: extents(list),
        codec,
        encodings: encodings.to_vec(),
    })
}

#[test]
fn packed_pages_that_are_none() {
    use Encoding::{Delta, Whole};
    let page = &[1u8; 4096][..];
    let after = |frames: &[(Message, &[u8])]| {
        let mut all = vec![(hello(), &[][..]), (layout(1, 10), &[][..])];
        all.extend_from_slice(frames);
        refused(&all)
    };
    let one = |list: &[_], encodings: &[_], payload| {
        after(&[(packed(list, Compress::None, encodings), payload)])
    };
    assert!(matches!(
        one(&[(4, 0, 1)], &[Whole], page),
        Error::UnknownBlock { block: BlockId(4) }
    ));
    for bad in [(3, 10, 1), (3, u64::MAX, 2), (3, 0, u64::MAX), (3, 0, 0)] {
        let error = one(&[bad], &[Whole], page);
        assert!(matches!(error, Error::OutsideBlock { .. }), "{bad:?}");
    }
    for encodings in [&[][..], &[Whole, Whole]] {
        let error = one(&[(3, 0, 1)], encodings, page);
        assert!(matches!(error, Error::Packed { .. }), "{encodings:?}");
    }
    for payload in [&page[1..], &[], &[1; 4097]] {
        let error = one(&[(3, 0, 1)], &[Whole], payload);
        let expected = payload.len() as u64;
        assert!(
            matches!(error, Error::PayloadLength { carried, .. } if carried == expected),
            "{error}"
        );
    }
    // A delta of what has not come, of what came to another page, and of what has become zeros since.
    let whole = packed(&[(3, 4, 1)], Compress::None, &[Whole]);
    let delta = |page| packed(&[(3, page, 1)], Compress::None, &[Delta(3)]);
    let pages = Message::Pages(extents(&[(3, 4, 1)]));
    let zeros = Message::Zeros(extents(&[(3, 0, 10)]));
    let change = &[0u8, 1, 9][..];
    let base = |error: Error| matches!(error, Error::NoBase { .. });
    assert!(base(after(&[(delta(4), change)])));
    for first in [whole, pages] {
        assert!(base(after(&[(first.clone(), page), (delta(5), change)])));
        assert!(base(after(&[
            (first.clone(), page),
            (zeros.clone(), &[]),
            (delta(4), change)
        ])));
        // Taken where it has come; what ends this is the end of the stream.
        let closed = after(&[(first, page), (delta(4), change)]);
        assert!(matches!(closed, Error::Closed { .. }), "{closed}");
    }
}

#[test]
fn packed_pages_over_their_caps() {
    let many = vec![Encoding::Delta(0); MAX_PACKED_PAGES + 1];
    for body in [
        packed(&[(3, 0, 257)], Compress::None, &many),
        packed(&vec![(3, 0, 1); 257], Compress::None, &[]),
        packed(&[(3, 0, 1)], Compress::None, &[Encoding::Delta(2049)]),
    ] {
        assert!(matches!(body.encode(), Err(Error::TooLong { .. })));
    }
    let (_, cap) = Kind::Packed.caps();
    assert_eq!(u64::from(cap), MAX_PACKED_PAGES as u64 * 4096);
}

/// Whoever embeds this without a C compiler says so to the source's user.
#[cfg(not(feature = "compress"))]
#[test]
fn packed_pages_where_nothing_unpacks_them() {
    for codec in [Compress::Lz4, Compress::Zstd] {
        let frame = packed(&[(3, 0, 1)], codec, &[Encoding::Whole]);
        let error = refused(&[(hello(), &[]), (layout(1, 10), &[]), (frame, &[1; 99])]);
        assert!(matches!(error, Error::LeftOut { .. }));
        assert!(error.to_string().contains("\"compress\""), "{error}");
        let source = ToySource::new(12);
        let options = SenderOptions {
            compress: codec,
            ..options()
        };
        let report = Sender::new(&mut source.clone(), options).run(pair().0);
        assert!(matches!(report.error, Some(Error::LeftOut { .. })));
        assert!(source.guest().running);
    }
}

#[test]
fn another_version_or_page_size() {
    let Message::Hello(good) = hello() else {
        unreachable!()
    };
    let version = Message::Hello(Hello {
        version: 2,
        ..good.clone()
    });
    assert!(matches!(
        refused(&[(version, &[])]),
        Error::Version { found: 2 }
    ));
    let pages = Message::Hello(Hello {
        page_size: 65536,
        channels: 1,
        ..good
    });
    assert!(matches!(
        refused(&[(pages, &[])]),
        Error::PageSize { found: 65536 }
    ));
}

#[test]
fn frames_out_of_order() {
    let bytes = [frame(0, &hello(), &[]), frame(2, &layout(1, 10), &[])].concat();
    assert!(matches!(
        feed(&bytes).0.error,
        Some(Error::Sequence {
            expected: 1,
            found: 2
        })
    ));
}

#[test]
fn a_flipped_bit_in_any_header_or_metadata() {
    let frames = [
        frame(0, &hello(), &[]),
        frame(1, &layout(1, 10), &[]),
        frame(2, &Message::Zeros(extents(&[(3, 1, 2)])), &[]),
        frame(3, &Message::Sync, &[]),
    ]
    .concat();
    for at in 0..frames.len() {
        let mut bytes = frames.clone();
        bytes[at] ^= 1 << (at % 8);
        let error = feed(&bytes).0.error.unwrap();
        assert!(
            !matches!(
                error,
                Error::Closed {
                    during: "receiving memory"
                }
            ),
            "byte {at}"
        );
    }
}

/// The same in answers: the source never takes a damaged one for what it isn't.
#[test]
fn a_flipped_bit_in_any_answer() {
    for at in 0..200 {
        let flip = Fault {
            flip: Some((at, u8::try_from(at % 8).unwrap())),
            ..Fault::default()
        };
        let (near, far, threads) = line([Fault::default(), flip]);
        let (source, place) = (ToySource::new(12), ToyDestination::default());
        let mut options = options();
        // A length that became greater is found out by nothing coming.
        options.io_timeout = Duration::from_secs(1);
        let (report, _) = migrate(&source, &place, options, receiver_options(), near, far);
        let total = threads.map(|thread| thread.join().unwrap())[1];
        assert!(!(source.guest().running && place.place().running));
        assert_eq!(
            report.status == Status::Completed,
            at >= total,
            "byte {at} of {total}"
        );
    }
}

#[test]
fn a_truncated_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stream");
    let address = Address::File(path.clone());
    let report = Sender::new(&mut ToySource::new(12), options()).run(connect(&address).unwrap());
    assert_eq!(report.status, Status::Completed);
    let whole = std::fs::read(&path).unwrap();
    for length in (0..whole.len())
        .step_by(501)
        .chain(whole.len() - 60..whole.len())
    {
        std::fs::write(&path, &whole[..length]).unwrap();
        let place = ToyDestination::default();
        let received = Receiver::new(&mut place.clone(), receiver_options())
            .listen(&Listener::bind(&address).unwrap())
            .unwrap();
        assert!(
            matches!(received.error, Some(Error::Truncated { .. })),
            "{length}"
        );
        assert!(place.place().aborted && !place.place().running);
    }
}

#[test]
fn a_silent_source() {
    let (near, far) = UnixStream::pair().unwrap();
    let options = ReceiverOptions {
        io_timeout: Duration::from_millis(60),
        ..receiver_options()
    };
    let place = ToyDestination::default();
    let received = Receiver::new(&mut place.clone(), options).run(far.into());
    assert!(matches!(received.error, Some(Error::Silent { .. })));
    drop(near);
}

#[test]
fn a_silent_destination() {
    let (near, _far) = pair();
    let source = ToySource::new(12);
    let mut options = options();
    options.io_timeout = Duration::from_millis(60);
    let report = Sender::new(&mut source.clone(), options).run(near);
    assert!(matches!(report.error, Some(Error::Silent { .. })));
    assert!(source.guest().running);
}

#[test]
fn a_destination_that_answers_with_something_else() {
    for (answer, sequence) in [
        (Message::Ready, 0),
        (Message::Running, 0),
        (Message::Welcome(9), 0),
        (Message::Welcome(VERSION), 4),
    ] {
        let (near, mut far) = UnixStream::pair().unwrap();
        far.write_all(&frame(sequence, &answer, &[])).unwrap();
        let source = ToySource::new(12);
        let report = Sender::new(&mut source.clone(), options()).run(near.into());
        assert_eq!(report.status, Status::Failed, "{answer:?}");
        assert!(source.guest().running);
    }
}

/// Pages of the frame that both ends are in the middle of below. So many that nobody gets through it by chance.
const MANY: u64 = 8192;

#[test]
fn a_receiver_called_off_says_so_in_the_middle_of_a_frame() {
    let (mut near, far) = UnixStream::pair().unwrap();
    let options = receiver_options();
    let cancel = options.cancel.clone();
    let place = ToyDestination::default();
    let mut there = place.clone();
    let receiving = thread::spawn(move || Receiver::new(&mut there, options).run(far.into()));
    let pages = Message::Pages(extents(&[(3, 0, MANY)]));
    let mut payload = vec![1; usize::try_from(MANY * 4096).unwrap()];
    let frame_of_pages = frame(2, &pages, &payload);
    payload.clear();
    for (n, message) in (0..).zip([hello(), layout(1, MANY)]) {
        near.write_all(&frame(n, &message, &payload)).unwrap();
    }
    // Little by little, so that there always is something to read: also for as long as what comes after a last word is read.
    let mut written = 0;
    for (n, bytes) in frame_of_pages.chunks(4).enumerate() {
        if n == 40_000 {
            cancel.cancel();
        }
        if near.write_all(bytes).is_err() {
            break;
        }
        written += bytes.len();
    }
    assert!(written < frame_of_pages.len(), "all of it was read");
    let received = receiving.join().unwrap();
    assert!(matches!(received.error, Some(Error::Cancelled)));
    assert!(place.place().aborted);
    let mut answers = Vec::new();
    let _ = near.read_to_end(&mut answers);
    let last = frame(2, &Message::Refused("cancelled".into()), &[]);
    assert!(answers.ends_with(&last), "{answers:?}");
}

#[test]
fn a_sender_hears_a_refusal_in_the_middle_of_a_frame() {
    let (near, mut far) = UnixStream::pair().unwrap();
    let source = ToySource::new(MANY);
    {
        let mut guest = source.guest();
        let ram = guest.id("ram");
        for page in 0..MANY {
            guest.write(ram, page, 0x22);
        }
    }
    let mut guest = source.clone();
    let sending = thread::spawn(move || Sender::new(&mut guest, options()).run(near.into()));
    let next = |far: &mut UnixStream| {
        let mut head = [0; HEADER_LEN];
        far.read_exact(&mut head).unwrap();
        let header = Header::parse(&head).unwrap();
        let mut metadata = vec![0; header.metadata as usize];
        far.read_exact(&mut metadata).unwrap();
        (header, Message::decode(header.kind, &metadata).unwrap())
    };
    let mut answers = 0;
    let frame_of_pages = loop {
        let (header, message) = next(&mut far);
        let answer = match message {
            Message::Hello(_) => Message::Welcome(VERSION),
            Message::Layout(layout) => Message::Adopted(Adopted {
                generation: layout.generation,
                zero: Vec::new(),
            }),
            Message::Sync => Message::Applied(header.sequence),
            _ => break header,
        };
        far.write_all(&frame(answers, &answer, &[])).unwrap();
        answers += 1;
    };
    assert_eq!(frame_of_pages.kind, Kind::Pages);
    let refusal = Message::Refused("no room".into());
    far.write_all(&frame(answers, &refusal, &[])).unwrap();
    // Little by little, so that it always gets on with its writing.
    let (mut read, mut bytes) = (0, [0; 4]);
    while let Ok(n @ 1..) = far.read(&mut bytes) {
        read += n;
    }
    let report = sending.join().unwrap();
    assert_eq!(report.reason.as_deref(), Some("no room"));
    assert!(
        read < frame_of_pages.payload as usize,
        "all of it was written"
    );
    assert!(source.guest().running);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn random_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..4000)) {
        let (received, place) = feed(&bytes);
        prop_assert_eq!(received.status, Status::Failed);
        prop_assert!(!place.place().running);
    }

    /// Random bytes where a frame of a given kind says that they are its metadata and payload.
    #[test]
    fn random_frames(
        kinds in proptest::collection::vec(
            (0..Kind::ALL.len(), proptest::collection::vec(any::<u8>(), 0..40), 0u64..9000), 1..6),
        greeted in any::<bool>(),
    ) {
        let mut bytes = Vec::new();
        let mut sequence = 0;
        if greeted {
            for message in [hello(), layout(1, 10)] {
                bytes.extend(frame(sequence, &message, &[]));
                sequence += 1;
            }
        }
        for (kind, metadata, payload) in kinds {
            let Ok(header) = Header::encode(Kind::ALL[kind], sequence, &metadata, payload) else {
                continue;
            };
            bytes.extend(header);
            bytes.extend(metadata);
            bytes.resize(bytes.len() + usize::try_from(payload).unwrap(), 0xa5);
            sequence += 1;
        }
        let (received, place) = feed(&bytes);
        prop_assert!(received.status != Status::Completed);
        prop_assert!(!place.place().running);
    }
}
