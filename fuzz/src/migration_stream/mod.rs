//! The native migration stream, as a source sends it.
//!
//! The first byte says how the others are fed to a [`Receiver`]: as they are, or with lengths, numbers and checksums put
//! right (see `repaired`); through a socket or a file; and which call of the destination fails.

mod frames;
mod layout;
mod packed;
mod place;

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use gleaner_migrate::wire::{HEADER_LEN, Header, Kind, MAX_METADATA, Message};
use gleaner_migrate::{Error, Outcome, Received, Receiver, ReceiverOptions, Status, Stream};

use crate::MAX_INPUT;
use crate::allocations::capped;
pub use frames::{Frame, filler, frames};
pub use place::{CALLS, Place};

/// Lengths, numbers and checksums are put right, and payloads are made up.
pub const REPAIRED: u8 = 1;
/// Through a file, to which nobody answers.
pub const BY_FILE: u8 = 2;
/// From here on: the number of the call that fails, from 1, see [`CALLS`]; 0 for none.
pub const FAILING_SHIFT: u32 = 2;

/// What decoding a short frame may allocate: a text's length is believed up to what metadata may have, and a list's up to
/// 1 MiB, of which a layout has two.
const DECODE_CAP: usize = MAX_METADATA as usize + (2 << 20) + 16 * MAX_INPUT;
/// What a session may allocate beyond that: payloads that are no pages come in steps of 1 MiB, what is left unread in
/// 256 KiB, and packed pages come to up to 1 MiB.
const SESSION_CAP: usize = DECODE_CAP + (3 << 20);

/// Whatever the bytes: typed refusals or a guest that runs with the memory that the stream says, never both, and answers
/// that are whole frames.
///
/// # Panics
/// When something else holds.
pub fn run(input: &[u8]) {
    receive(input);
}

/// [`run`], and how the session ended.
///
/// # Panics
/// As [`run`].
pub fn receive(input: &[u8]) -> Option<Received> {
    let (&mode, bytes) = input.split_first()?;
    let bytes = &bytes[..bytes.len().min(MAX_INPUT)];
    for kind in Kind::ALL {
        decode(*kind, bytes);
    }
    let stream = if mode & REPAIRED != 0 {
        frames::repaired(bytes)
    } else {
        bytes.to_vec()
    };
    let call = usize::from(mode >> FAILING_SHIFT) % (CALLS.len() + 1);
    let place = Place::failing(call.checked_sub(1).map(|call| CALLS[call]));
    Some(if mode & BY_FILE != 0 {
        by_file(&stream, place)
    } else {
        by_socket(&stream, place)
    })
}

/// Decodes metadata alone; what decodes encodes to what decodes to the same, and a layout is one or is refused.
fn decode(kind: Kind, metadata: &[u8]) {
    let decoded = capped(DECODE_CAP, || Message::decode(kind, metadata));
    let Ok(message) = decoded else { return };
    assert_eq!(message.kind(), kind);
    if let Ok(again) = message.encode() {
        assert_eq!(Message::decode(kind, &again).ok().as_ref(), Some(&message));
    }
    if let Message::Layout(body) = message {
        layout::check(body);
    }
}

fn session(stream: Stream, place: &mut Place) -> (Received, ReceiverOptions) {
    let options = ReceiverOptions {
        // All that is to come has come: nothing is waited for.
        io_timeout: Duration::from_secs(5),
        ..ReceiverOptions::default()
    };
    let received = capped(SESSION_CAP, || {
        Receiver::new(place, options.clone()).run(stream)
    });
    (received, options)
}

fn by_file(stream: &[u8], mut place: Place) -> Received {
    let fd = rustix::fs::memfd_create("stream", rustix::fs::MemfdFlags::CLOEXEC);
    let mut file = File::from(fd.expect("a memfd"));
    file.write_all(stream).expect("room in memory");
    file.rewind().expect("a file");
    let (received, options) = session(file.into(), &mut place);
    judge(stream, &place, &received, &options);
    received
}

fn by_socket(stream: &[u8], mut place: Place) -> Received {
    let (mut near, far) = UnixStream::pair().expect("a socket");
    // What an input comes to is less than a socket holds, so that one thread is enough.
    near.write_all(stream).expect("room in the socket");
    near.shutdown(Shutdown::Write).expect("a socket");
    let (received, options) = session(far.into(), &mut place);
    let mut answers = Vec::new();
    near.read_to_end(&mut answers).expect("answers");
    judge(stream, &place, &received, &options);
    let kinds = answered(&answers);
    let says = |kind| kinds.last() == Some(&kind);
    assert_eq!(says(Kind::Running), received.status == Status::Completed);
    assert!(!says(Kind::Refused) || received.status == Status::Failed);
    received
}

/// What a session must leave behind, however it ended.
fn judge(stream: &[u8], place: &Place, received: &Received, options: &ReceiverOptions) {
    let completed = received.status == Status::Completed;
    assert_eq!(place.running, completed);
    let asked = matches!(received.error, Some(Error::OnlyQuery));
    assert_eq!(place.aborted, !completed && !asked, "{received:?}");
    if let Some(id) = received.migration_id {
        let known = options.outcomes.get(id);
        assert_eq!(known == Outcome::Running, completed);
        assert_eq!(known == Outcome::Refused, !completed);
    }
    if completed {
        place.compare(&frames(stream));
    }
}

/// The kinds of the answers, which must be a row of whole frames.
fn answered(mut bytes: &[u8]) -> Vec<Kind> {
    let mut kinds = Vec::new();
    while let Some((head, rest)) = bytes.split_first_chunk::<HEADER_LEN>() {
        let header = Header::parse(head).expect("a header");
        assert_eq!(header.sequence, kinds.len() as u64);
        let (metadata, rest) = rest.split_at(header.metadata as usize);
        header.check(head, metadata).expect("its checksum");
        let message = Message::decode(header.kind, metadata).expect("its metadata");
        assert_eq!(header.payload, 0, "{message:?}");
        kinds.push(header.kind);
        bytes = rest;
    }
    assert!(bytes.is_empty(), "a frame is not whole");
    kinds
}
