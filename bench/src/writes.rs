//! The VMM's own writes: marking pages and taking the marks, beside `vm-memory`'s `AtomicBitmap`.

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::sync::{Arc, Barrier};
use std::time::Duration;

use gleaner::{PAGE_SIZE, Start, WriteLog};
use gleaner_bitmap::{
    BlockId, Consumer, DirtySource, DirtyStore, Harvester, Layout, PageRange, Scope,
};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};

use crate::kernels::random;
use crate::row::{Aim, Row};
use crate::sample::{Spread, median, ns, ratios, time, turn_about};
use crate::{Plan, Result};

/// Times faster than `get_and_reset` that a harvest of a clean log is to be.
const AIM_CLEAN: f64 = 8.0;
/// Times faster than `set_addr_range` that marking 1 GiB is to be.
const AIM_RANGE: f64 = 30.0;
/// A single page: no slower.
const AIM_PAGE: f64 = 1.0;
/// Of what as many threads could do if none disturbed the other.
const AIM_THREADS: f64 = 0.8;

const BLOCK: BlockId = BlockId(0);
/// Pages of 256 GiB.
const PAGES: u64 = 64 << 20;
/// Pages of 1 GiB.
const GIB: u64 = 1 << 18;

fn theirs(pages: u64) -> Result<AtomicBitmap> {
    let page = NonZeroUsize::new(PAGE_SIZE as usize).ok_or("no page size")?;
    Ok(AtomicBitmap::new(bytes(pages), page))
}

const fn bytes(pages: u64) -> usize {
    (pages * PAGE_SIZE) as usize
}

/// A write log, and where a harvest of it goes.
struct Ours {
    log: WriteLog,
    harvester: Harvester,
    store: Arc<DirtyStore>,
    consumer: Consumer,
    layout: Layout,
}

impl Ours {
    fn new(pages: u64) -> Self {
        let (store, mut harvester) = (Arc::<DirtyStore>::default(), Harvester::default());
        store.add_block(BLOCK, pages);
        harvester.add_block(BLOCK, pages);
        Self {
            log: WriteLog::new(BLOCK, pages),
            harvester,
            consumer: store.consumer(Start::Empty),
            store,
            layout: Layout::empty(1),
        }
    }

    /// Pages found.
    fn harvest(&mut self) -> Result<u64> {
        let sources = [&mut self.log as &mut dyn DirtySource];
        let report = self
            .harvester
            .harvest(sources, &self.layout, Scope::All, &self.store)?;
        Ok(report.pages)
    }

    /// A harvest's pages, in order.
    fn take(&mut self) -> Result<Vec<PageRange>> {
        self.harvest()?;
        let Some(lease) = self.consumer.lease(u64::MAX) else {
            return Ok(Vec::new());
        };
        let ranges = lease.extents().iter().map(|e| e.range).collect();
        lease.ack();
        Ok(ranges)
    }
}

/// The runs of set bits, bit by bit.
fn runs(words: &[u64]) -> Vec<PageRange> {
    let mut runs: Vec<PageRange> = Vec::new();
    for bit in
        (0..words.len() as u64 * 64).filter(|bit| words[(bit / 64) as usize] >> (bit % 64) & 1 == 1)
    {
        match runs.last_mut() {
            Some(last) if last.end() == bit => last.pages += 1,
            _ => runs.push(PageRange::new(bit, 1)),
        }
    }
    runs
}

/// Both have the same marks, and none afterwards.
fn same(name: &str, ours: &mut Ours, theirs: &AtomicBitmap) -> Result<()> {
    let (mine, others) = (ours.take()?, runs(&theirs.get_and_reset()));
    if mine.is_empty() || mine != others {
        return Err(format!(
            "{name}: {} runs of pages were marked here, {} there",
            mine.len(),
            others.len()
        )
        .into());
    }
    Ok(())
}

pub fn rows(plan: &Plan) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for touched in [false, true] {
        let name = format!("writes/clean/{}", if touched { "written" } else { "new" });
        if plan.wants(&name) {
            rows.push(clean(name, touched, plan)?);
        }
    }
    if plan.wants("writes/range-1G") {
        rows.push(range("writes/range-1G", plan)?);
    }
    for (label, spread) in [("hot", 64), ("random", PAGES)] {
        let name = format!("writes/page/{label}");
        if plan.wants(&name) {
            rows.push(page(name, spread, plan)?);
        }
    }
    if plan.wants("writes/threads") {
        rows.push(threads("writes/threads", plan)?);
    }
    Ok(rows)
}

/// A harvest that finds nothing: of a log in which nothing was ever marked, or all pages were.
fn clean(name: String, written: bool, plan: &Plan) -> Result<Row> {
    let pages = if plan.short { PAGES / 64 } else { PAGES };
    let (mut ours, theirs) = (Ours::new(pages), theirs(pages)?);
    if written {
        ours.log.mark_dirty(0, bytes(pages));
        theirs.set_addr_range(0, bytes(pages));
        same(&name, &mut ours, &theirs)?;
    }
    let pairs = turn_about(
        plan.pick(101, 3),
        || {
            let (took, words) = time(|| theirs.get_and_reset());
            if words.iter().any(|&word| word != 0) {
                return Err(crate::Error::from("a clean bitmap was not"));
            }
            Ok(took)
        },
        || {
            let (took, found) = time(|| ours.harvest());
            if found? != 0 {
                return Err("a clean log was not".into());
            }
            Ok(took)
        },
    )?;
    // What was measured still works.
    for page in [0, 1, pages / 3, pages - 1] {
        ours.log.mark_dirty(bytes(page), 1);
        theirs.set_addr_range(bytes(page), 1);
    }
    same(&name, &mut ours, &theirs)?;
    let us = |times: &mut dyn Iterator<Item = Duration>| median(times) * 1e6;
    let text = format!(
        "harvest of a clean log of 256 GiB, {}: {:.1} us; get_and_reset {:.0} us",
        if written {
            "all of which was written before"
        } else {
            "of which nothing was ever written"
        },
        us(&mut pairs.iter().map(|p| p.1)),
        us(&mut pairs.iter().map(|p| p.0)),
    );
    Ok(Row::new(
        name,
        Aim::AtLeast(AIM_CLEAN),
        ratios(&pairs),
        "times",
        text,
    ))
}

fn range(name: &str, plan: &Plan) -> Result<Row> {
    // From the middle of a word on, in a log whose pages were marked before.
    let (at, pages) = (37, GIB);
    let (mut ours, theirs) = (Ours::new(2 * GIB), theirs(2 * GIB)?);
    let pairs = turn_about::<crate::Error>(
        plan.pick(51, 3),
        || Ok(time(|| black_box(&theirs).set_addr_range(bytes(at), bytes(pages))).0),
        || Ok(time(|| black_box(&ours.log).mark_dirty(bytes(at), bytes(pages))).0),
    )?;
    same(name, &mut ours, &theirs)?;
    let text = format!(
        "marking 1 GiB: {:.1} us; set_addr_range {:.0} us",
        median(pairs.iter().map(|p| p.1)) * 1e6,
        median(pairs.iter().map(|p| p.0)) * 1e6,
    );
    Ok(Row::new(
        name,
        Aim::AtLeast(AIM_RANGE),
        ratios(&pairs),
        "times",
        text,
    ))
}

/// Single pages among the first `spread`.
fn page(name: String, spread: u64, plan: &Plan) -> Result<Row> {
    let (mut ours, theirs) = (Ours::new(PAGES), theirs(PAGES)?);
    let mut state = 0x9e37_79b9_7f4a_7c15;
    let writes: Vec<usize> = (0..plan.pick(1 << 16, 1 << 10))
        .map(|_| bytes(random(&mut state) % spread) + 8)
        .collect();
    let pairs = turn_about::<crate::Error>(
        plan.pick(101, 3),
        || {
            let mark = || writes.iter().for_each(|&at| theirs.mark_dirty(at, 8));
            Ok(time(mark).0)
        },
        || {
            let mark = || writes.iter().for_each(|&at| ours.log.mark_dirty(at, 8));
            Ok(time(mark).0)
        },
    )?;
    same(&name, &mut ours, &theirs)?;
    let each =
        |times: &mut dyn Iterator<Item = Duration>| median(times) * 1e9 / writes.len() as f64;
    let text = format!(
        "marking single pages among {}: {:.1} ns; set_addr_range {:.1} ns",
        if spread == PAGES {
            "256 GiB".into()
        } else {
            format!("{spread}")
        },
        each(&mut pairs.iter().map(|p| p.1)),
        each(&mut pairs.iter().map(|p| p.0)),
    );
    Ok(Row::new(
        name,
        Aim::AtLeast(AIM_PAGE),
        ratios(&pairs),
        "times",
        text,
    ))
}

/// As many threads as there are cores, each at random in pages of its own, beside one thread alone.
fn threads(name: &str, plan: &Plan) -> Result<Row> {
    let threads = std::thread::available_parallelism()?.get();
    let marks = plan.pick(1 << 20, 1 << 12);
    let mut ours = Ours::new(PAGES);
    let log = ours.log.clone();
    let run = |threads: usize| {
        let start = Barrier::new(threads);
        std::thread::scope(|scope| {
            let each: Vec<_> = (0..threads)
                .map(|n| {
                    let (start, log) = (&start, &log);
                    scope.spawn(move || {
                        let part = PAGES / threads as u64;
                        let mut state = 0x9e37_79b9_7f4a_7c15 + n as u64;
                        start.wait();
                        let mark = || {
                            for _ in 0..marks {
                                let page = n as u64 * part + random(&mut state) % part;
                                log.mark_dirty(bytes(page), 8);
                            }
                        };
                        time(mark).0
                    })
                })
                .collect();
            // Each marks as many pages, so the slowest one tells what all of them reached.
            let times = each.into_iter().map(|thread| thread.join().ok());
            times.collect::<Option<Vec<_>>>()
        })
        .and_then(|times| times.into_iter().max())
        .ok_or_else(|| crate::Error::from("a marking thread panicked"))
    };
    let pairs = turn_about(plan.pick(21, 2), || run(1), || run(threads))?;
    let marked: u64 = ours.take()?.iter().map(|range| range.pages).sum();
    if marked == 0 || marked > PAGES {
        return Err(format!("{name}: {marked} pages were marked").into());
    }
    let faster = |(one, all): &(Duration, Duration)| threads as f64 * ns(*one) / ns(*all);
    let text = format!(
        "{threads} threads that mark at once in 256 GiB, beside one: {:.1} ns a mark each, alone {:.1}",
        median(pairs.iter().map(|p| p.1)) * 1e9 / marks as f64,
        median(pairs.iter().map(|p| p.0)) * 1e9 / marks as f64,
    );
    Ok(Row::new(
        name,
        Aim::AtLeast(AIM_THREADS * threads as f64),
        Spread::of(pairs.iter().map(faster).collect()),
        "times",
        text,
    ))
}
