//! What a guest of 12 TiB costs follows its dirty pages, not its size. A file of its own: the test measures its process.
#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::sync::Arc;

use gleaner_bitmap::{
    BlockId, Collected, DirtySource, DirtyStore, Extent, Harvester, Layout, PAGE_SIZE, PageRange,
    Rearm, Result, Scope, Start, WriteLog,
};
use vm_memory::bitmap::Bitmap;

const BLOCK: BlockId = BlockId(0);
/// 12 TiB: a bitmap of it has 384 MiB.
const PAGES: u64 = 12 << 28;
/// Far less than one bitmap, and room for what everything else in the process takes.
const LITTLE: u64 = 32 << 20;

/// A source that has a bitmap of the whole block, as KVM fills one, with one bit in it.
struct WholeBitmap(Vec<u64>);

impl DirtySource for WholeBitmap {
    fn name(&self) -> String {
        "whole bitmap".into()
    }

    fn collect(&mut self, _: &Layout, _: Scope<'_>, into: &mut Collected) -> Result<()> {
        let middle = self.0.len() / 2;
        self.0[middle] = 1;
        into.or_block(BLOCK, PageRange::new(0, PAGES), &self.0)
    }

    fn rearm(&mut self) -> Result<Rearm> {
        Ok(Rearm::Complete)
    }
}

/// Resident memory of this process in bytes.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * PAGE_SIZE
}

#[test]
fn memory_follows_the_dirty_pages_and_not_the_size_of_the_guest() {
    let before = resident();
    let mut log = WriteLog::new(BLOCK, PAGES);
    let mut bitmap = WholeBitmap(vec![0; usize::try_from(PAGES / 64).unwrap()]);
    let mut harvester = Harvester::default();
    harvester.add_block(BLOCK, PAGES);
    let store = Arc::new(DirtyStore::default());
    store.add_block(BLOCK, PAGES);
    let meter = store.consumer(Start::Empty);

    let last = usize::try_from((PAGES - 1) * PAGE_SIZE).unwrap();
    log.mark_dirty(0, 1);
    log.mark_dirty(last, 1);
    let sources: [&mut dyn DirtySource; 2] = [&mut log, &mut bitmap];
    let report = harvester
        .harvest(sources, &Layout::empty(1), Scope::All, &store)
        .unwrap();
    assert_eq!(report.pages, 3);
    let lease = meter.lease(u64::MAX).unwrap();
    let page = |page| Extent::new(BLOCK, page, 1);
    assert_eq!(lease.extents(), [page(0), page(PAGES / 2), page(PAGES - 1)]);
    lease.ack();
    assert_eq!(meter.dirty_pages(), 0);

    let grown = resident().saturating_sub(before);
    assert!(grown < LITTLE, "{grown} bytes for three dirty pages");
}
