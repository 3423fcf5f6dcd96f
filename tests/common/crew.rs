//! vCPU threads whose exits a test handles itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use gleaner::gate::Turn;
use gleaner::vmm::guest::{Guest, HOME, MemoryMap, Workload, emulate_read, emulate_write};
use gleaner::{Block, PAGE_SIZE, PageRange, Tracker, TrackerBuilder, Tracking};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, VolatileMemory};

/// Writes between two exits: few, so that exits are many.
const BATCH: u32 = 64;

/// Counts at `rax` for ever.
const SPIN: &[u8] = &[
    0x48, 0xff, 0x00, // inc qword [rax]
    0xeb, 0xfb, // jmp to the start
];

/// What threads share.
pub struct Shared {
    pub tracker: Tracker,
    pub ram: Block,
    map: MemoryMap,
    exits: Vec<AtomicU64>,
}

impl Shared {
    /// Ends of batches, by vCPU.
    pub fn exits(&self) -> Vec<u64> {
        let exits = self.exits.iter();
        exits.map(|n| n.load(Ordering::SeqCst)).collect()
    }

    /// What vCPUs that spin have counted up to.
    pub fn spun(&self) -> Vec<u64> {
        let memory = self.ram.memory().as_volatile_slice();
        (0..self.exits.len())
            .map(|index| memory.read_obj((2 << 20) + index * 4096).unwrap())
            .collect()
    }

    /// Waits until every vCPU spins.
    pub fn wait_for_spin(&self) {
        while self.spun().contains(&0) {
            std::thread::yield_now();
        }
    }

    /// Pages of the home region, which only vCPUs write.
    pub fn home(&self) -> Vec<u8> {
        let memory = self.ram.memory().as_volatile_slice();
        let mut bytes = vec![0; 6 << 20];
        memory.read_slice(&mut bytes, 2 << 20).unwrap();
        bytes
    }

    /// Whether memory changes by itself while a transaction is inside. Home stays mapped: else exit handlers would write
    /// it, which are not the gate's to keep.
    pub fn changes_inside(&self) -> bool {
        let mut changed = false;
        let mut tx = self.tracker.transaction();
        if self.tracker.layout().slot(2.into()).is_none() {
            let alias = self.ram.extent(PageRange::new(600, 333));
            tx.create(2, GuestAddress(HOME + (8 << 30)), alias);
        } else {
            tx.delete(2);
        }
        tx.commit_with(|_| {
            let before = self.home();
            changed = self.home() != before;
        })
        .unwrap();
        changed
    }

    /// Waits until every vCPU has run since.
    pub fn wait_for_progress(&self, since: &[u64]) {
        while self
            .exits()
            .iter()
            .zip(since)
            .any(|(now, then)| now <= then)
        {
            std::thread::yield_now();
        }
    }
}

/// A guest of 8 MiB, swept by its vCPUs. Slot 0 is the low region; slot 1 is home.
pub struct Crew {
    pub shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    _vm: Arc<VmFd>,
}

impl Crew {
    /// Starts the vCPUs. `on_exit` is called by each at the end of each batch, outside of `KVM_RUN`.
    pub fn start(
        tracking: Tracking,
        vcpus: usize,
        adjust: impl FnOnce(TrackerBuilder) -> TrackerBuilder,
        on_exit: impl Fn(&Shared, usize) + Clone + Send + 'static,
    ) -> Self {
        Self::assemble(tracking, vcpus, adjust, on_exit, |_, _, _| ())
    }

    /// vCPUs that count in memory and never leave `KVM_RUN` by themselves.
    pub fn spin(tracking: Tracking, vcpus: usize) -> Self {
        Self::spin_some(tracking, vcpus, |_| true)
    }

    /// Some vCPUs that count in memory, a page each, while the others sweep.
    pub fn spin_some(tracking: Tracking, vcpus: usize, spins: fn(usize) -> bool) -> Self {
        let spin = |vcpu: &VcpuFd, index: usize, ram: &Block| {
            if !spins(index) {
                return;
            }
            let mut regs = vcpu.get_regs().unwrap();
            // Past the program, which the others run.
            regs.rip |= 0xff0;
            let at = usize::try_from(regs.rip).unwrap();
            ram.memory()
                .as_volatile_slice()
                .write_slice(SPIN, at)
                .unwrap();
            regs.rax = HOME + index as u64 * PAGE_SIZE;
            vcpu.set_regs(&regs).unwrap();
        };
        Self::assemble(tracking, vcpus, |b| b, |_, _| (), spin)
    }

    fn assemble(
        tracking: Tracking,
        vcpus: usize,
        adjust: impl FnOnce(TrackerBuilder) -> TrackerBuilder,
        on_exit: impl Fn(&Shared, usize) + Clone + Send + 'static,
        init: impl Fn(&VcpuFd, usize, &Block),
    ) -> Self {
        let vm = Arc::new(Kvm::new().unwrap().create_vm().unwrap());
        let tracker = adjust(Tracker::builder(Arc::clone(&vm)).tracking(tracking))
            .build()
            .unwrap();
        let map = MemoryMap::new(8 << 20, vcpus).unwrap();
        let guest = Guest::new(map, Workload::Sweep, BATCH, 0).unwrap();
        let ram = Block::memfd("ram", 8 << 20).unwrap();
        guest.load(&ram.memory().as_volatile_slice()).unwrap();
        let mut tx = tracker.transaction();
        tx.add_block(&ram)
            .create(0, GuestAddress(0), ram.extent(map.low()))
            .create(1, GuestAddress(HOME), ram.extent(map.home()));
        tx.commit().unwrap();
        let shared = Arc::new(Shared {
            tracker,
            ram,
            map,
            exits: (0..vcpus).map(|_| AtomicU64::new(0)).collect(),
        });
        let threads = (0..vcpus)
            .map(|index| {
                let vcpu = vm.create_vcpu(index as u64).unwrap();
                guest.start(&vcpu, index).unwrap();
                init(&vcpu, index, &shared.ram);
                let (shared, on_exit) = (Arc::clone(&shared), on_exit.clone());
                std::thread::spawn(move || run(&shared, vcpu, index, on_exit))
            })
            .collect();
        Self {
            shared,
            threads,
            _vm: vm,
        }
    }

    /// Waits for the threads, which have been told to end.
    pub fn join(mut self) {
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.shared.tracker.shutdown();
        for thread in self.threads.drain(..) {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}

fn run(shared: &Shared, mut vcpu: VcpuFd, index: usize, on_exit: impl Fn(&Shared, usize)) {
    let mut seat = shared.tracker.register(&vcpu, index as u64).unwrap();
    loop {
        match seat.run(&mut vcpu).unwrap() {
            Turn::Exit(exit) => {
                if handle(shared, exit) {
                    on_exit(shared, index);
                    shared.exits[index].fetch_add(1, Ordering::SeqCst);
                }
            }
            Turn::Stopped(parked) => {
                let drained = parked.complete_io(|exit| {
                    handle(shared, exit);
                    Ok::<_, gleaner::Error>(())
                });
                drained.unwrap().serve(|_| Ok(Vec::new()));
            }
            Turn::Shutdown => return,
        }
    }
}

/// Whether the exit is the end of a batch.
fn handle(shared: &Shared, exit: VcpuExit<'_>) -> bool {
    let _writing = shared.tracker.writers().enter();
    let memory = shared.ram.memory().as_volatile_slice();
    match exit {
        VcpuExit::IoOut(..) => return true,
        VcpuExit::MmioRead(gpa, data) => emulate_read(&memory, &shared.map, gpa, data).unwrap(),
        VcpuExit::MmioWrite(gpa, data) => emulate_write(&memory, &shared.map, gpa, data).unwrap(),
        other => panic!("unexpected exit {other:?}"),
    }
    false
}
