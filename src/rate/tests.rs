//! What looks add up to.

#![allow(clippy::unwrap_used)] // helpers are not known to be tests

use std::time::Duration;

use gleaner_bitmap::{BlockId, BlockInfo, Extent, PAGE_SIZE};

use super::{Findings, Look, Measurement, Report};

const RAM: BlockId = BlockId(3);
const PLUGGED: BlockId = BlockId(7);

fn info(id: BlockId, name: &str, pages: u64) -> BlockInfo {
    BlockInfo::new(id, name, pages * PAGE_SIZE).unwrap()
}

/// The look `number`, of every 50 ms, with these (block, first page, pages) in it.
fn look(number: u32, written: &[(BlockId, u64, u64)]) -> Look {
    let extent = |&(block, first, pages)| Extent::new(block, first, pages);
    Look {
        at: Duration::from_millis(50) * number,
        harvest: Duration::from_millis(number.into()),
        written: written.iter().map(extent).collect(),
        ..Look::default()
    }
}

/// Windows of 100 ms.
fn measured(looks: &[Look]) -> Measurement {
    let mut measured = Measurement::new(Duration::from_millis(100));
    for look in looks {
        measured.add(look).unwrap();
    }
    measured
}

fn first(written: &[(BlockId, u64, u64)]) -> Look {
    Look {
        blocks: vec![info(RAM, "ram", 1000), info(PLUGGED, "dimm", 100)],
        ..look(1, written)
    }
}

fn bytes_a_second(pages: f64, seconds: f64) -> f64 {
    pages * PAGE_SIZE as f64 / seconds
}

fn near(found: f64, expected: f64) {
    assert!(
        (found / expected - 1.0).abs() < 1e-9,
        "{found}, not {expected}"
    );
}

#[test]
fn a_window_counts_a_page_once_and_the_next_one_again() {
    let measured = measured(&[
        first(&[(RAM, 0, 10)]),
        look(2, &[(RAM, 5, 10), (PLUGGED, 0, 1)]), // 15 and 1
        look(3, &[(RAM, 0, 10)]),
        look(4, &[(RAM, 0, 20)]),   // 20
        look(5, &[(RAM, 990, 10)]), // of no window that is over
    ]);
    let report = measured.report();
    assert_eq!(report.unique_pages, 31);
    let windows = report.windows.bytes_per_second;
    assert_eq!(windows.samples, 2);
    near(report.dirty_bytes_per_second, bytes_a_second(18.0, 0.1));
    near(windows.low, bytes_a_second(16.0, 0.1));
    near(windows.high, bytes_a_second(20.0, 0.1));
    near(windows.deviation(), bytes_a_second(8f64.sqrt(), 0.1));
    let [ram, dimm] = &report.blocks[..] else {
        panic!("{report:?}");
    };
    assert_eq!((&*ram.name, ram.unique_pages), ("ram", 30));
    near(ram.dirty_bytes_per_second, bytes_a_second(17.5, 0.1));
    near(dimm.dirty_bytes_per_second, bytes_a_second(0.5, 0.1));
    assert_eq!(measured.latest().unwrap().end, Duration::from_millis(200));
    // 1 to 5 ms in 250.
    assert_eq!(report.harvests.unwrap().longest_ms, 5.0);
    near(report.harvests.unwrap().most_stall, 0.06);
    assert_eq!(
        report.harvests.unwrap().rearmed_pages,
        10 + 11 + 10 + 20 + 10
    );
}

#[test]
fn looks_that_come_late_make_no_window_fewer() {
    let late = |n: u32| Look {
        at: Duration::from_millis(50) * n + Duration::from_millis(7) * (n % 3),
        ..if n == 1 { first(&[]) } else { look(n, &[]) }
    };
    let looks: Vec<_> = (1..=20).map(late).collect();
    let mut measured = Measurement::new(Duration::from_millis(200));
    for look in &looks {
        measured.add(look).unwrap();
    }
    assert_eq!(measured.report().windows.bytes_per_second.samples, 5);
}

#[test]
fn where_no_window_is_over_the_whole_time_is_one() {
    let report = measured(&[first(&[(RAM, 0, 7)])]).report();
    near(report.dirty_bytes_per_second, bytes_a_second(7.0, 0.05));
    near(
        report.blocks[0].dirty_bytes_per_second,
        bytes_a_second(7.0, 0.05),
    );
}

#[test]
fn the_last_point_of_the_curve_is_the_whole_time() {
    let looks = [
        first(&[(RAM, 0, 4)]),
        look(2, &[(RAM, 2, 4)]),
        look(3, &[(RAM, 0, 4)]),
    ];
    let curve = measured(&looks).report().curve;
    let points: Vec<_> = curve.iter().map(|p| (p.ms, p.pages, p.samples)).collect();
    assert_eq!(points, [(50.0, 4.0, 3), (100.0, 6.0, 2), (150.0, 6.0, 1)]);
}

#[test]
fn what_was_written_to_a_block_that_goes_stays_counted() {
    let gone = Look {
        gone: vec![PLUGGED],
        ..look(2, &[(PLUGGED, 10, 5), (RAM, 0, 1)])
    };
    let report = measured(&[first(&[(PLUGGED, 0, 5)]), gone, look(3, &[])]).report();
    assert_eq!((report.unique_pages, report.unique_pages_gone), (11, 10));
    near(report.dirty_bytes_per_second, bytes_a_second(11.0, 0.1));
    assert_eq!((report.blocks.len(), report.guest_pages), (1, 1000));
    assert!(report.hottest.iter().all(|region| region.block == "ram"));
}

#[test]
fn the_hottest_regions_are_those_that_are_written_most() {
    let report: Report = measured(&[
        first(&[(RAM, 0, 3), (RAM, 960, 40)]),
        look(2, &[(RAM, 970, 1), (PLUGGED, 64, 36)]),
    ])
    .report();
    let hot = report.hottest.iter();
    let hot: Vec<_> = hot
        .map(|h| {
            (
                &*h.block,
                h.first_page,
                h.pages,
                h.unique_pages,
                h.pages_seen,
            )
        })
        .collect();
    let expected = [
        ("ram", 960, 40, 40, 41),
        ("dimm", 64, 36, 36, 36),
        ("ram", 0, 64, 3, 3),
    ];
    assert_eq!(hot, expected);
}

#[test]
fn looks_that_can_not_be_are_refused() {
    let with = |blocks| Look {
        blocks,
        ..look(2, &[])
    };
    for (what, bad) in [
        ("outside", look(2, &[(RAM, 999, 2)])),
        ("outside", look(2, &[(RAM, u64::MAX, u64::MAX)])),
        ("not named", look(2, &[(BlockId(9), 0, 1)])),
        ("before", look(0, &[])),
        ("twice", with(vec![info(RAM, "ram", 1)])),
        ("more than", with(vec![info(BlockId(8), "x", 1 << 33)])),
        (
            "name",
            with(vec![BlockInfo {
                id: BlockId(8),
                name: "a\nb".into(),
                pages: 1,
            }]),
        ),
    ] {
        let mut measured = measured(&[first(&[])]);
        let said = measured.add(&bad).unwrap_err().to_string();
        assert!(said.contains(what), "{what}: {said}");
        assert!(!said.contains('\n'), "{said}");
    }
}
