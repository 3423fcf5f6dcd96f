//! A trace that `gleaner plan` is to read.
//!
//! An input is a file as it is (the first byte is even), or what a file holds, without the checksums that a search would never
//! meet: how many pages are followed, and bodies, each behind two bytes of length. What is made of those has to be what a
//! reader comes to that knows nothing but the format.

use gleaner_bitmap::PageRange;
use gleaner_migrate::Result;
use gleaner_migrate::trace::Trace;

use crate::MAX_INPUT;
use crate::allocations::capped;
use crate::bytes::Bytes;

/// A record takes three bytes of an input at least and 40 of memory, which double as they grow.
const CAP: usize = 1 << 20;
/// What the format's head says.
const MOST_FOLLOWED: u128 = 1 << 26;
const MOST_PAGES: u128 = 1 << 52;
const MOST_MICROSECONDS: u128 = 1 << 52;
const MOST_BLOCKS: usize = 4096;
const MOST_NAME: usize = 255;
const MOST_SHIFT: u8 = 40;

/// Whatever the bytes: a refusal, or a trace whose records lie in the pages that it follows.
///
/// # Panics
/// When something else holds.
pub fn run(input: &[u8]) {
    let input = &input[..input.len().min(MAX_INPUT)];
    let read = read(input);
    if let Ok(trace) = &read {
        consistent(trace);
    }
    if let Some(bodies) = Bodies::of(input) {
        let found = read.as_ref().ok().map(told);
        assert_eq!(found, bodies.told(), "{:?}", read.err());
    }
}

/// What comes of an input.
///
/// # Errors
/// Those of [`Trace::read`].
///
/// # Panics
/// When it takes too much memory.
pub fn read(input: &[u8]) -> Result<Trace> {
    match Bodies::of(input) {
        Some(bodies) => {
            let file = bodies.file();
            capped(CAP, || Trace::read(&file[..]))
        }
        None => capped(CAP, || Trace::read(input.get(1..).unwrap_or_default())),
    }
}

fn consistent(trace: &Trace) {
    let mut before = 0;
    for record in trace.records() {
        assert!(record.until > before);
        before = record.until;
        let (mut end, mut pages) = (0, 0);
        for run in trace.runs(record) {
            assert!(run.pages > 0 && run.first >= end, "{run:?} after {end}");
            (end, pages) = (run.end(), pages + run.pages);
        }
        assert!(end <= trace.followed_pages());
        assert_eq!(pages, record.pages);
    }
    assert_eq!(trace.microseconds(), before);
}

/// Blocks by name and pages; records by when each ends, and its runs.
type Told = (Vec<(String, u64)>, Vec<(u64, Vec<PageRange>)>);

fn told(trace: &Trace) -> Told {
    assert_eq!(trace.cut(), None);
    let blocks = trace.blocks().iter();
    let records = trace.records().iter();
    (
        blocks.map(|b| (b.name.clone(), b.pages)).collect(),
        records
            .map(|r| (r.until, trace.runs(r).collect()))
            .collect(),
    )
}

/// What a file holds.
struct Bodies<'a> {
    shift: u8,
    bodies: Vec<&'a [u8]>,
}

impl<'a> Bodies<'a> {
    fn of(input: &'a [u8]) -> Option<Self> {
        let mut bytes = Bytes(input);
        bytes.byte().filter(|kind| kind % 2 == 1)?;
        let shift = bytes.byte()?;
        let mut bodies = Vec::new();
        while let (Some(low), Some(high)) = (bytes.byte(), bytes.byte()) {
            bodies.push(bytes.take(u16::from_le_bytes([low, high]).into()));
        }
        Some(Self { shift, bodies })
    }

    fn file(&self) -> Vec<u8> {
        let mut file = b"gleantrc\x01\0".to_vec();
        file.push(self.shift);
        file.extend(crc32fast::hash(&file).to_le_bytes());
        for body in &self.bodies {
            let mut length = body.len();
            while length >= 0x80 {
                file.push(length.to_le_bytes()[0] | 0x80);
                length /= 0x80;
            }
            file.push(length.to_le_bytes()[0]);
            file.extend(*body);
            file.extend(crc32fast::hash(body).to_le_bytes());
        }
        file
    }

    /// As the head of the format has it; `None` of what can't be.
    fn told(&self) -> Option<Told> {
        if self.shift > MOST_SHIFT {
            return None;
        }
        let (mut blocks, mut records) = (Vec::new(), Vec::new());
        let (mut pages, mut followed, mut now) = (0u128, 0u128, 0u128);
        for body in &self.bodies {
            let (kind, mut rest) = body.split_first()?;
            let number = varint(&mut rest)?;
            match kind {
                0 => {
                    pages += number;
                    followed += number.div_ceil(1 << self.shift);
                    let name = std::str::from_utf8(rest).ok()?;
                    let fits = pages <= MOST_PAGES && followed <= MOST_FOLLOWED;
                    if !fits || blocks.len() == MOST_BLOCKS || name.len() > MOST_NAME {
                        return None;
                    }
                    blocks.push((name.to_owned(), u64::try_from(number).ok()?));
                }
                1 => {
                    now += number;
                    if number == 0 || now >= MOST_MICROSECONDS {
                        return None;
                    }
                    let runs = runs(rest, followed)?;
                    records.push((u64::try_from(now).ok()?, runs));
                }
                _ => return None,
            }
        }
        Some((blocks, records))
    }
}

fn runs(mut bytes: &[u8], followed: u128) -> Option<Vec<PageRange>> {
    let (mut runs, mut end) = (Vec::new(), 0u128);
    while !bytes.is_empty() {
        let head = varint(&mut bytes)?;
        let pages = match head % 2 {
            0 => 1,
            _ => varint(&mut bytes)? + 2,
        };
        let first = end + head / 2;
        end = first + pages;
        if end > followed {
            return None;
        }
        let (first, pages) = (u64::try_from(first).ok()?, u64::try_from(pages).ok()?);
        runs.push(PageRange::new(first, pages));
    }
    Some(runs)
}

/// A number of up to 64 bits, seven in a byte.
fn varint(bytes: &mut &[u8]) -> Option<u128> {
    let mut number = 0;
    for at in 0..10 {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number += u128::from(byte % 0x80) << (7 * at);
        if *byte < 0x80 {
            return (number <= u64::MAX.into()).then_some(number);
        }
    }
    None
}
