//! A trace is what was written, whole or cut; nothing else is taken for one.
#![allow(clippy::unwrap_used)] // helpers are not known to be tests

use std::collections::BTreeSet;
use std::time::Duration;

use gleaner_bitmap::PageRange;
use proptest::prelude::*;

use super::*;
use crate::Error;

/// Blocks of these sizes, and for each record the microseconds after the one before and (block, first, pages).
type Told = (Vec<u64>, Vec<(u64, Vec<(usize, u64, u64)>)>);

fn told() -> impl Strategy<Value = Told> {
    let sizes = proptest::collection::vec(1u64..3000, 1..4);
    let extents = proptest::collection::vec((0usize..4, 0u64..3000, 1u64..200), 0..20);
    let records = proptest::collection::vec((1u64..1_000_000, extents), 0..12);
    (sizes, records).prop_map(|(sizes, mut records)| {
        for (block, first, pages) in records.iter_mut().flat_map(|(_, extents)| extents) {
            *block %= sizes.len();
            *first %= sizes[*block];
            *pages = (*pages).min(sizes[*block] - *first);
        }
        (sizes, records)
    })
}

/// The file with so many of the records.
fn written((sizes, records): &Told, followed: Followed, count: usize) -> Vec<u8> {
    let mut file = Vec::new();
    let mut now = 0;
    let mut writer = TraceWriter::new(&mut file, followed).unwrap();
    for (n, pages) in sizes.iter().enumerate() {
        assert_eq!(writer.block(&format!("block{n}"), *pages).unwrap(), n);
    }
    for (passed, extents) in &records[..count] {
        now += passed;
        for (block, first, pages) in extents {
            writer.dirtied(*block, PageRange::new(*first, *pages));
        }
        writer.record(Duration::from_micros(now)).unwrap();
    }
    file
}

/// The whole file, and where the records end.
fn write(told: &Told, followed: Followed) -> (Vec<u8>, Vec<usize>) {
    let count = told.1.len();
    let ends = (0..=count).map(|n| written(told, followed, n).len());
    (written(told, followed, count), ends.collect())
}

/// Pages of all blocks, each block after the other, as a record has them when every page is followed.
fn expected(sizes: &[u64], extents: &[(usize, u64, u64)]) -> Vec<u64> {
    let pages = extents.iter().flat_map(|(block, first, pages)| {
        let start: u64 = sizes[..*block].iter().sum();
        start + first..start + first + pages
    });
    pages.collect::<BTreeSet<_>>().into_iter().collect()
}

fn found(trace: &Trace, record: &TraceRecord) -> Vec<u64> {
    trace
        .runs(record)
        .flat_map(|run| run.first..run.end())
        .collect()
}

proptest! {
    #[test]
    fn a_trace_comes_back_as_it_was_written(told in told()) {
        let (file, _) = write(&told, Followed::ALL);
        let trace = Trace::read(&file[..]).unwrap();
        let (sizes, records) = &told;
        prop_assert_eq!(trace.blocks().iter().map(|block| block.pages).collect::<Vec<_>>(), sizes.clone());
        prop_assert_eq!(&trace.blocks()[0].name, "block0");
        prop_assert_eq!(trace.records().len(), records.len());
        let mut now = 0;
        for ((passed, extents), record) in records.iter().zip(trace.records()) {
            now += passed;
            let pages = expected(sizes, extents);
            prop_assert_eq!((record.until, record.pages), (now, pages.len() as u64));
            prop_assert_eq!(found(&trace, record), pages);
        }
        prop_assert_eq!(trace.cut(), None);
    }

    #[test]
    fn a_trace_that_is_cut_anywhere_is_read_up_to_its_last_whole_record(told in told(), at in any::<prop::sample::Index>()) {
        let (file, ends) = write(&told, Followed::ALL);
        let length = at.index(file.len() + 1);
        let read = Trace::read(&file[..length]);
        if length < HEADER {
            prop_assert!(read.is_err());
            return Ok(());
        }
        let trace = read.unwrap();
        let whole = ends.iter().filter(|end| **end <= length).count().saturating_sub(1);
        prop_assert_eq!(trace.records().len(), whole);
        let all = Trace::read(&file[..]).unwrap();
        for (a, b) in trace.records().iter().zip(all.records()) {
            prop_assert_eq!(found(&trace, a), found(&all, b));
        }
        if ends.contains(&length) {
            prop_assert_eq!(trace.cut(), None);
        }
        if length < file.len() && length > ends[0] && !ends.contains(&length) {
            prop_assert_eq!(trace.cut(), Some(ends[whole] as u64));
        }
    }

    #[test]
    fn a_changed_bit_is_noticed_or_leaves_out_the_end(told in told(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let (mut file, _) = write(&told, Followed::ALL);
        let all = Trace::read(&file[..]).unwrap();
        let at = at.index(file.len());
        file[at] ^= 1 << bit;
        match Trace::read(&file[..]) {
            // A length that reaches past the end looks like a cut.
            Ok(trace) => prop_assert!(trace.cut().is_some() && trace.records().len() < all.records().len().max(1)),
            Err(Error::NotATrace | Error::TraceVersion { .. } | Error::DamagedTrace { .. }) => {}
            Err(other) => prop_assert!(false, "{}", other),
        }
    }

    #[test]
    fn any_bytes_behind_any_header_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300), whole in any::<bool>()) {
        let mut file = Vec::new();
        let _ = TraceWriter::new(&mut file, Followed::ALL).unwrap();
        if whole {
            // Behind a checksum that fits, so that what lies inside is looked at.
            for body in bytes.chunks(20) {
                varint::put(&mut file, body.len() as u64);
                file.extend(body);
                file.extend(crc32fast::hash(body).to_le_bytes());
            }
        } else {
            file.extend(bytes);
        }
        if let Ok(trace) = Trace::read(&file[..]) {
            let pages = trace.followed_pages();
            for record in trace.records() {
                prop_assert!(trace.runs(record).all(|run| run.end() <= pages));
            }
        }
    }

    #[test]
    fn of_a_large_guest_a_page_in_each_group_stands_for_it(told in told(), shift in 1u8..5) {
        let followed = Followed::one_of(shift).unwrap();
        let (file, _) = write(&told, followed);
        let trace = Trace::read(&file[..]).unwrap();
        let (sizes, records) = &told;
        for ((_, extents), record) in records.iter().zip(trace.records()) {
            let mut pages = BTreeSet::new();
            let mut start = 0;
            for (block, size) in sizes.iter().enumerate() {
                let of_block = extents.iter().filter(|extent| extent.0 == block);
                for (_, first, length) in of_block {
                    let groups = followed.among(PageRange::new(*first, *length), *size);
                    pages.extend(start + groups.first..start + groups.end());
                }
                start += followed.count(*size);
            }
            prop_assert_eq!(found(&trace, record), pages.into_iter().collect::<Vec<_>>());
        }
        prop_assert_eq!(trace.total_pages(), sizes.iter().sum::<u64>());
    }
}

fn refusal(file: &[u8]) -> String {
    Trace::read(file).unwrap_err().to_string()
}

fn framed(body: &[u8]) -> Vec<u8> {
    let mut file = Vec::new();
    let _ = TraceWriter::new(&mut file, Followed::ALL).unwrap();
    varint::put(&mut file, body.len() as u64);
    file.extend(body);
    file.extend(crc32fast::hash(body).to_le_bytes());
    file
}

#[test]
fn a_trace_from_the_future_is_told_from_one_that_is_damaged() {
    let mut file = framed(&[BLOCK, 5]);
    file[8] = 2;
    assert_eq!(
        refusal(&file),
        "the trace has version 2, this release reads 1: use the release that wrote it"
    );
    assert!(refusal(b"{\"kind\":\"start\"}").starts_with("not a trace"));
    assert!(refusal(b"").starts_with("not a trace"));
    assert!(refusal(&MAGIC).contains("ends within its header"));
}

#[test]
fn what_claims_more_than_there_can_be_is_refused_before_memory_is_taken() {
    let mut endless = framed(&[BLOCK, 5]);
    varint::put(&mut endless, u64::MAX);
    assert!(refusal(&endless).contains("impossible length"));
    let mut long = framed(&[BLOCK, 5]);
    varint::put(&mut long, MOST_BODY);
    assert!(Trace::read(&long[..]).unwrap().cut().is_some());
    let mut huge = vec![BLOCK];
    varint::put(&mut huge, MOST_FOLLOWED + 1);
    assert!(refusal(&framed(&huge)).contains("more memory"));
    let mut old = vec![DIRTIED];
    varint::put(&mut old, 1 << 52);
    assert!(refusal(&framed(&old)).contains("hundred years"));
    // Page 0 of no block.
    assert!(refusal(&framed(&[DIRTIED, 1, 0])).contains("no block has"));
    assert!(refusal(&framed(&[9])).contains("unknown kind"));
}

#[test]
fn a_writer_that_is_told_too_much_says_so() {
    let mut file = Vec::new();
    let mut writer = TraceWriter::new(&mut file, Followed::ALL).unwrap();
    assert!(matches!(
        writer.block("ram", MOST_FOLLOWED + 1),
        Err(Error::TooLong { .. })
    ));
    writer.block(&"ü".repeat(200), 5).unwrap();
    let trace = Trace::read(&file[..]).unwrap();
    assert_eq!(trace.blocks()[0].name, "ü".repeat(127));
}
