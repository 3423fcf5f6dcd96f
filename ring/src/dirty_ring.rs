//! A vCPU's dirty ring: the entry protocol between kernel and user space.

#[cfg(all(loom, test))]
mod loom_tests;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use gleaner_bitmap::SlotKey;

use crate::ring_memory::{AtomicU32, ENTRY_BYTES, RingMemory};
use crate::{Error, Result};

/// The kernel has written the entry.
const DIRTY: u32 = 1;
/// User space has read it.
const RESET: u32 = 2;

/// The entries of one vCPU's ring.
#[derive(Debug)]
pub(crate) struct Entries {
    memory: RingMemory,
    /// A power of two.
    count: u32,
}

impl Entries {
    /// Memory for a ring of the model's, all entries free.
    pub(crate) fn anonymous(bytes: u32) -> io::Result<Self> {
        Ok(Self {
            memory: RingMemory::anonymous(bytes)?,
            count: bytes / ENTRY_BYTES,
        })
    }

    pub(crate) const fn count(&self) -> u32 {
        self.count
    }

    const fn at(&self, index: u32) -> usize {
        (index & (self.count - 1)) as usize
    }

    fn flags(&self, index: u32) -> &AtomicU32 {
        self.memory.flags(self.at(index))
    }

    /// Who reads has seen flags that say that the other side leaves both fields alone.
    fn read(&self, index: u32) -> (SlotKey, u64) {
        let (slot, offset) = self.memory.read(self.at(index));
        (SlotKey::from_raw(slot), offset)
    }

    /// The kernel's side: writes an entry; `false` when the one at `index` is not free.
    pub(crate) fn push(&self, index: u32, key: SlotKey, page: u64) -> bool {
        let flags = self.flags(index);
        if flags.load(Ordering::Acquire) != 0 {
            return false;
        }
        // While its flags are 0 it is the kernel's alone, whose side this is.
        self.memory.write(self.at(index), key.raw(), page);
        flags.store(DIRTY, Ordering::Release);
        true
    }

    /// The kernel's side: whether user space has read an entry.
    pub(crate) fn is_reset(&self, index: u32) -> bool {
        self.flags(index).load(Ordering::Acquire) == RESET
    }

    /// The kernel's side: takes an entry that user space has read, and frees it.
    pub(crate) fn take_reset(&self, index: u32) -> Option<(SlotKey, u64)> {
        if !self.is_reset(index) {
            return None;
        }
        let read = self.read(index);
        self.flags(index).store(0, Ordering::Release);
        Some(read)
    }
}

/// The ring of one vCPU, as user space reads it.
///
/// The kernel fills entries strictly in order and so are they read. An entry goes from 0 to `DIRTY` (kernel, release),
/// to `RESET` (here, release), to 0 (kernel, in `KVM_RESET_DIRTY_RINGS`). Slot and offset stay untouched: the kernel reads
/// them again when it re-arms the page.
#[derive(Debug)]
pub struct DirtyRing {
    entries: Arc<Entries>,
    /// Index of the next entry to read; wraps, and is masked for use.
    next: u32,
}

impl DirtyRing {
    /// Maps the ring of a vCPU. Whether rings are on is not to be seen from here (the map succeeds even without): the
    /// caller knows, because it enabled them with `bytes`.
    ///
    /// # Errors
    /// [`Error::MapRing`].
    pub fn map(vcpu: &impl AsRawFd, id: u64, bytes: u32) -> Result<Self> {
        let fail = |source| Error::MapRing { vcpu: id, source };
        if !bytes.is_power_of_two() || bytes < 4096 {
            return Err(fail(io::ErrorKind::InvalidInput.into()));
        }
        Ok(Self::of(Arc::new(Entries {
            memory: RingMemory::map(vcpu, bytes).map_err(fail)?,
            count: bytes / ENTRY_BYTES,
        })))
    }

    pub(crate) const fn of(entries: Arc<Entries>) -> Self {
        Self { entries, next: 0 }
    }

    /// Number of entries.
    #[must_use]
    pub fn entries(&self) -> u32 {
        self.entries.count
    }

    /// Takes the next entry, if the kernel has written one: (slot, page of the slot).
    pub fn pop(&mut self) -> Option<(SlotKey, u64)> {
        let flags = self.entries.flags(self.next);
        if flags.load(Ordering::Acquire) != DIRTY {
            return None;
        }
        // With DIRTY seen by acquire, the kernel has written both fields and leaves them alone until the entry is reset.
        let read = self.entries.read(self.next);
        flags.store(RESET, Ordering::Release);
        self.next = self.next.wrapping_add(1);
        Some(read)
    }

    /// Entries that the kernel has written and nobody has taken, without taking them.
    #[must_use]
    pub fn waiting(&self) -> u32 {
        let is_dirty = |n: u32| {
            let flags = self.entries.flags(self.next.wrapping_add(n));
            flags.load(Ordering::Acquire) == DIRTY
        };
        // An idle guest's ring is looked at often.
        if !is_dirty(0) {
            return 0;
        }
        // They are filled in order, so those that are dirty come before all that are not.
        let (mut dirty, mut end) = (0, self.entries.count);
        while dirty < end {
            let middle = dirty + (end - dirty) / 2;
            if is_dirty(middle) {
                dirty = middle + 1;
            } else {
                end = middle;
            }
        }
        dirty
    }

    /// After the log was lost: moves to the next entry that the kernel has written, if there is any.
    pub(crate) fn resynchronise(&mut self) {
        let ahead = (0..self.entries.count).find(|&n| {
            let flags = self.entries.flags(self.next.wrapping_add(n));
            flags.load(Ordering::Acquire) == DIRTY
        });
        self.next = self.next.wrapping_add(ahead.unwrap_or(0));
    }
}
