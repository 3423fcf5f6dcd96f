//! A vCPU by hand: it writes exactly where a test says, when it says so, and nowhere else.

use std::collections::BTreeSet;
use std::sync::Arc;

use gleaner::gate::{Seat, Turn};
use gleaner::vmm::guest::{Guest, MemoryMap, Workload};
use gleaner::{
    Block, BlockId, Consumer, Extent, PAGE_SIZE, PageRange, SlotKey, Tracker, TrackerBuilder,
    Tracking, TransactionReport,
};
use kvm_bindings::kvm_regs;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, VolatileMemory};

/// Where tests map their blocks: above the low region, which holds the code and is slot 0.
pub const BASE: u64 = 4 << 30;

/// The guest-physical address of a page from [`BASE`] on.
pub const fn gpa(page: u64) -> GuestAddress {
    GuestAddress(BASE + page * PAGE_SIZE)
}

/// The address so many pages after another.
pub const fn after(at: GuestAddress, pages: u64) -> GuestAddress {
    GuestAddress(at.0 + pages * PAGE_SIZE)
}

/// Stores `rcx` at `rax`, `rbx` times, `rdx` bytes apart; then leaves.
const STORE: &[u8] = &[
    0x48, 0x89, 0x08, // mov [rax], rcx
    0x48, 0x01, 0xd0, // add rax, rdx
    0x48, 0xff, 0xcb, // dec rbx
    0x75, 0xf5, // jnz to the start
    0xe7, 0xe0, // out 0xe0, eax
];

/// The same with a load.
const LOAD: &[u8] = &[
    0x48, 0x8b, 0x08, // mov rcx, [rax]
    0x48, 0x01, 0xd0, // add rax, rdx
    0x48, 0xff, 0xcb, // dec rbx
    0x75, 0xf5, // jnz to the start
    0xe7, 0xe0, // out 0xe0, eax
];

/// Where the loop of loads is, from the start of the code.
const LOAD_AT: u64 = 256;

/// A VM with one vCPU, run by the thread that has it.
pub struct Hand {
    pub tracker: Tracker,
    pub vm: Arc<VmFd>,
    vcpu: VcpuFd,
    /// Empty only while seats are changed.
    seat: Option<Seat>,
    code: u64,
    /// Guest-physical addresses of stores that hit no writable slot: they went nowhere.
    pub missed: Vec<u64>,
}

impl Hand {
    pub fn new(tracking: Tracking) -> Self {
        Self::with(tracking, |builder| builder)
    }

    pub fn with(tracking: Tracking, adjust: impl FnOnce(TrackerBuilder) -> TrackerBuilder) -> Self {
        let vm = Arc::new(Kvm::new().unwrap().create_vm().unwrap());
        let tracker = adjust(Tracker::builder(Arc::clone(&vm)).tracking(tracking))
            .build()
            .unwrap();
        let map = MemoryMap::new(4 << 20, 1).unwrap();
        let guest = Guest::new(map, Workload::Idle, 1, 0).unwrap();
        let low = Block::memfd("low", 4 << 20).unwrap();
        let memory = low.memory().as_volatile_slice();
        guest.load(&memory).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        guest.start(&vcpu, 0).unwrap();
        let code = vcpu.get_regs().unwrap().rip;
        for (at, part) in [(code, STORE), (code + LOAD_AT, LOAD)] {
            memory
                .write_slice(part, usize::try_from(at).unwrap())
                .unwrap();
        }
        let mut tx = tracker.transaction();
        tx.add_block(&low)
            .create(0, GuestAddress(0), low.extent(map.low()));
        tx.commit().unwrap();
        let seat = tracker.register(&vcpu, 0).unwrap();
        let mut hand = Self {
            tracker,
            vm,
            vcpu,
            seat: Some(seat),
            code,
            missed: Vec::new(),
        };
        // A page that is met for the first time while it is logged counts as dirty, even if it is only read: the code is
        // met before.
        hand.read(GuestAddress(0), 1);
        hand
    }

    fn run(&mut self, code: u64, first: GuestAddress, pages: u64, value: u64) {
        self.vcpu
            .set_regs(&kvm_regs {
                rip: code,
                rflags: 0x3002,
                rax: first.0,
                rbx: pages,
                rcx: value,
                rdx: PAGE_SIZE,
                ..kvm_regs::default()
            })
            .unwrap();
        loop {
            match self.seat.as_mut().unwrap().run(&mut self.vcpu).unwrap() {
                Turn::Exit(VcpuExit::IoOut(0xe0, _)) => return,
                Turn::Exit(VcpuExit::MmioWrite(gpa, _)) => self.missed.push(gpa),
                Turn::Exit(VcpuExit::MmioRead(_, data)) => data.fill(0),
                Turn::Exit(other) => panic!("unexpected exit {other:?}"),
                Turn::Stopped(_) => panic!("stopped while it runs by hand"),
                Turn::Shutdown => panic!("shut down"),
            }
        }
    }

    /// The guest stores `value` at the start of so many pages from `first` on.
    pub fn write(&mut self, first: GuestAddress, pages: u64, value: u64) {
        self.run(self.code, first, pages, value);
    }

    /// The guest loads from the start of so many pages from `first` on.
    pub fn read(&mut self, first: GuestAddress, pages: u64) {
        self.run(self.code + LOAD_AT, first, pages, 0);
    }

    /// Tries to get a seat that is taken.
    pub fn take_a_second_seat(&self) -> gleaner::Result<Seat> {
        self.tracker.register(&self.vcpu, 0)
    }

    /// Leaves the seat and takes a new one.
    pub fn change_seats(&mut self) {
        self.seat = None;
        self.seat = Some(self.tracker.register(&self.vcpu, 0).unwrap());
    }

    /// Whether the gate lets the vCPU in.
    pub fn may_run(&self) -> bool {
        self.seat.as_ref().unwrap().pass()
    }

    /// A slot that KVM logs, as KVM itself says it: only a logged slot has a bitmap to fetch. Rings have none at all.
    pub fn logged(&self) -> Option<SlotKey> {
        let layout = self.tracker.layout();
        let logged = layout.slots().find(|s| {
            let bytes = usize::try_from(s.range.pages * PAGE_SIZE).unwrap();
            self.vm.get_dirty_log(s.key.raw(), bytes).is_ok()
        });
        logged.map(|s| s.key)
    }

    /// Plugs a block in, whole, as a slot.
    pub fn plug(&self, name: &str, pages: u64, slot: u16, at: GuestAddress) -> Block {
        let block = Block::memfd(name, pages * PAGE_SIZE).unwrap();
        let mut tx = self.tracker.transaction();
        tx.add_block(&block)
            .create(slot, at, block.extent(block.info().all()));
        tx.commit().unwrap();
        block
    }

    /// Harvests, then takes all that the consumer has and acknowledges it.
    pub fn glean(&self, consumer: &Consumer) -> BTreeSet<(BlockId, u64)> {
        self.tracker.harvest().unwrap();
        leased(consumer)
    }
}

/// Takes all that a consumer has and acknowledges it.
pub fn leased(consumer: &Consumer) -> BTreeSet<(BlockId, u64)> {
    let mut pages = BTreeSet::new();
    while let Some(lease) = consumer.lease(u64::MAX).unwrap() {
        pages.extend(lease.parts().iter().flat_map(|(e, _)| pages_of(e)));
        lease.ack();
    }
    pages
}

/// The pages of an extent.
pub fn pages_of(extent: &Extent) -> impl Iterator<Item = (BlockId, u64)> + use<> {
    let block = extent.block;
    (extent.range.first..extent.range.end()).map(move |page| (block, page))
}

/// Pages of one block.
pub fn pages(block: &Block, pages: impl IntoIterator<Item = u64>) -> BTreeSet<(BlockId, u64)> {
    pages.into_iter().map(|page| (block.id(), page)).collect()
}

/// The value that the guest stored in a page.
pub fn value(block: &Block, page: u64) -> u64 {
    let at = usize::try_from(page * PAGE_SIZE).unwrap();
    block.memory().as_volatile_slice().read_obj(at).unwrap()
}

/// What a slot has dirty, as pages of the slot.
pub fn dirty(tracker: &Tracker, slot: u16) -> Vec<u64> {
    let bitmap = tracker.slot_bitmap(slot).unwrap();
    runs(bitmap.runs())
}

/// What a transaction says that a slot has dirty.
pub fn reported(report: &TransactionReport, slot: u16) -> Vec<u64> {
    report
        .slots
        .get(&slot.into())
        .map(|bitmap| runs(bitmap.runs()))
        .unwrap()
}

fn runs(runs: impl Iterator<Item = PageRange>) -> Vec<u64> {
    runs.flat_map(|run| run.first..run.end()).collect()
}
