//! Frames of a stream, read and put right.

use gleaner_migrate::wire::{HEADER_LEN, Header, Kind, Message};

/// What the payloads of a repaired stream may come to: with the longest input less than a socket holds.
const PAYLOADS: usize = 64 << 10;

/// A frame as a stream has it.
#[derive(Debug)]
pub struct Frame<'a> {
    /// What it says.
    pub message: Message,
    /// What follows.
    pub payload: &'a [u8],
}

/// The whole frames that a stream begins with.
#[must_use]
pub fn frames(mut stream: &[u8]) -> Vec<Frame<'_>> {
    let mut all = Vec::new();
    while let Some((frame, rest)) = first(stream) {
        all.push(frame);
        stream = rest;
    }
    all
}

fn first(stream: &[u8]) -> Option<(Frame<'_>, &[u8])> {
    let (head, rest) = stream.split_first_chunk::<HEADER_LEN>()?;
    let header = Header::parse(head).ok()?;
    let (metadata, rest) = rest.split_at_checked(header.metadata as usize)?;
    let (payload, rest) = rest.split_at_checked(header.payload as usize)?;
    let message = Message::decode(header.kind, metadata).ok()?;
    Some((Frame { message, payload }, rest))
}

/// The payload of frame number `sequence` in a repaired stream: never zero.
#[must_use]
pub fn filler(sequence: u64, length: usize) -> Vec<u8> {
    // Cut to a byte on purpose.
    vec![sequence.to_le_bytes()[0] | 1; length]
}

/// The stream that `bytes` are a sketch of. Each frame in it is a header and metadata, without payload; the next magic
/// number ends it. Kind, metadata and the payload's length stay as they are; version, flags, sequence, the length of the
/// metadata and the checksum become right, and the payload is made up. So a search for inputs is not stopped by a checksum,
/// nor has it to carry pages, whose contents nobody looks at. The payload of a Packed frame, which is looked at, is what
/// follows the metadata, whose length stays as it is.
#[must_use]
pub fn repaired(bytes: &[u8]) -> Vec<u8> {
    let magic = b"GLNR";
    let starts: Vec<usize> = (0..bytes.len())
        .filter(|at| bytes[*at..].starts_with(magic))
        .collect();
    let mut stream = Vec::new();
    let mut room = PAYLOADS;
    for (sequence, start) in (0u64..).zip(&starts) {
        let end = starts.iter().find(|next| *next > start);
        let mut piece = bytes[*start..end.copied().unwrap_or(bytes.len())].to_vec();
        piece.resize(piece.len().max(HEADER_LEN), 0);
        let (head, metadata) = piece.split_at(HEADER_LEN);
        let kind = Kind::ALL.iter().find(|kind| **kind as u8 == head[6]);
        let [length, payload] = [16, 20].map(|at| {
            let bytes = [head[at], head[at + 1], head[at + 2], head[at + 3]];
            u32::from_le_bytes(bytes) as usize
        });
        let (metadata, packed) = match kind {
            Some(Kind::Packed) => metadata.split_at(length.min(metadata.len())),
            _ => (metadata, &[][..]),
        };
        let payload = match kind {
            Some(Kind::Packed) => packed.len(),
            _ => payload,
        };
        let encoded = kind.map(|kind| Header::encode(*kind, sequence, metadata, payload as u64));
        let Some(Ok(head)) = encoded else {
            // It can't be right: unknown kind, or over a cap.
            stream.extend(&piece);
            continue;
        };
        stream.extend(head);
        stream.extend(metadata);
        stream.extend(packed);
        let given = room.min(payload - packed.len());
        stream.extend(filler(sequence, given));
        room -= given;
    }
    stream
}
