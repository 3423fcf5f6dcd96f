//! A meter in the process that runs the guest.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use gleaner_bitmap::{BlockId, BlockInfo, Extent, PageRange, Start};
use gleaner_migrate::{PageMemory, Throttles};
use serde::{Deserialize, Serialize};

use crate::{Blackouts, Block, Consumer, Result, Tracker};

/// What was written since the last look, or since the meter began.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Look {
    /// From the meter's beginning until the harvest of this look was done.
    pub at: Duration,
    /// How long that harvest took, without the wait for its turn.
    pub harvest: Duration,
    /// RAM blocks that no look before has named.
    pub blocks: Vec<BlockInfo>,
    /// RAM blocks that are gone, with what was written to them after the last look.
    pub gone: Vec<BlockId>,
    /// Pages that were written: no page twice.
    pub written: Vec<Extent>,
    /// How many pages each vCPU has dirtied since the meter began, by its id; a page counts again when it is written after a
    /// harvest. Empty unless it is known who writes.
    pub vcpus: Vec<(u64, u64)>,
    /// How long the guest has stood still for slot transactions since its tracker began.
    pub blackouts: Blackouts,
    /// The guest runs elsewhere: nothing is written after this look.
    pub migrated_away: bool,
}

/// What is metered.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Metered {
    /// How dirty pages are tracked.
    pub tracking: String,
    /// Pages of the guest that may have contents, the others being holes: what a first round sends.
    pub data_pages: u64,
    /// What a migration could slow.
    pub throttles: Throttles,
}

/// A consumer of the dirty store that counts. With the first consumer logging is switched on, with the last one off: until
/// then each look costs the guest what any harvest does.
#[derive(Debug)]
pub struct Meter {
    tracker: Tracker,
    consumer: Consumer,
    began: Instant,
    known: BTreeSet<BlockId>,
    /// What each vCPU had dirtied by then.
    before: BTreeMap<u64, u64>,
}

impl Meter {
    /// Begins: nothing is written yet.
    ///
    /// # Errors
    /// Those of [`Tracker::consumer`].
    pub fn new(tracker: &Tracker) -> Result<Self> {
        let consumer = tracker.consumer(Start::Empty)?;
        Ok(Self {
            tracker: tracker.clone(),
            consumer,
            began: Instant::now(),
            known: BTreeSet::new(),
            before: tracker.dirtied_by_vcpus().into_iter().collect(),
        })
    }

    /// What is metered, as it is now.
    #[must_use]
    pub fn metered(&self) -> Metered {
        let layout = self.tracker.layout();
        let blocks = layout
            .blocks()
            .filter_map(|info| self.tracker.block(info.id));
        Metered {
            tracking: self.tracker.mode().to_string(),
            data_pages: blocks.map(|block| data_pages(&block)).sum(),
            throttles: self.tracker.throttles(),
        }
    }

    /// Harvests, and takes what was written since the last look.
    ///
    /// # Errors
    /// Those of [`Tracker::harvest`]: what was written is in the next look that succeeds.
    pub fn look(&mut self) -> Result<Look> {
        // Asked first: what a guest wrote before it was stopped for good is then in this look.
        let migrated_away = self.tracker.is_migrated_away();
        let (_, harvest) = self.tracker.timed_harvest()?;
        let mut look = Look {
            at: self.began.elapsed(),
            harvest,
            migrated_away,
            ..Look::default()
        };
        if let Some(lease) = self.consumer.lease(u64::MAX)? {
            for (extent, block) in lease.parts() {
                look.written.push(*extent);
                if self.known.insert(extent.block) {
                    look.blocks.push(block.info().clone());
                }
            }
            // Nobody reads their contents.
            lease.ack();
        }
        let layout = self.tracker.layout();
        let new = layout.blocks().filter(|b| self.known.insert(b.id));
        look.blocks.extend(new.cloned());
        let gone = self.known.iter().filter(|id| layout.block(**id).is_none());
        look.gone.extend(gone);
        self.known.retain(|id| layout.block(*id).is_some());
        look.blackouts = self.tracker.blackouts();
        look.vcpus = self.tracker.dirtied_by_vcpus();
        for (vcpu, pages) in &mut look.vcpus {
            *pages -= self
                .before
                .get(vcpu)
                .copied()
                .unwrap_or_default()
                .min(*pages);
        }
        Ok(look)
    }
}

fn data_pages(block: &Block) -> u64 {
    let mut rest = block.info().all();
    let mut found = 0;
    while rest.pages > 0
        && let Some(data) = block.data(rest)
    {
        found += data.pages;
        rest = PageRange::new(data.end(), rest.end().saturating_sub(data.end()));
    }
    found
}
