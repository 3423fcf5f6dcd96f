//! Real guests to measure: one behind a tracker, one whose memory calls are made by hand.
#![allow(unsafe_code)] // the bare guest's memory is told to KVM by hand

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use gleaner::gate::{Seat, Turn};
use gleaner::vmm::guest::{
    Guest, GuestEvent, HOME, LOW_PAGES, MemoryMap, Workload, emulate_read, emulate_write,
};
use gleaner::{Block, Consumer, PAGE_SIZE, Start, Tracker, Tracking};
use gleaner_bitmap::{PageRange, SlotKey};
use gleaner_ring::{DirtyRing, HostRange, Kvm as _, Mode, Region, StockKvm};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{GuestAddress, VolatileMemory};

use crate::Result;

/// The modes of tracking that KVM has.
pub const MODES: [(&str, Tracking); 3] = [
    ("bitmap", Tracking::Bitmap),
    ("bitmap-clear", Tracking::BitmapClear),
    ("ring", Tracking::RING),
];

/// The slot that is measured. Slot 0 holds page tables and code.
pub const SLOT: u16 = 1;

/// What both kinds of guest are made of.
pub struct Parts {
    vm: Arc<VmFd>,
    /// All RAM: the low region, and the slot that is measured.
    pub ram: Block,
    guest: Guest,
    _kvm: Kvm,
}

impl Parts {
    /// A guest whose slot 1 has `slot` bytes, and which writes at random to `hot` bytes of it, or, without that, to one page
    /// after the other. It leaves after every `batch` writes.
    fn new(slot: u64, hot: Option<u64>, vcpus: usize, batch: u32) -> Result<Self> {
        let kvm = Kvm::new()?;
        let vm = Arc::new(kvm.create_vm()?);
        let bytes = slot + LOW_PAGES * PAGE_SIZE;
        let ram = Block::memfd("ram", bytes)?;
        let workload = hot.map_or(Workload::Sweep, Workload::Hot);
        let guest = Guest::new(MemoryMap::new(bytes, vcpus)?, workload, batch, 1)?;
        guest.load(&ram.memory().as_volatile_slice())?;
        Ok(Self {
            vm,
            ram,
            guest,
            _kvm: kvm,
        })
    }

    /// A vCPU at the start of the guest's program.
    pub fn vcpu(&self, index: usize) -> Result<VcpuFd> {
        let vcpu = self.vm.create_vcpu(index as u64)?;
        self.guest.start(&vcpu, index)?;
        Ok(vcpu)
    }

    /// The pages of the slot that is measured, as the block counts them.
    pub fn home(&self) -> PageRange {
        self.guest.map().home()
    }

    /// Does what an exit asks for; whether a batch is done.
    pub fn handle(&self, exit: VcpuExit<'_>) -> Result<bool> {
        let (ram, map) = (self.ram.memory().as_volatile_slice(), self.guest.map());
        match exit {
            VcpuExit::IoOut(port, data) => {
                return Ok(GuestEvent::decode(port, data)? == GuestEvent::BatchDone);
            }
            VcpuExit::MmioRead(gpa, data) => emulate_read(&ram, map, gpa, data)?,
            VcpuExit::MmioWrite(gpa, data) => emulate_write(&ram, map, gpa, data)?,
            other => return Err(format!("the guest left KVM_RUN by {other:?}").into()),
        }
        Ok(false)
    }
}

/// A guest behind a tracker.
pub struct TrackedVm {
    pub parts: Arc<Parts>,
    pub tracker: Tracker,
    /// Keeps logging on; none unless it is logged.
    pub consumer: Option<Consumer>,
}

impl TrackedVm {
    /// See [`Parts::new`]; `hot` of 0 sweeps.
    pub fn new(tracking: Tracking, slot: u64, hot: u64, batch: u32) -> Result<Self> {
        Self::with_vcpus(tracking, slot, hot, 1, batch)
    }

    /// As [`TrackedVm::new`], with several vCPUs.
    pub fn with_vcpus(
        tracking: Tracking,
        slot: u64,
        hot: u64,
        vcpus: usize,
        batch: u32,
    ) -> Result<Self> {
        let mut vm = Self::unlogged(tracking, slot, hot, vcpus, batch)?;
        vm.consumer = Some(vm.tracker.consumer(Start::Empty)?);
        Ok(vm)
    }

    /// The same, and nobody wants to know what it writes.
    pub fn unlogged(
        tracking: Tracking,
        slot: u64,
        hot: u64,
        vcpus: usize,
        batch: u32,
    ) -> Result<Self> {
        let parts = Parts::new(slot, (hot > 0).then_some(hot), vcpus, batch)?;
        let tracker = Tracker::builder(Arc::clone(&parts.vm))
            .tracking(tracking)
            .build()?;
        let mut tx = tracker.transaction();
        let low = parts.ram.extent(PageRange::new(0, LOW_PAGES));
        tx.add_block(&parts.ram)
            .create(0, GuestAddress(0), low)
            .create(SLOT, GuestAddress(HOME), parts.ram.extent(parts.home()));
        tx.commit()?;
        Ok(Self {
            consumer: None,
            parts: Arc::new(parts),
            tracker,
        })
    }
}

/// How the measuring thread and a vCPU's thread meet.
#[derive(Default)]
struct Board {
    state: Mutex<BoardState>,
    changed: Condvar,
    batches: AtomicU64,
}

#[derive(Default)]
struct BoardState {
    go: bool,
    /// The thread waits outside `KVM_RUN`.
    waiting: bool,
    end: bool,
    failed: Option<String>,
}

/// A tracked guest's vCPU in a thread of its own, which runs when it is let go.
pub struct RunningVcpu {
    board: Arc<Board>,
    thread: Option<JoinHandle<()>>,
}

impl RunningVcpu {
    pub fn spawn(vm: &TrackedVm) -> Result<Self> {
        Self::spawn_nth(vm, 0)
    }

    /// As [`RunningVcpu::spawn`], of several.
    pub fn spawn_nth(vm: &TrackedVm, index: usize) -> Result<Self> {
        let board = Arc::new(Board::default());
        let (shared, parts, tracker) = (
            Arc::clone(&board),
            Arc::clone(&vm.parts),
            vm.tracker.clone(),
        );
        let vcpu = parts.vcpu(index)?;
        let thread = std::thread::spawn(move || {
            let ended = tracker
                .register(&vcpu, index as u64)
                .map_err(Into::into)
                .and_then(|seat| run(&parts, seat, vcpu, &shared));
            let mut state = shared.lock();
            state.failed = ended.err().map(|e: crate::Error| e.to_string());
            state.waiting = true;
            shared.changed.notify_all();
        });
        let vcpu = Self {
            board,
            thread: Some(thread),
        };
        vcpu.pause()?;
        Ok(vcpu)
    }

    /// Lets it run, and returns after some batches, while it runs on.
    pub fn run_for(&self, batches: u64) -> Result<()> {
        let until = self.board.batches.load(Ordering::Relaxed) + batches;
        self.board.lock().go = true;
        self.board.changed.notify_all();
        while self.board.batches.load(Ordering::Relaxed) < until {
            if let Some(reason) = &self.board.lock().failed {
                return Err(reason.as_str().into());
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Batches that it has finished.
    pub fn batches(&self) -> u64 {
        self.board.batches.load(Ordering::Relaxed)
    }

    /// Lets it stand still outside `KVM_RUN`.
    pub fn pause(&self) -> Result<()> {
        let mut state = self.board.lock();
        state.go = false;
        while !state.waiting {
            state = self.board.wait(state);
        }
        match &state.failed {
            Some(reason) => Err(reason.as_str().into()),
            None => Ok(()),
        }
    }
}

impl Board {
    fn lock(&self) -> std::sync::MutexGuard<'_, BoardState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(
        &self,
        state: std::sync::MutexGuard<'a, BoardState>,
    ) -> std::sync::MutexGuard<'a, BoardState> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn run(parts: &Parts, mut seat: Seat, mut vcpu: VcpuFd, board: &Board) -> Result<()> {
    loop {
        let mut state = board.lock();
        while !state.go && !state.end {
            state.waiting = true;
            board.changed.notify_all();
            state = board.wait(state);
        }
        if state.end {
            return Ok(());
        }
        state.waiting = false;
        drop(state);
        let done = match seat.run(&mut vcpu)? {
            Turn::Exit(exit) => parts.handle(exit)?,
            Turn::Stopped(_) => return Err("nobody stops this guest".into()),
            Turn::Shutdown => return Ok(()),
        };
        if done {
            board.batches.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for RunningVcpu {
    fn drop(&mut self) {
        let mut state = self.board.lock();
        state.end = true;
        state.go = false;
        drop(state);
        self.board.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

/// A guest without a tracker: its vCPUs run where they are asked to, and its memory calls are made by hand.
pub struct BareVm {
    vcpus: Vec<VcpuFd>,
    pub kvm: Arc<StockKvm>,
    pub mode: Mode,
    pub parts: Arc<Parts>,
}

impl BareVm {
    /// See [`Parts::new`]; `hot` of 0 sweeps. All slots are logged.
    pub fn new(tracking: Tracking, slot: u64, hot: u64, vcpus: usize, batch: u32) -> Result<Self> {
        let parts = Parts::new(slot, (hot > 0).then_some(hot), vcpus, batch)?;
        let kvm = Arc::new(StockKvm::new(Arc::clone(&parts.vm)));
        let mode = kvm.capabilities().settle(tracking)?;
        kvm.enable(mode)?;
        let vm = Self {
            kvm,
            vcpus: (0..vcpus).map(|i| parts.vcpu(i)).collect::<Result<_>>()?,
            mode,
            parts: Arc::new(parts),
        };
        let low = vm.region(0, 0, PageRange::new(0, LOW_PAGES))?;
        vm.kvm.set_region("create", &low)?;
        let home = vm.region(SLOT, HOME, vm.parts.home())?;
        vm.kvm.set_region("create", &home)?;
        Ok(vm)
    }

    /// A logged slot that maps some pages of the block.
    pub fn region(&self, id: u16, gpa: u64, range: PageRange) -> Result<Region> {
        let memory = self.parts.ram.memory();
        // SAFETY: the mapping is readable and writable for as long as the Arc lives that goes along; all access to it here
        // is by volatile slices.
        let host = unsafe {
            HostRange::new(
                memory.as_ptr() as u64,
                memory.size() as u64,
                Arc::clone(memory) as Arc<_>,
            )
        };
        Ok(Region {
            key: SlotKey::new(id),
            gpa,
            host: host
                .part(range.first * PAGE_SIZE, range.pages * PAGE_SIZE)
                .ok_or("no such pages")?,
            log: true,
            readonly: false,
        })
    }

    /// Runs each vCPU, one after the other, until it has finished some batches. All are out of `KVM_RUN` afterwards.
    pub fn run_for(&mut self, batches: u64) -> Result<()> {
        for vcpu in &mut self.vcpus {
            let mut left = batches;
            while left > 0 {
                left -= u64::from(self.parts.handle(vcpu.run()?)?);
            }
        }
        Ok(())
    }

    /// Its first vCPU, for a thread of its own.
    pub fn take_vcpu(&mut self) -> Option<VcpuFd> {
        self.vcpus.pop()
    }

    /// The dirty rings of all vCPUs; none unless the mode is that of rings.
    pub fn rings(&self) -> Result<Vec<DirtyRing>> {
        let Mode::Ring { bytes } = self.mode else {
            return Ok(Vec::new());
        };
        let map = |(id, vcpu)| Ok(DirtyRing::map(vcpu, id, bytes)?);
        (0..).zip(&self.vcpus).map(map).collect()
    }
}
