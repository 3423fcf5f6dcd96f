//! A bitmap is a set of pages: whatever is done to it by words, at any shift and any length, is what is done to the set.
#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::collections::BTreeSet;

use gleaner_bitmap::{Error, PageBitmap, PageRange};
use proptest::prelude::*;

type Set = BTreeSet<u64>;

/// Several words, with and without a tail.
fn lengths() -> impl Strategy<Value = u64> {
    prop_oneof![3 => 0u64..400, 1 => (0u64..7).prop_map(|words| words * 64)]
}

fn bitmap(pages: u64, set: &Set) -> PageBitmap {
    let mut map = PageBitmap::new(pages);
    set.iter().for_each(|&page| map.set(page));
    map
}

/// The bitmap's pages, bit by bit; no bit lies past the last page.
fn set(map: &PageBitmap) -> Set {
    let words = map.words();
    assert_eq!(words.len() as u64, map.pages().div_ceil(64));
    let all = (0..words.len() * 64).filter(|bit| words[bit / 64] >> (bit % 64) & 1 == 1);
    let all: Set = all.map(|bit| bit as u64).collect();
    assert!(all.iter().all(|&page| page < map.pages()));
    assert!((0..map.pages()).all(|page| map.get(page) == all.contains(&page)));
    assert_eq!(all.len() as u64, map.count());
    all
}

fn within(set: &Set, range: PageRange) -> Set {
    set.range(range.first..range.end()).copied().collect()
}

/// Runs and single pages among `pages` pages.
fn sets(pages: u64) -> impl Strategy<Value = Set> {
    proptest::collection::vec((0..pages.max(1), 1u64..100), 0..12).prop_map(move |runs| {
        let runs = runs.into_iter();
        runs.flat_map(|(first, n)| first..(first + n).min(pages))
            .collect()
    })
}

fn ranges(pages: u64) -> impl Strategy<Value = PageRange> {
    let any = (0..=pages, 0..=pages);
    prop_oneof![
        4 => any.prop_map(|(a, b)| PageRange::new(a.min(b), a.abs_diff(b))),
        1 => Just(PageRange::new(0, pages)),
    ]
}

/// A length, sets of that many pages, and a range of them.
fn three() -> impl Strategy<Value = (u64, [Set; 3], PageRange)> {
    lengths().prop_flat_map(|n| (Just(n), [sets(n), sets(n), sets(n)], ranges(n)))
}

fn or(a: &PageBitmap, b: &PageBitmap) -> PageBitmap {
    let mut both = a.clone();
    both.or(b).unwrap();
    both
}

proptest! {
    #[test]
    fn or_is_the_union_it_commutes_associates_and_repeats((n, [a, b, c], _) in three()) {
        let [x, y, z] = [&a, &b, &c].map(|set| bitmap(n, set));
        prop_assert_eq!(set(&or(&x, &y)), &a | &b);
        prop_assert_eq!(or(&x, &y), or(&y, &x));
        prop_assert_eq!(or(&or(&x, &y), &z), or(&x, &or(&y, &z)));
        prop_assert_eq!(or(&x, &x), x.clone());
        prop_assert_eq!(or(&x, &PageBitmap::new(n)), x);
        prop_assert_eq!(or(&y, &PageBitmap::all_set(n)), PageBitmap::all_set(n));
    }

    #[test]
    fn a_slice_is_the_range_moved_to_zero_and_slices_of_a_union_are_the_union_of_slices(
        (n, [a, b, _], range) in three(),
    ) {
        let (x, y) = (bitmap(n, &a), bitmap(n, &b));
        let part = x.slice(range);
        prop_assert_eq!(part.pages(), range.pages);
        prop_assert_eq!(set(&part), within(&a, range).iter().map(|page| page - range.first).collect::<Set>());
        prop_assert_eq!(or(&x, &y).slice(range), or(&part, &y.slice(range)));
    }

    #[test]
    fn a_slice_put_back_changes_nothing_and_put_elsewhere_is_the_range((n, [a, b, _], range) in three()) {
        let part = bitmap(n, &a).slice(range);
        let mut same = bitmap(n, &a);
        same.or_words_at(range, part.words(), 0).unwrap();
        prop_assert_eq!(set(&same), a.clone());
        let mut other = bitmap(n, &b);
        other.or_words_at(range, part.words(), 0).unwrap();
        prop_assert_eq!(set(&other), &b | &within(&a, range));
    }

    #[test]
    fn setting_a_range_is_union_and_clearing_it_is_difference((n, [a, _, _], range) in three()) {
        let all: Set = (range.first..range.end()).collect();
        let mut map = bitmap(n, &a);
        map.set_range(range);
        prop_assert_eq!(set(&map), &a | &all);
        map.clear_range(range);
        prop_assert_eq!(set(&map), &a - &all);
        map.clear();
        prop_assert_eq!(map, PageBitmap::new(n));
    }

    #[test]
    fn counts_and_runs_name_the_set((n, [a, _, _], range) in three()) {
        let map = bitmap(n, &a);
        let want = within(&a, range);
        prop_assert_eq!(map.count_range(range), want.len() as u64);
        let runs: Vec<PageRange> = map.runs_in(range).collect();
        prop_assert_eq!(runs.iter().flat_map(|run| run.first..run.end()).collect::<Set>(), want);
        prop_assert_eq!(runs.iter().map(|run| run.pages).sum::<u64>(), map.count_range(range));
        prop_assert_eq!(map.runs().collect::<Vec<_>>(), map.runs_in(PageRange::new(0, n)).collect::<Vec<_>>());
    }

    #[test]
    fn words_come_in_at_any_shift_and_never_leave_their_range(
        (n, [a, _, _], range) in three(),
        words in proptest::collection::vec(any::<u64>(), 0..10), from in 0u64..200,
    ) {
        let mut map = bitmap(n, &a);
        let outcome = map.or_words_at(range, &words, from);
        if from + range.pages > words.len() as u64 * 64 {
            let refused = matches!(outcome, Err(Error::LengthMismatch { .. }));
            prop_assert!(refused, "{:?}", outcome);
            prop_assert_eq!(set(&map), a);
        } else {
            outcome.unwrap();
            let bit = |at: u64| words[usize::try_from(at / 64).unwrap()] >> (at % 64) & 1 == 1;
            let came: Set = (range.first..range.end()).filter(|page| bit(from + page - range.first)).collect();
            prop_assert_eq!(set(&map), &a | &came);
        }
    }

    #[test]
    fn lengths_that_differ_are_refused_and_nothing_changes(
        (n, [a, _, _], range) in three(), more in 1u64..130,
    ) {
        let mut map = bitmap(n, &a);
        let longer = PageBitmap::all_set(n + more);
        let refused = matches!(map.or(&longer), Err(Error::LengthMismatch { left, right }) if (left, right) == (n, n + more));
        prop_assert!(refused);
        let mut longer = PageBitmap::new(n + more);
        prop_assert!(longer.or(&PageBitmap::all_set(n)).is_err());
        prop_assert_eq!(longer.count(), 0);
        // Words enough, but the range reaches past the last page.
        let past = PageRange::new(range.first, n - range.first + more);
        prop_assert!(map.or_words_at(past, &[u64::MAX; 16], 0).is_err());
        prop_assert!(map.or_words_at(PageRange::new(range.first, u64::MAX), &[u64::MAX; 16], 1).is_err());
        prop_assert_eq!(set(&map), a);
    }

    #[test]
    fn words_as_kvm_fills_them_lose_only_the_bits_past_the_last_page(
        n in lengths(), words in proptest::collection::vec(any::<u64>(), 0..10),
    ) {
        match PageBitmap::from_words(n, &words) {
            Ok(map) => {
                prop_assert_eq!(words.len() as u64, n.div_ceil(64));
                let bit = |at: u64| words[usize::try_from(at / 64).unwrap()] >> (at % 64) & 1 == 1;
                prop_assert_eq!(set(&map), (0..n).filter(|&page| bit(page)).collect::<Set>());
            }
            Err(Error::LengthMismatch { left, right }) => {
                prop_assert_ne!(words.len() as u64, n.div_ceil(64));
                prop_assert_eq!((left, right), (n, words.len() as u64 * 64));
            }
            Err(error) => prop_assert!(false, "{error}"),
        }
    }
}

#[test]
fn a_range_past_the_last_page_panics_even_where_the_last_word_has_room() {
    let range = PageRange::new(60, 4);
    let uses: [fn(&mut PageBitmap, PageRange); 5] = [
        |map, range| map.set_range(range),
        |map, range| map.clear_range(range),
        |map, range| _ = map.count_range(range),
        |map, range| drop(map.slice(range)),
        |map, range| drop(map.runs_in(range)),
    ];
    for (n, each) in uses.into_iter().enumerate() {
        each(&mut PageBitmap::new(64), range);
        let outcome = std::panic::catch_unwind(|| each(&mut PageBitmap::new(62), range));
        assert!(outcome.is_err(), "use {n}");
    }
}

#[test]
fn the_laws_hold_where_the_work_is_shared_out_among_threads() {
    // More words than are shared out, a tail, and a shift; every 97th page.
    let n = 64 * 70_001 + 13;
    let every = |by: u64| -> Set { (0..n).filter(|page| page % by == 0).collect() };
    let (a, b) = (every(97), every(89));
    let (x, y) = (bitmap(n, &a), bitmap(n, &b));
    let range = PageRange::new(51, n - 51);
    let part = x.slice(range);
    assert_eq!(
        set(&part),
        a.range(51..).map(|page| page - 51).collect::<Set>()
    );
    let mut back = y.clone();
    back.or_words_at(range, part.words(), 0).unwrap();
    assert_eq!(set(&back), &b | &within(&a, range));
    back.or_words_at(PageRange::new(0, n), x.words(), 0)
        .unwrap();
    assert_eq!(back, or(&x, &y));
    assert_eq!(back, or(&y, &x));
}
