//! Bugs around those who write guest memory and are no vCPUs.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use gleaner::{Error, PageRange, Start, VhostBackend, VhostLog};
use gleaner_bitmap::{
    BlockId, Collected, DirtySource, DirtyStore, Harvester, Layout, Rearm, Scope, WriteLog,
};
use vm_memory::bitmap::Bitmap;

use crate::Case;
use crate::world::{Found, World};

/// What the VMM itself writes is found, without anybody's help.
pub fn what_the_vmm_writes_is_found(case: Case) -> Found {
    let mut world = World::new(case);
    world.write_as_vmm(3);
    world.settle()
}

/// A mark past the end of its log is not ignored: the harvest fails, as long as a page may be missing.
pub fn a_mark_outside_its_log_fails_the_harvest(case: Case) -> Found {
    let mut world = World::new(case);
    // A region from before the memory grew.
    let old = world.ram.write_log().window(PageRange::new(0, 10)).unwrap();
    world.write_as_device(12);
    old.mark_dirty(12 << 12, 8);
    match world.tracker.harvest() {
        Err(Error::Bitmap(gleaner_bitmap::Error::MarkOutside { .. })) => Ok(()),
        other => {
            other.unwrap();
            world.settle()
        }
    }
}

/// The last harvest comes after every write that was under way when the guest was stopped.
pub fn the_last_harvest_waits_for_writes_under_way(case: Case) -> Found {
    let mut world = World::new(case);
    let writing = world.tracker.writers().enter();
    let quiet = world.tracker.writers().quiet(Duration::ZERO);
    if quiet.is_ok() {
        // Nobody writes any more, it says: the last harvest.
        world.copy();
    }
    world.write_as_vmm(3);
    drop(writing);
    match quiet {
        Ok(_) => world.compare(),
        Err(_) => world.settle(),
    }
}

/// A backend that a test plays.
struct Backend;

impl VhostBackend for Backend {
    fn stop(&mut self) -> Result<(), String> {
        Ok(())
    }

    fn set_log(&mut self, _: &File, _: u64) -> Result<(), String> {
        Ok(())
    }

    fn start(&mut self) {}
}

/// A device that goes leaves what it has written last.
pub fn a_device_that_goes_leaves_its_log_behind(case: Case) -> Found {
    let mut world = World::new(case);
    let log = VhostLog::new("nic", Backend, &world.tracker.layout()).unwrap();
    let bits = log.file().try_clone().unwrap();
    world.tracker.attach(Box::new(log)).unwrap();
    world.write_as_device(3);
    bits.write_all_at(&[1 << 3], 0).unwrap();
    world.tracker.detach("nic").unwrap();
    world.settle()
}

/// Nobody tracks a guest of which a device writes memory that it does not report.
pub fn a_device_that_reports_nothing_is_refused(case: Case) -> Found {
    let mut world = World::new(case);
    world.consumer = None;
    world.tracker.attach_unlogged("vdpa").unwrap();
    match world.tracker.consumer(Start::AllDirty) {
        Err(Error::UnloggedWriter { .. }) => return Ok(()),
        consumer => world.consumer = Some(consumer.unwrap()),
    }
    world.copy();
    world.write_as_device(3);
    world.settle()
}

/// Pages of the block that is written here.
const FEW: u64 = 16;
/// Words of a cache line, and lines of a page that are used.
const LINE: usize = 8;
const LINES: usize = 8;

/// A page that is written from its first line to its last. A write waits for lines that the other side has read, one after
/// the other: the last one can be seen long after whatever the writer looks at meanwhile.
struct Page([AtomicU64; LINE * LINES]);

impl Page {
    fn new() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }

    fn write(&self, value: u64) {
        let words = self.0.iter().step_by(LINE);
        words.for_each(|word| word.store(value, Ordering::Relaxed));
    }

    fn last_line(&self) -> u64 {
        self.0[LINE * (LINES - 1)].load(Ordering::Relaxed)
    }

    fn read(&self) {
        for word in self.0.iter().step_by(LINE) {
            std::hint::black_box(word.load(Ordering::Relaxed));
        }
    }
}

/// A block's log and its pages, which are read as soon as their bits are taken: later, less would be found.
struct ReadAtOnce<'a> {
    log: WriteLog,
    pages: &'a [Page],
    seen: Vec<u64>,
}

impl DirtySource for ReadAtOnce<'_> {
    fn name(&self) -> String {
        self.log.name()
    }

    fn collect(
        &mut self,
        layout: &Layout,
        scope: Scope<'_>,
        into: &mut Collected,
    ) -> gleaner_bitmap::Result<()> {
        let collected = self.log.collect(layout, scope, into);
        for (seen, page) in self.seen.iter_mut().zip(self.pages) {
            *seen = page.last_line();
        }
        self.pages.iter().for_each(Page::read);
        collected
    }

    fn rearm(&mut self) -> gleaner_bitmap::Result<Rearm> {
        self.log.rearm()
    }
}

/// Everything that was written before a harvest began is in the copy after it, whatever is being written meanwhile.
///
/// Writer and harvester have to meet within nanoseconds, each on a CPU of its own: the longer they try, the surer.
pub fn a_mark_is_never_older_than_its_write(case: Case) -> Found {
    let block = BlockId(0);
    let log = WriteLog::new(block, FEW);
    let pages: Vec<Page> = (0..FEW).map(|_| Page::new()).collect();
    let (store, mut harvester) = (Arc::new(DirtyStore::default()), Harvester::default());
    store.add_block(block, FEW);
    harvester.add_block(block, FEW);
    let consumer = store.consumer(Start::Empty);
    let layout = Layout::empty(1);
    let mut source = ReadAtOnce {
        log: log.clone(),
        pages: &pages,
        seen: vec![0; pages.len()],
    };
    let mut copy = vec![0; pages.len()];
    let (turns, over) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for turn in 0.. {
                let page = usize::try_from(turn % FEW).unwrap();
                // Twice: the second time the bit is likely to be set.
                for value in [turn / FEW * 2 + 1, turn / FEW * 2 + 2] {
                    pages[page].write(value);
                    log.mark_dirty(page << 12, 8);
                }
                turns.store(turn + 1, Ordering::Release);
                if over.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        let start = Instant::now();
        let mut found = Ok(());
        while found.is_ok() && start.elapsed() < case.patience {
            let turns = turns.load(Ordering::Acquire);
            let sources = [&mut source as &mut dyn DirtySource];
            let done = harvester.harvest(sources, &layout, Scope::All, &store);
            done.unwrap();
            while let Some(lease) = consumer.lease(FEW) {
                for range in lease.extents().iter().map(|e| e.range) {
                    for page in range.first..range.end() {
                        let page = usize::try_from(page).unwrap();
                        copy[page] = source.seen[page];
                    }
                }
                lease.ack();
            }
            let owed = |page| (turns + FEW - 1 - page) / FEW * 2;
            if (0..).zip(&copy).any(|(page, value)| *value < owed(page)) {
                found = Err(format!("lost one of {turns} writes"));
            }
        }
        over.store(true, Ordering::Relaxed);
        found
    })
}
