//! The kernel's side of a dirty ring.

use std::io;
use std::sync::Arc;

use gleaner_bitmap::SlotKey;

use crate::dirty_ring::Entries;

/// One vCPU's ring, as KVM keeps it.
#[derive(Debug)]
pub(super) struct Ring {
    entries: Arc<Entries>,
    /// Entries at which the vCPU has to leave.
    limit: u32,
    /// Indices of the next entry to write, and of the next one to reset; they wrap.
    dirty: u32,
    reset: u32,
}

impl Ring {
    pub(super) fn new(bytes: u32, reserve: u32) -> io::Result<Self> {
        let entries = Entries::anonymous(bytes)?;
        Ok(Self {
            limit: entries.count().saturating_sub(reserve).max(1),
            entries: Arc::new(entries),
            dirty: 0,
            reset: 0,
        })
    }

    pub(super) fn entries(&self) -> Arc<Entries> {
        Arc::clone(&self.entries)
    }

    /// How many entries it has got so far; wraps.
    pub(super) const fn written(&self) -> u32 {
        self.dirty
    }

    pub(super) const fn is_full(&self) -> bool {
        self.dirty.wrapping_sub(self.reset) >= self.limit
    }

    /// `false`: there is no room, and the page is in no log.
    pub(super) fn push(&mut self, key: SlotKey, page: u64) -> bool {
        let pushed = self.entries.push(self.dirty, key, page);
        self.dirty = self.dirty.wrapping_add(u32::from(pushed));
        pushed
    }

    /// The next entry that user space has read.
    pub(super) fn take_reset(&mut self) -> Option<(SlotKey, u64)> {
        let taken = self.entries.take_reset(self.reset)?;
        self.reset = self.reset.wrapping_add(1);
        Some(taken)
    }

    pub(super) fn has_reset(&self) -> bool {
        self.entries.is_reset(self.reset)
    }
}
