//! A real stream that was tampered with: the destination says in one line what is wrong with it, and runs nothing.

use crate::common::kvm;
use crate::harness::*;
use crate::proxy::{GO, LAYOUT, PAGES, STATE};

/// A frame's header, and where its version, its kind, its two lengths and its checksum stand.
const HEADER: usize = 28;
const VERSION: usize = 4;
const KIND: usize = 6;
const LENGTHS: usize = 16;
const CHECKSUM: usize = 24;

/// The frames of a whole migration to a file.
fn frames(place: &Place) -> Vec<Vec<u8>> {
    let guest = Guest::start(place, &[]);
    let file = place.path("stream");
    let to = format!("file:{}", file.display());
    guest.send(&to, &[]).end().status("completed", 0);
    let bytes = std::fs::read(file).unwrap();
    let mut rest = &bytes[..];
    let mut frames = Vec::new();
    while !rest.is_empty() {
        let word = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().unwrap()) as usize;
        let (frame, more) = rest.split_at(HEADER + word(LENGTHS) + word(LENGTHS + 4));
        frames.push(frame.to_vec());
        rest = more;
    }
    frames
}

/// Checks the header and the metadata again, as who made it on purpose would.
fn sealed(mut frame: Vec<u8>) -> Vec<u8> {
    let length = u32::from_le_bytes(frame[LENGTHS..LENGTHS + 4].try_into().unwrap()) as usize;
    let mut crc = crc32fast::Hasher::new();
    crc.update(&frame[..CHECKSUM]);
    crc.update(&frame[HEADER..HEADER + length]);
    frame[CHECKSUM..HEADER].copy_from_slice(&crc.finalize().to_le_bytes());
    frame
}

fn refused(place: &Place, what: &str, frames: &[Vec<u8>], reason: &str) {
    let file = place.path("tampered");
    std::fs::write(&file, frames.concat()).unwrap();
    let listen = format!("file:{}", file.display());
    let mut receive = Receive::listen(place, what, &listen, &["--resume"]);
    let ended = receive.wait_end();
    ended.failed("failed", reason);
    assert_eq!(
        ended
            .stderr
            .lines()
            .filter(|line| line.contains(reason))
            .count(),
        1,
        "{what}: {ended:?}"
    );
}

#[test]
fn it_is_refused_in_one_line() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let good = frames(&place);
    let first = |kind: u8| good.iter().position(|frame| frame[KIND] == kind).unwrap();
    let with = |change: &dyn Fn(&mut Vec<Vec<u8>>)| {
        let mut frames = good.clone();
        change(&mut frames);
        frames
    };
    let cases: [(&str, Vec<Vec<u8>>, &str); 9] = [
        (
            "the-future",
            with(&|frames| {
                for frame in frames {
                    frame[VERSION..KIND].copy_from_slice(&2u16.to_le_bytes());
                    *frame = sealed(frame.clone());
                }
            }),
            "version 2",
        ),
        (
            "no-stream",
            vec![b"QEVM\0\0\0\x03 another program's stream, or none".to_vec()],
            "not a Gleaner stream",
        ),
        ("empty", Vec::new(), "the file ended"),
        (
            "cut-within-pages",
            with(&|frames| {
                frames.truncate(first(PAGES) + 1);
                frames[first(PAGES)].truncate(HEADER + 50);
            }),
            "the file ended",
        ),
        (
            "cut-before-its-end",
            with(&|frames| frames.truncate(first(GO))),
            "the file ended",
        ),
        (
            "a-flipped-bit-of-a-header",
            with(&|frames| frames[first(PAGES)][9] ^= 4),
            "checksum",
        ),
        (
            "a-flipped-bit-of-the-state",
            with(&|frames| *frames[first(STATE)].last_mut().unwrap() ^= 1),
            "checksum",
        ),
        (
            "reordered",
            with(&|frames| frames.swap(first(LAYOUT), first(LAYOUT) + 1)),
            "was due",
        ),
        (
            "twice",
            with(&|frames| frames.insert(first(LAYOUT), good[first(LAYOUT)].clone())),
            "was due",
        ),
    ];
    for (what, frames, reason) in cases {
        refused(&place, what, &frames, reason);
    }
}
