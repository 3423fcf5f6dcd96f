//! Pages that are looked at twice.

use gleaner_bitmap::{PAGE_SIZE, PageRange};
use gleaner_migrate::PageMemory;
use vm_memory::{VolatileMemory, VolatileSlice};
use xxhash_rust::xxh3::xxh3_64;

use crate::{Block, Tracker};

const PAGE: usize = 4096;
/// Pages of a GiB.
const GIB: u64 = (1 << 30) / PAGE_SIZE;

/// Some pages of each block, one out of every stretch of the same length, and what was in them.
pub(super) struct Samples(Vec<OfBlock>);

struct OfBlock {
    block: Block,
    /// Page numbers and hashes of their contents.
    pages: Vec<(u64, u64)>,
}

impl Samples {
    /// Looks at so many pages for each GiB, and at one of each block at least.
    pub(super) fn take(tracker: &Tracker, for_each_gib: u64) -> Self {
        let layout = tracker.layout();
        let blocks = layout.blocks().filter_map(|info| {
            let block = tracker.block(info.id)?;
            let count = (info.pages * for_each_gib / GIB).clamp(1, info.pages.max(1));
            // Where in its stretch: by chance, but the same for nobody who writes in strides.
            let mut random = info.pages ^ 0x9E37_79B9_7F4A_7C15;
            let pages = (0..count).filter_map(|n| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let (from, to) = (info.pages * n / count, info.pages * (n + 1) / count);
                let page = from + random % (to - from).max(1);
                Some((page, hash(&block, page)?))
            });
            let pages = pages.collect();
            Some(OfBlock { block, pages })
        });
        Self(blocks.collect())
    }

    /// Looks again: how many pages have changed, if all did as these.
    pub(super) fn changed_pages(&self) -> f64 {
        let of_block = |of: &OfBlock| {
            let changed = |(page, before): &&(u64, u64)| hash(&of.block, *page) != Some(*before);
            let changed = of.pages.iter().filter(changed).count();
            of.block.info().pages as f64 * changed as f64 / of.pages.len().max(1) as f64
        };
        self.0.iter().map(of_block).sum()
    }
}

/// Of what is in a page. A guest that writes it meanwhile has changed it, whatever comes out.
fn hash(block: &Block, page: u64) -> Option<u64> {
    let at = usize::try_from(page * PAGE_SIZE).ok()?;
    let memory: VolatileSlice<'_, _> = block.memory().as_volatile_slice();
    let mut contents = [0u8; PAGE];
    // Whoever reads a hole makes it a page.
    if block
        .data(PageRange {
            first: page,
            pages: 1,
        })
        .is_some()
    {
        memory.subslice(at, PAGE).ok()?.copy_to(&mut contents);
    }
    Some(xxh3_64(&contents))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // helpers are not known to be tests
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_hole_is_a_page_of_zeros_and_stays_a_hole() {
        let block = Block::memfd("ram", 64 * PAGE_SIZE).unwrap();
        let allocated = || {
            block
                .shared_backing()
                .unwrap()
                .0
                .metadata()
                .unwrap()
                .blocks()
        };
        let hole = hash(&block, 5);
        assert_eq!(hole, Some(xxh3_64(&[0; PAGE])));
        assert_eq!(allocated(), 0);
        let memory = block.memory().as_volatile_slice();
        let page = memory.subslice(5 * PAGE, PAGE).unwrap();
        page.copy_from(&[7u8; PAGE]);
        assert_ne!(hash(&block, 5), hole);
        page.copy_from(&[0u8; PAGE]);
        assert_eq!(hash(&block, 5), hole);
    }
}
