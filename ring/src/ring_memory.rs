//! The memory of a dirty ring's entries, which kernel and user space share.
#![allow(unsafe_code)] // shared memory that the kernel writes

use std::io;
use std::os::fd::AsRawFd;
pub use std::sync::atomic::AtomicU32;

use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn};
use memmap2::{MmapOptions, MmapRaw};

pub const ENTRY_BYTES: u32 = 16;
const _: () = assert!(size_of::<kvm_dirty_gfn>() == ENTRY_BYTES as usize);

/// Entries by their place in the ring. What order they are used in is `dirty_ring`'s.
#[derive(Debug)]
pub struct RingMemory(MmapRaw);

impl RingMemory {
    /// That of a vCPU.
    pub fn map(vcpu: &impl AsRawFd, bytes: u32) -> io::Result<Self> {
        let map = MmapOptions::new()
            .offset(u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * 4096)
            .len(bytes as usize)
            .map_raw(vcpu.as_raw_fd())?;
        Ok(Self(map))
    }

    /// Memory of this process, all zero.
    pub fn anonymous(bytes: u32) -> io::Result<Self> {
        let map = MmapOptions::new().len(bytes as usize).map_anon()?;
        Ok(Self(map.into()))
    }

    fn entry(&self, at: usize) -> *mut kvm_dirty_gfn {
        assert!(at < self.0.len() / ENTRY_BYTES as usize);
        // SAFETY: `at` is below the number of entries that fit.
        unsafe { self.0.as_mut_ptr().cast::<kvm_dirty_gfn>().add(at) }
    }

    pub fn flags(&self, at: usize) -> &AtomicU32 {
        let entry = self.entry(at);
        // SAFETY: the entry lies in the map, which lives as long as `self`; the field is aligned, and both sides use it
        // atomically.
        unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) }
    }

    /// Slot and offset.
    pub fn read(&self, at: usize) -> (u32, u64) {
        let entry = self.entry(at);
        // SAFETY: the entry lies in the map. Both fields are plain numbers, which the kernel leaves alone while user space
        // reads them.
        unsafe {
            (
                (&raw const (*entry).slot).read_volatile(),
                (&raw const (*entry).offset).read_volatile(),
            )
        }
    }

    /// Writes slot and offset, on the kernel's side.
    pub fn write(&self, at: usize, slot: u32, offset: u64) {
        let entry = self.entry(at);
        // SAFETY: the entry lies in the map. User space leaves both fields alone while the kernel writes them.
        unsafe {
            (&raw mut (*entry).slot).write_volatile(slot);
            (&raw mut (*entry).offset).write_volatile(offset);
        }
    }
}
