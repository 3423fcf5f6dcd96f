//! vhost's dirty log: shared memory, a bit for each page of guest-physical space.
#![allow(unsafe_code)] // memory shared with the backend

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use gleaner_bitmap::{Collected, Layout, PAGE_SIZE, PageRange, Slot};
use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use crate::ExternalLog;

/// How the VMM reaches the backend.
pub trait VhostBackend: Send {
    /// The rings are stopped: no write is under way, and all are marked in the log.
    ///
    /// # Errors
    /// Why it can't be stopped.
    fn stop(&mut self) -> Result<(), String>;

    /// The log is now in `file`, `bytes` long (`VHOST_USER_SET_LOG_BASE`).
    ///
    /// # Errors
    /// Why the backend does not take it.
    fn set_log(&mut self, file: &File, bytes: u64) -> Result<(), String>;

    /// The rings go on.
    fn start(&mut self);
}

/// A vhost or vhost-user backend's log. The backend sets bit `gpa / 4096` (byte `n / 8`, bit `n % 8`) with an atomic OR
/// after each write; harvesting swaps words to zero.
pub struct VhostLog<B> {
    device: String,
    backend: B,
    map: MmapRaw,
    file: File,
}

/// Pages of guest-physical space that a layout reaches up to.
fn pages_of(layout: &Layout) -> u64 {
    layout
        .slots()
        .map(|s| s.gpa_end() / PAGE_SIZE)
        .max()
        .unwrap_or(0)
        .max(64)
}

/// A log for so many pages, in a memfd that the backend can map.
fn allocate(pages: u64) -> io::Result<(File, MmapRaw)> {
    let bytes = pages.div_ceil(64) * 8;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("vhost-log", flags)?);
    file.set_len(bytes)?;
    // A backend that truncates it would end this process by SIGBUS.
    fcntl_add_seals(&file, SealFlags::SHRINK)?;
    let len = usize::try_from(bytes).map_err(io::Error::other)?;
    let map = MmapOptions::new().len(len).map_raw(&file)?;
    Ok((file, map))
}

impl<B: VhostBackend> VhostLog<B> {
    /// A log that reaches as far as `layout`, handed to the backend.
    ///
    /// # Errors
    /// What the system or the backend says.
    pub fn new(device: &str, mut backend: B, layout: &Layout) -> Result<Self, String> {
        let (file, map) = allocate(pages_of(layout)).map_err(|e| e.to_string())?;
        backend.set_log(&file, map.len() as u64)?;
        Ok(Self {
            device: device.into(),
            backend,
            map,
            file,
        })
    }

    /// The file that the log is in.
    #[must_use]
    pub const fn file(&self) -> &File {
        &self.file
    }

    fn pages(&self) -> u64 {
        self.map.len() as u64 * 8
    }

    fn word(&self, index: u64) -> Option<&AtomicU64> {
        let at = usize::try_from(index)
            .ok()
            .filter(|&i| i < self.map.len() / 8)?;
        // SAFETY: the word lies in the map, which is page-aligned, lives as long as `self` and is only used atomically, here
        // and by the backend.
        Some(unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().cast::<u64>().add(at)) })
    }

    /// Takes the bits of one slot.
    fn take(&self, slot: &Slot, into: &mut Collected) -> gleaner_bitmap::Result<()> {
        let (first, end) = (
            slot.gpa / PAGE_SIZE,
            (slot.gpa_end() / PAGE_SIZE).min(self.pages()),
        );
        let mut page = first;
        while page < end {
            let here = (64 - page % 64).min(end - page);
            let mask = (u64::MAX >> (64 - here)) << (page % 64);
            let Some(word) = self.word(page / 64) else {
                break;
            };
            if word.load(Ordering::Relaxed) & mask != 0 {
                let bits = u64::from_le(word.fetch_and(!mask.to_le(), Ordering::AcqRel)) & mask;
                let pages = PageRange::new(slot.range.first + (page - first), here);
                into.or_block(slot.block, pages, &[bits >> (page % 64)])
                    .inspect_err(|_| {
                        word.fetch_or(bits.to_le(), Ordering::Release);
                    })?;
            }
            page += here;
        }
        Ok(())
    }
}

impl<B: VhostBackend> ExternalLog for VhostLog<B> {
    fn name(&self) -> String {
        self.device.clone()
    }

    fn pause(&mut self) -> Result<(), String> {
        self.backend.stop()
    }

    fn harvest(&mut self, layout: &Layout, into: &mut Collected) -> gleaner_bitmap::Result<()> {
        let mut slots = layout.slots().filter(|s| s.key.address_space == 0);
        slots.try_for_each(|slot| self.take(slot, into))
    }

    fn layout_changed(&mut self, layout: &Layout) -> Result<(), String> {
        let pages = pages_of(layout);
        if pages > self.pages() {
            // Everything in the old log has been harvested, and the backend is stopped: nothing can be in it.
            let (file, map) = allocate(pages).map_err(|e| e.to_string())?;
            self.backend.set_log(&file, map.len() as u64)?;
            (self.file, self.map) = (file, map);
        }
        Ok(())
    }

    fn resume(&mut self) {
        self.backend.start();
    }
}
