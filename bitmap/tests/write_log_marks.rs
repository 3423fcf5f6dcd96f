//! What the VMM marks, through whatever window or slice of a window, is what the next harvest brings: all of it, once,
//! and nothing else.
#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::collections::BTreeSet;
use std::sync::Arc;

use gleaner_bitmap::{
    BlockId, DirtySource, DirtyStore, Error, Harvester, Layout, PAGE_SIZE, PageRange, Result,
    Scope, Start, WriteLog,
};
use proptest::prelude::*;
use vm_memory::bitmap::Bitmap;

const BLOCK: BlockId = BlockId(7);

/// Where a harvest's pages go.
struct Books {
    store: Arc<DirtyStore>,
    harvester: Harvester,
}

impl Books {
    fn empty() -> Self {
        Self {
            store: Arc::default(),
            harvester: Harvester::default(),
        }
    }

    fn of(pages: u64) -> Self {
        let mut books = Self::empty();
        books.add_block(pages);
        books
    }

    fn add_block(&mut self, pages: u64) {
        self.store.add_block(BLOCK, pages);
        self.harvester.add_block(BLOCK, pages);
    }

    fn harvest(&mut self, log: &WriteLog) -> Result<BTreeSet<u64>> {
        let consumer = self.store.consumer(Start::Empty);
        let mut source = log.clone();
        let sources = [&mut source as &mut dyn DirtySource];
        self.harvester
            .harvest(sources, &Layout::empty(1), Scope::All, &self.store)?;
        let lease = consumer.lease(u64::MAX);
        let extents = lease.iter().flat_map(|lease| lease.extents());
        Ok(extents.flat_map(|e| e.range.first..e.range.end()).collect())
    }
}

fn bytes(n: u64) -> usize {
    usize::try_from(n).unwrap()
}

/// Part `at` of `of`, in 256ths.
fn part(at: u8, of: u64) -> u64 {
    of * u64::from(at) / 256
}

proptest! {
    #[test]
    fn a_harvest_brings_exactly_the_pages_that_were_marked_through_any_window(
        // A few words; and more than the log keeps together.
        pages in prop_oneof![3 => 1u64..200, 1 => 32_700u64..66_000],
        marks in proptest::collection::vec((any::<[u8; 5]>(), 1u64..9000), 0..20),
    ) {
        let log = WriteLog::new(BLOCK, pages);
        let mut want = BTreeSet::new();
        for ([a, b, skip, at, odd], len) in marks {
            let (a, b) = (part(a, pages + 1), part(b, pages + 1));
            let range = PageRange::new(a.min(b), a.abs_diff(b));
            let window = log.window(range).unwrap();
            prop_assert_eq!((window.len(), window.is_empty()), (range.pages * PAGE_SIZE, range.pages == 0));
            let skip = part(skip, window.len()) + u64::from(odd);
            let slice = window.slice_at(bytes(skip));
            let room = window.len().saturating_sub(skip);
            let at = part(at, room);
            let len = len.min(room - at);
            slice.mark_dirty(bytes(at), bytes(len));
            if len > 0 {
                let first = range.first * PAGE_SIZE + skip + at;
                want.extend(first / PAGE_SIZE..=(first + len - 1) / PAGE_SIZE);
                prop_assert!(slice.dirty_at(bytes(at)) && slice.slice_at(bytes(at)).dirty_at(0));
                prop_assert!(slice.dirty_at(bytes(at + len - 1)));
            }
            prop_assert!(!slice.dirty_at(bytes(room)) && !window.dirty_at(bytes(window.len())), "past the end");
        }
        for page in 0..pages {
            prop_assert_eq!(log.dirty_at(bytes(page * PAGE_SIZE)), want.contains(&page));
            prop_assert_eq!(log.dirty_at(bytes(page * PAGE_SIZE + 4095)), want.contains(&page));
        }
        let mut books = Books::of(pages);
        prop_assert_eq!(books.harvest(&log).unwrap(), want);
        prop_assert_eq!(books.harvest(&log).unwrap(), BTreeSet::new());
    }
}

#[test]
fn marks_that_a_harvest_refused_are_brought_by_the_next_one() {
    let log = WriteLog::new(BLOCK, 70_000);
    let pages = BTreeSet::from([0, 63, 64, 40_000, 69_999]);
    for page in &pages {
        log.mark_dirty(bytes(page * PAGE_SIZE), 1);
    }
    let mut books = Books::empty();
    assert!(matches!(
        books.harvest(&log),
        Err(Error::UnknownBlock { block: BLOCK })
    ));
    books.add_block(70_000);
    assert_eq!(books.harvest(&log).unwrap(), pages);
}

#[test]
fn marks_that_were_forgotten_are_gone_and_later_ones_are_not() {
    let log = WriteLog::new(BLOCK, 100);
    log.mark_dirty(0, 4096 * 100);
    log.forget();
    log.mark_dirty(4096 * 99, 1);
    assert_eq!(Books::of(100).harvest(&log).unwrap(), BTreeSet::from([99]));
}

#[test]
fn a_window_reaches_to_the_last_page_and_not_past_it() {
    let log = WriteLog::new(BLOCK, 100);
    let window = log.window(PageRange::new(40, 60)).unwrap();
    assert_eq!(window.block(), BLOCK);
    assert!(window.name().contains("#7"), "messages say which block");
    assert!(window.window(PageRange::new(59, 1)).is_ok());
    assert!(matches!(
        window.window(PageRange::new(59, 2)),
        Err(Error::OutsideBlock { block: BLOCK, pages: 60, range }) if range == PageRange::new(59, 2)
    ));
    // The last byte of the window is inside, the one after it is not, and nor is one whose offset wraps.
    window.mark_dirty(4096 * 60 - 1, 1);
    assert_eq!(Books::of(100).harvest(&log).unwrap(), BTreeSet::from([99]));
    window.mark_dirty(usize::MAX, 2);
    assert!(matches!(
        Books::of(100).harvest(&log),
        Err(Error::MarkOutside {
            block: BLOCK,
            offset: u64::MAX,
            len: 2
        })
    ));
}
