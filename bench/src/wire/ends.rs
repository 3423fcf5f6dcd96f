//! The ends of a migration that is measured: a guest that stands still, and memory that waits for it.

use std::sync::Arc;

use gleaner_bitmap::{BlockId, BlockInfo, Extent, Generation, Layout, PAGE_SIZE, PageRange, Slot};
use gleaner_migrate::{
    Destination, Harvested, LeaseId, LeasedPart, MappedMemory, Memory, NewMemory, PageLease,
    PageMemory, Source, Throttle, Throttles,
};

const BLOCK: BlockId = BlockId(1);
const GENERATION: Generation = Generation(1);

/// A guest that stands still, with one block.
pub struct Still {
    memory: Arc<MappedMemory>,
    /// Dirty pages from here on.
    next: u64,
    leases: u64,
}

impl Still {
    pub const fn new(memory: Arc<MappedMemory>) -> Self {
        Self {
            memory,
            next: 0,
            leases: 0,
        }
    }

    fn left(&self) -> u64 {
        self.memory.pages() - self.next
    }
}

impl Source for Still {
    fn layout(&mut self) -> gleaner_migrate::Result<Layout> {
        let info = BlockInfo::new(BLOCK, "ram", self.memory.pages() * PAGE_SIZE)?;
        let slot = Slot {
            key: 0.into(),
            gpa: 0,
            block: BLOCK,
            range: info.all(),
            readonly: false,
        };
        Ok(Layout::from_parts(GENERATION, vec![info], vec![slot])?)
    }

    fn harvest(&mut self) -> gleaner_migrate::Result<Harvested> {
        Ok(Harvested {
            generation: GENERATION,
            dirty_pages: self.left(),
        })
    }

    fn lease(&mut self, max_pages: u64) -> gleaner_migrate::Result<Option<PageLease>> {
        let range = PageRange::new(self.next, max_pages.min(self.left()));
        if range.pages == 0 {
            return Ok(None);
        }
        self.next = range.end();
        self.leases += 1;
        let extent = Extent {
            block: BLOCK,
            range,
        };
        Ok(Some(PageLease {
            id: LeaseId(self.leases),
            generation: GENERATION,
            parts: vec![LeasedPart::new(extent, Arc::clone(&self.memory) as Memory)],
        }))
    }

    fn ack(&mut self, _: LeaseId) -> gleaner_migrate::Result<()> {
        Ok(())
    }

    fn release(&mut self, _: LeaseId) -> gleaner_migrate::Result<()> {
        Ok(())
    }

    fn throttles(&mut self) -> gleaner_migrate::Result<Throttles> {
        Ok(Throttles::Nothing)
    }

    fn throttle(&mut self, _: Throttle) -> gleaner_migrate::Result<()> {
        Err(gleaner_migrate::Error::source("nobody runs"))
    }

    fn stop(&mut self) -> gleaner_migrate::Result<()> {
        Ok(())
    }

    fn state(&mut self) -> gleaner_migrate::Result<Vec<u8>> {
        Ok(vec![1])
    }

    fn relinquish(&mut self) -> gleaner_migrate::Result<()> {
        Ok(())
    }

    fn complete(&mut self) -> gleaner_migrate::Result<()> {
        Ok(())
    }

    fn resume(&mut self) -> gleaner_migrate::Result<()> {
        Ok(())
    }

    fn transactions(&mut self) -> gleaner_migrate::Result<u64> {
        Ok(0)
    }
}

/// Memory that waits.
pub struct Place {
    pub memory: Arc<MappedMemory>,
    /// It is known to hold nothing but zeros.
    pub is_zero: bool,
}

impl Destination for Place {
    fn add_block(&mut self, _: &BlockInfo) -> gleaner_migrate::Result<NewMemory> {
        let memory = Arc::clone(&self.memory) as Memory;
        Ok(if self.is_zero {
            NewMemory::zero(memory)
        } else {
            NewMemory::used(memory)
        })
    }

    fn remove_block(&mut self, _: &BlockInfo) -> gleaner_migrate::Result<()> {
        Ok(())
    }

    fn layout(&mut self, _: &Layout) -> gleaner_migrate::Result<()> {
        Ok(())
    }

    fn ready(&mut self, _: Vec<u8>) -> gleaner_migrate::Result<()> {
        Ok(())
    }

    fn run(&mut self) -> gleaner_migrate::Result<()> {
        Ok(())
    }

    fn abort(&mut self) {}
}
