//! A destination's copy, by hand: what leases bring, and nothing else.

use std::collections::BTreeMap;

use gleaner::migrate::PageMemory;
use gleaner::{Block, BlockId, Consumer, PageRange};
use vm_memory::VolatileSlice;

use crate::world::World;

/// The words of each page that the simulation writes: all others stay zero.
type Words = [u64; 2];

/// Pages as a destination would hold them.
#[derive(Debug, Default)]
pub struct Copy {
    blocks: BTreeMap<BlockId, Vec<Option<Words>>>,
}

/// The first and the last word of a page.
#[must_use]
pub fn words_of(page: &VolatileSlice<'_>) -> Words {
    let mut words = [[0; 8]; 2];
    page.copy_to(&mut words[0]);
    if let Ok(end) = page.offset(page.len() - 8) {
        end.copy_to(&mut words[1]);
    }
    words.map(u64::from_le_bytes)
}

fn read(block: &Block, page: u64) -> Words {
    block
        .slice(PageRange::new(page, 1))
        .map_or([u64::MAX; 2], |slice| words_of(&slice))
}

impl Copy {
    /// Takes one lease and copies its pages while the guest goes on; some leases are lost on the way. `false` when there was
    /// none.
    pub fn take(&mut self, world: &mut World, number: u64, consumer: &Consumer) -> bool {
        let most = 1 + world.random.below(64);
        let Some(lease) = consumer.lease(most).ok().flatten() else {
            return false;
        };
        let extents: Vec<_> = lease.parts().iter().map(|(e, _)| *e).collect();
        world
            .actors
            .stage()
            .oracle
            .took(number, extents.iter().copied());
        let lost = world.random.one_in(8);
        for (extent, block) in lease.parts() {
            let copy = self
                .blocks
                .entry(extent.block)
                .or_insert_with(|| vec![None; usize::try_from(block.info().pages).unwrap_or(0)]);
            for page in extent.range.first..extent.range.end() {
                if world.random.one_in(8) {
                    world.run(2);
                }
                let at = usize::try_from(page).unwrap_or(0);
                if !lost {
                    copy[at] = Some(read(block, page));
                }
            }
        }
        if lost {
            world.actors.stage().oracle.dropped(number, extents);
            drop(lease);
        } else {
            lease.ack();
        }
        true
    }

    /// Pages of the layout's blocks that differ from the copy. The guest is stopped.
    #[must_use]
    pub fn differing(&self, world: &World) -> u64 {
        let mut differing = 0;
        for block in world.blocks() {
            let copy = self.blocks.get(&block.id());
            for page in 0..block.info().pages {
                let there = copy.and_then(|c| c[usize::try_from(page).unwrap_or(0)]);
                differing += u64::from(there != Some(read(block, page)));
            }
        }
        differing
    }
}
