//! The VMM marks what it wrote while a harvest takes the marks: in every order that the memory model allows, the last
//! contents of a page are copied. Threads, atomics and the memory model are loom's:
//!
//! ```sh
//! RUSTFLAGS="--cfg loom" cargo test --release -p gleaner-bitmap --test loom_write_log --target-dir target/loom
//! ```
//!
//! Bounds: a log of one word or of two that share a flag; one writer of one page, or two writers of two pages in the same
//! word or in both; each writes once, over what was written and marked before or not; a harvest runs meanwhile, and one
//! after the writers have stopped. Within them every execution is tried, preemptions unlimited. Page contents are relaxed
//! atomics, so only the mark orders them. Stale loads are what store-load reordering looks like to another thread, and loom
//! has them. Where nothing was marked before, the flag that lets a harvest pass a clean line of the log is not set yet.
#![cfg(loom)]
#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::sync::Arc;
use std::sync::atomic::{AtomicU64 as Counter, Ordering};

use gleaner_bitmap::{
    BlockId, Consumer, DirtySource, DirtyStore, Harvester, Layout, PAGE_SIZE, Scope, Start,
    WriteLog,
};
use loom::sync::atomic::AtomicU64;
use vm_memory::bitmap::Bitmap;

const BLOCK: BlockId = BlockId(0);
const PAGES: usize = 2;

/// How a writer writes `value` to the page of this number.
type Write = fn(&WriteLog, &[AtomicU64; PAGES], Page, value: u64);

/// A page: which of those that are written, and where it is in the log.
#[derive(Clone, Copy)]
struct Page {
    index: usize,
    page: usize,
}

/// Pages `apart` pages apart.
fn written(writers: usize, apart: usize) -> impl Iterator<Item = Page> {
    (0..writers).map(move |index| Page {
        index,
        page: index * apart,
    })
}

fn mark_after(log: &WriteLog, memory: &[AtomicU64; PAGES], page: Page, value: u64) {
    memory[page.index].store(value, Ordering::Relaxed);
    log.mark_dirty(page.page * 4096, 1);
}

fn mark_before(log: &WriteLog, memory: &[AtomicU64; PAGES], page: Page, value: u64) {
    log.mark_dirty(page.page * 4096, 1);
    memory[page.index].store(value, Ordering::Relaxed);
}

fn load_first(log: &WriteLog, memory: &[AtomicU64; PAGES], page: Page, value: u64) {
    memory[page.index].store(value, Ordering::Relaxed);
    log.mark_dirty_load_first(page.page as u64 * PAGE_SIZE, 1);
}

/// The source side of a migration, and the destination's memory.
struct Migration {
    store: Arc<DirtyStore>,
    harvester: Harvester,
    sender: Consumer,
    copy: [u64; PAGES],
    apart: usize,
}

impl Migration {
    fn new(pages: u64, apart: usize) -> Self {
        let store = Arc::new(DirtyStore::default());
        let mut harvester = Harvester::default();
        store.add_block(BLOCK, pages);
        harvester.add_block(BLOCK, pages);
        Self {
            apart,
            sender: store.consumer(Start::Empty),
            store,
            harvester,
            copy: [0; PAGES],
        }
    }

    fn round(&mut self, log: &WriteLog, memory: &[AtomicU64; PAGES]) {
        let mut source = log.clone();
        let sources = [&mut source as &mut dyn DirtySource];
        let layout = Layout::empty(1);
        self.harvester
            .harvest(sources, &layout, Scope::All, &self.store)
            .unwrap();
        let Some(lease) = self.sender.lease(u64::MAX) else {
            return;
        };
        for range in lease.extents().iter().map(|extent| extent.range) {
            for page in range.first..range.end() {
                let index = usize::try_from(page).unwrap() / self.apart;
                self.copy[index] = memory[index].load(Ordering::Relaxed);
            }
        }
        lease.ack();
    }
}

/// Executions with `writers` writers, whose pages are `apart` pages apart, after which the copy differs from the memory.
/// `before` says whether they were written and marked before: there is a bit then that a writer must not trust.
fn losses(write: Write, writers: usize, apart: usize, before: bool) -> u64 {
    let losses = Arc::new(Counter::new(0));
    let lost = Arc::clone(&losses);
    loom::model(move || {
        let memory = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
        let pages = ((PAGES - 1) * apart + 1) as u64;
        let log = WriteLog::new(BLOCK, pages);
        let marked = if before { writers } else { 0 };
        written(marked, apart).for_each(|page| mark_after(&log, &memory, page, 1));
        let threads: Vec<_> = written(writers, apart)
            .map(|page| {
                let (memory, log) = (Arc::clone(&memory), log.clone());
                loom::thread::spawn(move || write(&log, &memory, page, 2))
            })
            .collect();
        let mut migration = Migration::new(pages, apart);
        migration.round(&log, &memory);
        threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
        migration.round(&log, &memory);
        if migration.copy[..writers].iter().any(|&page| page != 2) {
            lost.fetch_add(1, Ordering::Relaxed);
        }
    });
    losses.load(Ordering::Relaxed)
}

#[test]
fn no_write_is_lost_between_mark_and_take() {
    assert_eq!(losses(mark_after, 1, 1, true), 0);
}

#[test]
fn writers_of_one_word_lose_nothing_of_each_other() {
    assert_eq!(losses(mark_after, 2, 1, true), 0);
}

#[test]
fn writers_of_two_words_that_share_a_flag_lose_nothing_of_each_other() {
    assert_eq!(losses(mark_after, 2, 64, false), 0);
}

#[test]
fn the_first_marks_of_a_log_are_not_lost() {
    assert_eq!(losses(mark_after, 2, 1, false), 0);
}

#[test]
fn a_mark_that_tests_the_bit_first_loses_writes() {
    assert_ne!(losses(load_first, 1, 1, true), 0);
}

#[test]
fn a_mark_before_its_write_loses_writes() {
    assert_ne!(losses(mark_before, 1, 1, true), 0);
}
