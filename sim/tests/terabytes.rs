//! A guest of 12 TiB on the model fits into 4 GiB of the host's memory, its tracker, a sender and a meter included.

#![allow(clippy::unwrap_used)] // a test that can't go on fails

use std::sync::Arc;

use gleaner::model::{Access, ModelConfig, ModelKvm};
use gleaner::{Block, BlockId, PAGE_SIZE, PageRange, Start, Tracker, Tracking, WriteLog};
use vm_memory::GuestAddress;
use vm_memory::mmap::MmapRegionBuilder;

const GUEST: u64 = 12 << 40;
const HOST: u64 = 4 << 30;

/// The most memory that this process had at any time.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib << 10
}

fn all_of(bytes: u64) -> Block {
    let log = WriteLog::new(BlockId::fresh(), bytes / PAGE_SIZE);
    let region = MmapRegionBuilder::new_with_bitmap(usize::try_from(bytes).unwrap(), log)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE)
        .build()
        .unwrap();
    Block::from_region("ram", Arc::new(region)).unwrap()
}

#[test]
fn a_guest_of_12_tib_fits_into_4_gib() {
    let kvm = ModelKvm::new(ModelConfig::default());
    let tracker = Tracker::on(Arc::new(kvm.clone()))
        .tracking(Tracking::BitmapClear)
        .without_reaper()
        .build()
        .unwrap();
    let ram = all_of(GUEST);
    let vcpu = kvm.step_vcpu().unwrap();
    let seat = tracker.register(&vcpu, 0).unwrap();
    let mut tx = tracker.transaction();
    tx.add_block(&ram)
        .create(0, GuestAddress(0), ram.extent(ram.info().all()));
    tx.commit().unwrap();
    let sender = tracker.consumer(Start::AllDirty).unwrap();
    let meter = tracker.consumer(Start::Empty).unwrap();
    assert_eq!(sender.dirty_pages(), GUEST / PAGE_SIZE);

    // A page of each TiB, before and after a hole is punched into the middle.
    let write = |gpa: u64| {
        assert!(seat.step_in() && kvm.state().enter(vcpu.index()));
        let access = kvm.state().write(vcpu.index(), gpa, gpa);
        kvm.state().leave(vcpu.index());
        seat.step_out();
        access
    };
    for tib in 0..12 {
        assert_eq!(write(tib << 40), Access::Done(tib << 40));
    }
    let pages = GUEST / PAGE_SIZE;
    let hole = PageRange::new(pages / 2 - (1 << 18), 1 << 18);
    let mut tx = tracker.transaction();
    tx.punch(0, hole, 1);
    let report = tx.commit().unwrap();
    assert_eq!(report.calls, 3);
    assert_eq!(write((6 << 40) - 8), Access::Missed);
    assert_eq!(write(GUEST - 8), Access::Done(GUEST - 8));
    tracker.harvest().unwrap();
    let lease = meter.lease(u64::MAX).unwrap().unwrap();
    let found: Vec<u64> = lease
        .parts()
        .iter()
        .flat_map(|(e, _)| e.range.first..e.range.end())
        .collect();
    let tib = 1 << (40 - 12);
    let want: Vec<u64> = (0..12).map(|n| n * tib).chain([pages - 1]).collect();
    assert_eq!(found, want);
    lease.ack();
    assert!(peak() < HOST, "{} MiB", peak() >> 20);
}
