//! A small world in which everything happens in one order: a virtual machine of the model's with a vCPU that no thread
//! runs, its tracker, and a destination's copy of its memory.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use gleaner::gate::Seat;
use gleaner::model::{Access, ModelConfig, ModelKvm, Point, Schedule, State, StepVcpu};
use gleaner::{Block, Consumer, PAGE_SIZE, SlotKey, Start, Tracker};
use vm_memory::{Bytes, GuestAddress, VolatileMemory};

use crate::Case;
use crate::common::Copy;

/// Pages of the block: at guest-physical address 0, in slots 1 and 2, half in each.
pub const PAGES: u64 = 2 * HALF;
/// Pages of a slot. More than KVM takes in one go, so that vCPUs may run while a slot's bitmap is being taken.
pub const HALF: u64 = 18 * 64;

/// What a killer found: nothing, or what is wrong.
pub type Found = Result<(), String>;

pub struct World {
    pub kvm: ModelKvm,
    pub tracker: Tracker,
    pub ram: Block,
    /// Whose leases the copy is made of; `None` once a test has sent it away.
    pub consumer: Option<Consumer>,
    pub copy: Copy,
    vcpu: StepVcpu,
    seat: Seat,
}

/// Never the same value twice.
pub fn stamp() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl World {
    /// The guest has written all its memory, the destination has all of it, and every page is armed.
    pub fn new(case: Case) -> Self {
        Self::with(
            case,
            ModelConfig {
                bug: case.bug,
                ..ModelConfig::default()
            },
        )
    }

    pub fn with(case: Case, config: ModelConfig) -> Self {
        let kvm = ModelKvm::new(config);
        let tracker = Tracker::on(Arc::new(kvm.clone()))
            .tracking(case.tracking)
            .without_reaper()
            .build()
            .unwrap();
        let ram = Block::memfd("ram", PAGES * PAGE_SIZE).unwrap();
        let mut tx = tracker.transaction();
        tx.add_block(&ram)
            .create(1, GuestAddress(0), ram.extent(ram.info().all()))
            .split(1, HALF, 2);
        tx.commit().unwrap();
        let vcpu = kvm.step_vcpu().unwrap();
        let seat = tracker.register(&vcpu, 0).unwrap();
        let mut world = Self {
            kvm,
            tracker,
            ram,
            consumer: None,
            copy: Copy::default(),
            vcpu,
            seat,
        };
        for page in 0..PAGES {
            world.write(page);
        }
        world.track();
        world
    }

    /// Begins to track, and copies everything.
    pub fn track(&mut self) {
        self.consumer = Some(self.tracker.consumer(Start::AllDirty).unwrap());
        self.copy();
    }

    /// The vCPU is in `KVM_RUN` from here until it is kicked out.
    fn enter(&self) {
        let vcpu = self.vcpu.index();
        if !self.kvm.state().is_inside(vcpu) {
            assert!(self.seat.step_in(), "the gate is closed");
            assert!(self.kvm.state().enter(vcpu), "the ring is full");
        }
    }

    /// The guest writes a page.
    pub fn write(&mut self, page: u64) {
        self.enter();
        let vcpu = self.vcpu.index();
        let done = self.kvm.state().write(vcpu, page * PAGE_SIZE, stamp());
        assert!(matches!(done, Access::Done(_)), "page {page}: {done:?}");
    }

    /// The guest writes a page inside of a call, the first time that it can after so many such moments.
    pub fn write_at(&mut self, moment: Point, after: u32, page: u64) {
        self.enter();
        let write = WriteAt {
            moment,
            after,
            vcpu: self.vcpu.index(),
            page: Some(page),
        };
        self.kvm.set_schedule(Some(Box::new(write)));
    }

    /// The VMM writes a page, and marks it.
    pub fn write_as_vmm(&mut self, page: u64) {
        let memory = self.ram.memory().as_volatile_slice();
        let at = usize::try_from(page * PAGE_SIZE).unwrap();
        memory.write_obj(stamp(), at).unwrap();
    }

    /// A device writes a page by itself: nobody marks it.
    pub fn write_as_device(&mut self, page: u64) {
        store(&self.ram, page).unwrap();
    }

    /// Harvests while the guest runs, and copies what can be leased.
    pub fn copy(&mut self) {
        self.tracker.harvest().unwrap();
        self.drain();
    }

    /// Copies what can be leased.
    pub fn drain(&mut self) {
        self.copy.drain(self.consumer.as_ref().unwrap());
    }

    /// Cuts slot 1 in two: it goes, and comes back shorter.
    pub fn split(&self) {
        let mut tx = self.tracker.transaction();
        tx.split(1, HALF / 2, 3);
        tx.commit().unwrap();
    }

    /// Slots 1 and 2 exchange their ids: what is read by the wrong layout names a page that exists, and is the wrong one.
    pub fn exchange(&self) {
        let layout = self.tracker.layout();
        let exchanged = layout.slots().map(|slot| gleaner::Slot {
            key: SlotKey::new(3 - slot.key.id),
            ..*slot
        });
        let mut tx = self.tracker.transaction();
        tx.transact_to(exchanged.collect());
        tx.commit().unwrap();
    }

    /// Stops the guest, harvests and copies for the last time: then both ends must be the same.
    pub fn settle(&mut self) -> Found {
        let stopped = self.tracker.stop(|| Ok(())).unwrap();
        self.copy();
        let found = self.compare();
        drop(stopped);
        found
    }

    /// Both ends are the same, page by page.
    pub fn compare(&self) -> Found {
        let differing = self.copy.differing(&self.tracker);
        match differing.first() {
            None => Ok(()),
            Some((_, page)) => Err(format!("lost {}: page {page}", differing.len())),
        }
    }

    /// Nothing was written since the last copy: then nothing is owed.
    pub fn owes_nothing(&mut self) -> Found {
        let before = self.copy.pages;
        self.copy();
        match self.copy.pages - before {
            0 => Ok(()),
            pages => Err(format!("{pages} pages sent again")),
        }
    }
}

/// Stores a new value in a page, past every log.
pub fn store(block: &Block, page: u64) -> io::Result<()> {
    let (file, start) = block.shared_backing().map_err(io::Error::other)?;
    file.write_all_at(&stamp().to_ne_bytes(), start + page * PAGE_SIZE)
}

/// One write, at one moment.
struct WriteAt {
    moment: Point,
    after: u32,
    vcpu: usize,
    /// What is still to be written.
    page: Option<u64>,
}

impl Schedule for WriteAt {
    fn at(&mut self, moment: Point, state: &mut State) {
        if moment != self.moment || !state.is_inside(self.vcpu) {
            return;
        }
        let Some(page) = self.page.take_if(|_| self.after == 0) else {
            self.after = self.after.saturating_sub(1);
            return;
        };
        // One that has to wait for a lock is tried again.
        if let Access::Stalled = state.write(self.vcpu, page * PAGE_SIZE, stamp()) {
            self.page = Some(page);
        }
    }
}
