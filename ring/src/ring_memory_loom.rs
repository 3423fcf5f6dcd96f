//! Stands in for the memory of a dirty ring's entries under `--cfg loom`: loom tries every order in which both sides may see
//! it, and ends a test in which one writes slot and offset while the other uses them.
#![allow(unsafe_code)] // loom's cells

use std::io;
use std::os::fd::AsRawFd;

use loom::cell::UnsafeCell;

pub use crate::loom_atomic::AtomicU32;

pub const ENTRY_BYTES: u32 = 16;

#[derive(Debug, Default)]
struct Entry {
    flags: AtomicU32,
    /// Slot and offset.
    dirty: UnsafeCell<(u32, u64)>,
}

#[derive(Debug)]
pub struct RingMemory(Vec<Entry>);

// SAFETY: loom panics before two threads get at a cell, unless both read it or one has finished before the other begins.
unsafe impl Sync for RingMemory {}

impl RingMemory {
    pub fn map(_: &impl AsRawFd, _: u32) -> io::Result<Self> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub fn anonymous(bytes: u32) -> io::Result<Self> {
        let entries = (0..bytes / ENTRY_BYTES).map(|_| Entry::default());
        Ok(Self(entries.collect()))
    }

    pub fn flags(&self, at: usize) -> &AtomicU32 {
        &self.0[at].flags
    }

    pub fn read(&self, at: usize) -> (u32, u64) {
        // SAFETY: loom has just checked that nobody writes.
        self.0[at].dirty.with(|dirty| unsafe { *dirty })
    }

    pub fn write(&self, at: usize, slot: u32, offset: u64) {
        // SAFETY: loom has just checked that nobody else reads or writes.
        self.0[at]
            .dirty
            .with_mut(|dirty| unsafe { *dirty = (slot, offset) });
    }
}
