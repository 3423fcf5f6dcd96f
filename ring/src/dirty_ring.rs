//! A vCPU's dirty ring: the entry protocol between kernel and user space.
#![allow(unsafe_code)] // shared memory that the kernel writes

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};

use gleaner_bitmap::SlotKey;
use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use memmap2::{MmapOptions, MmapRaw};

use crate::{Error, Result};

/// The exit reason with which `KVM_RUN` returns when the ring is (softly) full; `kvm-ioctls` reports it as
/// `VcpuExit::Unsupported`.
pub const RING_FULL_EXIT: u32 = kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;

/// The kernel has written the entry.
const DIRTY: u32 = 1;
/// User space has read it.
const RESET: u32 = 2;
const ENTRY_BYTES: u32 = 16;
const _: () = assert!(size_of::<kvm_dirty_gfn>() == ENTRY_BYTES as usize);

/// The mapped ring of one vCPU.
///
/// The kernel fills entries strictly in order and so are they read. An entry goes from 0 to `DIRTY` (kernel, release),
/// to `RESET` (here, release), to 0 (kernel, in `KVM_RESET_DIRTY_RINGS`). Slot and offset stay untouched: the kernel reads
/// them again when it re-arms the page.
#[derive(Debug)]
pub struct DirtyRing {
    map: MmapRaw,
    entries: u32,
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
        let map = MmapOptions::new()
            .offset(u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * 4096)
            .len(bytes as usize)
            .map_raw(vcpu.as_raw_fd())
            .map_err(fail)?;
        Ok(Self {
            map,
            entries: bytes / ENTRY_BYTES,
            next: 0,
        })
    }

    /// Number of entries.
    #[must_use]
    pub const fn entries(&self) -> u32 {
        self.entries
    }

    fn entry(&self, index: u32) -> *mut kvm_dirty_gfn {
        let at = (index & (self.entries - 1)) as usize;
        // SAFETY: `at` is below `entries`, and the map has `entries` times 16 bytes.
        unsafe { self.map.as_mut_ptr().cast::<kvm_dirty_gfn>().add(at) }
    }

    fn flags(&self, index: u32) -> &AtomicU32 {
        let entry = self.entry(index);
        // SAFETY: the entry lies in the map, which lives as long as `self`; the field is aligned, and both sides use it
        // atomically.
        unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) }
    }

    /// Takes the next entry, if the kernel has written one: (slot, page of the slot).
    pub fn pop(&mut self) -> Option<(SlotKey, u64)> {
        let flags = self.flags(self.next);
        if flags.load(Ordering::Acquire) != DIRTY {
            return None;
        }
        let entry = self.entry(self.next);
        // SAFETY: the entry lies in the map; with DIRTY seen by acquire, the kernel has written both fields and leaves
        // them alone until the entry is reset.
        let (slot, offset) = unsafe {
            (
                (&raw const (*entry).slot).read_volatile(),
                (&raw const (*entry).offset).read_volatile(),
            )
        };
        flags.store(RESET, Ordering::Release);
        self.next = self.next.wrapping_add(1);
        Some((SlotKey::from_raw(slot), offset))
    }

    /// After the log was lost: moves to the next entry that the kernel has written, if there is any.
    pub(crate) fn resynchronise(&mut self) {
        let ahead = (0..self.entries).find(|&n| {
            self.flags(self.next.wrapping_add(n))
                .load(Ordering::Acquire)
                == DIRTY
        });
        self.next = self.next.wrapping_add(ahead.unwrap_or(0));
    }
}
