//! A guest of two virtual vCPUs that write wherever a schedule lets them, and the books on what is owed for it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gleaner_bitmap::{Layout, PAGE_SIZE, PageBitmap, PageRange, Runs};
use gleaner_ring::model::{
    Access, Fetched, ModelConfig, ModelKvm, Point, Schedule, State, StepVcpu,
};
use gleaner_ring::{Kick, Kvm, Mode, Region, Vcpu};

use crate::{Block, Result};

/// Pages that each vCPU writes at each moment.
const BURST: u32 = 64;

/// What vCPUs write, and what is owed for it: a page is owed from a write to it until its log is handed out, when a migration
/// would copy it.
pub(super) struct Writing {
    owed: PageBitmap,
    /// Where the block is in this process.
    base: u64,
    /// Where they write: guest-physical address, pages.
    pub(super) spots: Vec<(u64, u64)>,
    pub(super) missed: u64,
    random: u64,
}

impl Writing {
    /// Any of `count`, the same ones in each run.
    fn any(&mut self, count: u64) -> u64 {
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 24) % count
    }

    fn spot(&mut self) -> Option<u64> {
        let pages = self.spots.iter().map(|(_, pages)| pages).sum();
        let mut page = if pages == 0 { 0 } else { self.any(pages) };
        for (gpa, pages) in &self.spots {
            match page.checked_sub(*pages) {
                Some(further) => page = further,
                None => return Some(gpa + page * PAGE_SIZE),
            }
        }
        None
    }

    /// A vCPU writes to a page, if it can.
    fn write(&mut self, state: &mut State, vcpu: usize, gpa: u64) {
        // The page that is meant, before the fault: a mapping may be older than the list.
        let host = state.host_at(gpa);
        match state.touch(vcpu, gpa) {
            Access::Done(_) => {
                if let Some(host) = host {
                    self.owed.set((host - self.base) / PAGE_SIZE);
                }
            }
            Access::Missed => self.missed += 1,
            Access::Stalled | Access::RingFull => {}
        }
    }
}

/// Both vCPUs write at each moment at which they can.
struct Busy(Arc<Mutex<Writing>>);

impl Schedule for Busy {
    fn at(&mut self, _: Point, state: &mut State) {
        let mut writing = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for vcpu in (0..2)
            .filter(|vcpu| state.is_inside(*vcpu))
            .collect::<Vec<_>>()
        {
            for _ in 0..BURST {
                let Some(gpa) = writing.spot().filter(|_| !state.ring_full(vcpu)) else {
                    return;
                };
                writing.write(state, vcpu, gpa);
            }
        }
    }
}

/// The guest, and whoever tracks it.
pub(super) struct Guest {
    pub(super) kvm: ModelKvm,
    pub(super) vcpus: Vec<StepVcpu>,
    kicks: Vec<Box<dyn Kick>>,
    writing: Arc<Mutex<Writing>>,
    /// Pages fetched in this transaction.
    fetched: PageBitmap,
    base: u64,
}

impl Guest {
    pub(super) fn new(block: &Block, config: ModelConfig, mode: Mode) -> Result<Self> {
        let kvm = ModelKvm::new(config);
        kvm.enable(mode)?;
        let vcpu = || {
            kvm.step_vcpu().map_err(|source| crate::Error::Memory {
                block: block.info().name.clone(),
                source,
            })
        };
        let vcpus = vec![vcpu()?, vcpu()?];
        let kicks = vcpus.iter().filter_map(|v| v.kicker(0).ok()).collect();
        let base = block.host().addr();
        let writing = Arc::new(Mutex::new(Writing {
            owed: PageBitmap::new(block.info().pages),
            base,
            spots: Vec::new(),
            missed: 0,
            random: 1,
        }));
        kvm.set_schedule(Some(Box::new(Busy(Arc::clone(&writing)))));
        Ok(Self {
            kvm,
            vcpus,
            kicks,
            writing,
            fetched: PageBitmap::new(block.info().pages),
            base,
        })
    }

    fn books(&self) -> MutexGuard<'_, Writing> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn writing<T>(&self, look: impl FnOnce(&mut Writing) -> T) -> T {
        look(&mut self.books())
    }

    /// The vCPUs enter.
    pub(super) fn go(&self) {
        let mut state = self.kvm.state();
        for vcpu in &self.vcpus {
            state.enter(vcpu.index());
        }
    }

    /// The vCPUs are kicked out.
    pub(super) fn stop(&self) {
        self.kicks.iter().for_each(|kick| kick.interrupt());
    }

    /// Writes to so many pages of a layout, wherever they are.
    pub(super) fn write_at_random(&self, layout: &Layout, pages: u64) {
        let writable = layout.slots().filter(|s| !s.readonly);
        let mut books = self.books();
        books.spots = writable.map(|s| (s.gpa, s.range.pages)).collect();
        let mut state = self.kvm.state();
        for _ in 0..pages {
            if let Some(gpa) = books.spot() {
                books.write(&mut state, 0, gpa);
            }
        }
    }

    /// Each vCPU writes to all of these pages.
    pub(super) fn write_all(&self, gpa: u64, pages: u64) {
        let mut books = self.books();
        let mut state = self.kvm.state();
        for vcpu in 0..2 {
            for page in 0..pages {
                books.write(&mut state, vcpu, gpa + page * PAGE_SIZE);
            }
        }
    }

    /// Fetches a slot's log; its pages are handed out.
    pub(super) fn fetch(&mut self, region: &Region) -> Result<()> {
        let words = usize::try_from(region.pages().div_ceil(64)).unwrap_or(0);
        let mut words = vec![0; words];
        self.kvm.get_dirty_log(region.key, &mut words)?;
        self.hand_out(&Fetched {
            region: region.clone(),
            words,
        })
    }

    /// A log's pages are copied now: nothing is owed for them any more.
    pub(super) fn hand_out(&mut self, log: &Fetched) -> Result<()> {
        let first = self.page_of(&log.region);
        let pages = log.region.pages();
        let range = PageRange::new(first, pages);
        self.fetched.or_words_at(range, &log.words, 0)?;
        let mut books = self.books();
        for run in Runs::new(&log.words, 0, pages) {
            let pages = PageRange::new(first + run.first, run.pages);
            books.owed.clear_range(pages);
        }
        Ok(())
    }

    /// A page of a slot is copied now.
    pub(super) fn hand_out_page(&self, region: &Region, page: u64) {
        // What an entry says that was misread may lie outside.
        if page < region.pages() {
            let page = PageRange::new(self.page_of(region) + page, 1);
            self.books().owed.clear_range(page);
        }
    }

    /// The page of the block that a slot begins with.
    fn page_of(&self, region: &Region) -> u64 {
        (region.host.addr() - self.base) / PAGE_SIZE
    }

    /// How many pages were fetched that a layout maps; and forgets them.
    pub(super) fn take_fetched(&mut self, layout: &Layout) -> u64 {
        let mut mapped = PageBitmap::new(self.fetched.pages());
        layout.slots().for_each(|s| mapped.set_range(s.range));
        let both = self.fetched.words().iter().zip(mapped.words());
        let carried = both.map(|(a, b)| u64::from((a & b).count_ones())).sum();
        self.fetched.clear();
        carried
    }

    /// The guest stops for good and is harvested for the last time: pages that are still owed then, which nobody will ever
    /// copy.
    pub(super) fn lost(&mut self, slots: &[Region]) -> Result<u64> {
        self.stop();
        for slot in slots.iter().filter(|slot| slot.log) {
            self.fetch(slot)?;
        }
        Ok(self.owed())
    }

    pub(super) fn owed(&self) -> u64 {
        self.books().owed.count()
    }
}
