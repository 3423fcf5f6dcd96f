//! What the tests share: a machine, and a copy of its memory as a destination would hold it.
#![allow(dead_code, clippy::unwrap_used, clippy::cast_possible_truncation)] // helpers of tests, each of which uses its own part

pub mod changes;
pub mod crew;
pub mod faulty;
pub mod hand;

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use gleaner::vmm::guest::Workload;
use gleaner::vmm::{Backend, Machine, MachineConfig};
use gleaner::{
    Block, BlockId, Consumer, Extent, Leased, PAGE_SIZE, Tracker, TrackerBuilder, Tracking,
};
use vm_memory::{Bytes, VolatileMemory};

/// The tracking modes that KVM has.
pub const MODES: [(&str, Tracking); 3] = [
    ("bitmap", Tracking::Bitmap),
    ("bitmap-clear", Tracking::BitmapClear),
    ("ring", Tracking::RING),
];

/// Whether KVM can be used; if not, one visible line says why.
pub fn kvm() -> bool {
    match kvm_ioctls::Kvm::new() {
        Ok(_) => true,
        Err(error) => {
            // Not by `println`, which the test harness swallows.
            let line = format!(
                "skipped: /dev/kvm: {}\n",
                std::io::Error::from_raw_os_error(error.errno())
            );
            let _ = std::io::stderr().write_all(line.as_bytes());
            false
        }
    }
}

/// A small machine whose vCPUs write as fast as they can.
pub fn machine(tracking: Tracking, ram: u64, workload: Workload, seed: u64) -> Machine {
    machine_with(tracking, ram, workload, seed, |builder| builder)
}

/// The same, its tracker built as `adjust` says.
pub fn machine_with(
    tracking: Tracking,
    ram: u64,
    workload: Workload,
    seed: u64,
    adjust: impl FnOnce(TrackerBuilder) -> TrackerBuilder,
) -> Machine {
    let config = MachineConfig {
        backend: Backend::Kvm,
        ram,
        vcpus: 2,
        ram_file: None,
        tracking,
        workload,
        write_rate: None,
        churn: None,
        seed,
    };
    Machine::with_tracker(&config, adjust).unwrap()
}

/// Bytes of some pages of a block.
fn read(block: &Block, extent: Extent) -> Vec<u8> {
    let mut bytes = vec![0; (extent.range.pages * PAGE_SIZE) as usize];
    let at = (extent.range.first * PAGE_SIZE) as usize;
    block
        .memory()
        .as_volatile_slice()
        .read_slice(&mut bytes, at)
        .unwrap();
    bytes
}

/// All bytes of a block.
pub fn bytes_of(block: &Block) -> Vec<u8> {
    read(block, block.extent(block.info().all()))
}

/// Pages in which two memories of the same length differ.
pub fn pages_apart(a: &[u8], b: &[u8]) -> Vec<u64> {
    assert_eq!(a.len(), b.len());
    let page = PAGE_SIZE as usize;
    let both = a.chunks(page).zip(b.chunks(page));
    (0..)
        .zip(both)
        .filter(|(_, (a, b))| a != b)
        .map(|(n, _)| n)
        .collect()
}

/// What the pages of a lease hold now.
pub fn contents(lease: &Leased) -> Vec<Vec<u8>> {
    let parts = lease.parts().iter();
    parts.map(|(extent, block)| read(block, *extent)).collect()
}

/// A destination's copy of all blocks: what a consumer's leases brought, and nothing else.
#[derive(Default)]
pub struct Copy {
    blocks: BTreeMap<BlockId, Vec<u8>>,
    pub pages: u64,
}

impl Copy {
    /// Copies every page that the consumer can lease.
    pub fn drain(&mut self, consumer: &Consumer) {
        while let Some(lease) = consumer.lease(1 << 14).unwrap() {
            self.apply(&lease, &contents(&lease));
            lease.ack();
        }
    }

    /// Applies what was read of a lease.
    pub fn apply(&mut self, lease: &Leased, contents: &[Vec<u8>]) {
        for ((extent, block), bytes) in lease.parts().iter().zip(contents) {
            let copy = self
                .blocks
                .entry(extent.block)
                .or_insert_with(|| vec![0xee; (block.info().pages * PAGE_SIZE) as usize]);
            let at = (extent.range.first * PAGE_SIZE) as usize;
            copy[at..at + bytes.len()].copy_from_slice(bytes);
            self.pages += extent.range.pages;
        }
    }

    /// Pages of the layout's blocks that differ from the copy.
    pub fn differing(&self, tracker: &Tracker) -> Vec<(BlockId, u64)> {
        let layout = tracker.layout();
        let mut bad = Vec::new();
        for info in layout.blocks() {
            let block = tracker.block(info.id).unwrap();
            let now = read(&block, block.extent(info.all()));
            let page = PAGE_SIZE as usize;
            match self.blocks.get(&info.id) {
                None => bad.extend((0..info.pages).map(|p| (info.id, p))),
                Some(copy) => bad.extend(
                    (0..info.pages)
                        .filter(|p| {
                            let at = *p as usize * page;
                            copy[at..at + page] != now[at..at + page]
                        })
                        .map(|p| (info.id, p)),
                ),
            }
        }
        bad
    }
}

/// A small generator: tests name their seed.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Lets the guest run for a while that differs each time, so that what follows meets it anywhere.
pub fn let_run(random: &mut Random, micros: u64) {
    let end = Instant::now() + Duration::from_micros(random.below(micros));
    while Instant::now() < end {
        std::thread::yield_now();
    }
}

/// Ends the process, with a message, when a test hangs: what is dropped in time does nothing.
pub struct Watchdog {
    _alive: Sender<()>,
}

impl Watchdog {
    pub fn new(what: &'static str) -> Self {
        let (alive, dropped) = channel();
        std::thread::spawn(move || {
            if dropped.recv_timeout(Duration::from_secs(120)) == Err(RecvTimeoutError::Timeout) {
                let _ = writeln!(std::io::stderr(), "hangs: {what}");
                std::process::abort();
            }
        });
        Self { _alive: alive }
    }
}
