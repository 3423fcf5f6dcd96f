//! Traces, made by the product's own writer, whole and spoilt; and what they hold without their checksums.

use std::time::Duration;

use gleaner_bitmap::PageRange;
use gleaner_migrate::trace::{Followed, TraceWriter};

use super::Seed;

/// Bytes of a file's header.
const HEADER: usize = 15;

/// Two blocks, one of which comes later, and four records, the third of which is empty.
fn file(shift: u8) -> Vec<u8> {
    let mut file = Vec::new();
    // Nothing fails in memory.
    let _ = write(&mut file, shift);
    file
}

fn write(file: &mut Vec<u8>, shift: u8) -> gleaner_migrate::Result<()> {
    let followed = Followed::one_of(shift).unwrap_or(Followed::ALL);
    let mut writer = TraceWriter::new(file, followed)?;
    let ram = writer.block("ram", 1000)?;
    writer.dirtied(ram, PageRange::new(0, 1));
    writer.dirtied(ram, PageRange::new(300, 400));
    writer.record(Duration::from_millis(100))?;
    let dimm = writer.block("dimm0", 64)?;
    writer.dirtied(ram, PageRange::new(999, 1));
    writer.dirtied(dimm, PageRange::new(0, 64));
    writer.record(Duration::from_millis(200))?;
    writer.record(Duration::from_millis(250))?;
    writer.dirtied(ram, PageRange::new(1, 1));
    writer.dirtied(ram, PageRange::new(3, 2));
    writer.record(Duration::from_secs(3600))
}

/// A file as it is.
fn whole(file: &[u8]) -> Vec<u8> {
    [&[0], file].concat()
}

/// What it holds: bodies of less than 128 bytes each.
fn bodies(file: &[u8]) -> Vec<Vec<u8>> {
    let (mut rest, mut bodies) = (&file[HEADER..], Vec::new());
    while let Some((length, after)) = rest.split_first() {
        let length = usize::from(*length);
        bodies.push(after[..length].to_vec());
        rest = &after[length + 4..];
    }
    bodies
}

/// As an input.
fn held(shift: u8, bodies: &[Vec<u8>]) -> Vec<u8> {
    let mut input = vec![1, shift];
    for body in bodies {
        input.extend(u16::try_from(body.len()).unwrap_or(u16::MAX).to_le_bytes());
        input.extend(body);
    }
    input
}

/// The seeds of the target.
pub fn seeds() -> Vec<Seed> {
    let all = file(0);
    let changed = |at: usize, byte: u8| {
        let mut file = all.clone();
        file[at] = byte;
        whole(&file)
    };
    let with = |body: &[u8]| {
        let mut bodies = bodies(&all);
        bodies.push(body.to_vec());
        held(0, &bodies)
    };
    [
        ("whole", whole(&all)),
        ("one-of-four", whole(&file(2))),
        ("cut", whole(&all[..all.len() - 3])),
        ("newer", changed(8, 2)),
        ("damaged", changed(all.len() - 1, !all[all.len() - 1])),
        ("no-trace", whole(b"{\"kind\":\"start\"}")),
        ("endless", whole(&[&all[..HEADER], &[0xff; 10]].concat())),
        ("held", held(0, &bodies(&all))),
        ("held-one-of-four", held(2, &bodies(&file(2)))),
        ("follows-too-few", held(41, &bodies(&all))),
        ("unknown-kind", with(&[2, 1])),
        ("without-time", with(&[1, 0])),
        // 1064 pages are there.
        ("past-the-end", with(&[1, 1, 0xd0, 0x10])),
        ("across-the-end", with(&[1, 1, 0xcf, 0x10, 0])),
        (
            "after-a-hundred-years",
            with(&[1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x07]),
        ),
        ("too-much-memory", with(&[0, 0x80, 0x80, 0x80, 0x20, b'x'])),
        ("no-utf-8", with(&[0, 1, 0xff])),
    ]
    .map(|(name, bytes)| (name.to_owned(), bytes))
    .into()
}
