//! RAM blocks: the host memory itself, its file, and the log of the VMM's own writes.
#![allow(unsafe_code)] // host memory that a guest writes at any time

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use gleaner_bitmap::{BlockId, BlockInfo, Extent, PAGE_SIZE, PageRange, WriteLog, pages_of};
use gleaner_migrate::{Holes, PageMemory};
use gleaner_ring::HostRange;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, memfd_create};
use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestRegionMmap, MmapRegion, VolatileMemory, VolatileSlice,
};

use crate::{Error, Result};

/// A RAM block: contiguous host memory that backs guest RAM, with the log of what the VMM itself writes there.
///
/// Cheap to clone; the memory lives as long as any clone, any slot that maps it, or any lease that names it.
#[derive(Clone, Debug)]
pub struct Block {
    info: BlockInfo,
    region: Arc<MmapRegion<WriteLog>>,
    /// Where its file has no pages yet, if it has a file that tells.
    holes: Option<Arc<Holes>>,
}

impl Block {
    /// A new block in a memfd of its own, sealed against shrinking, so that another process may map it without fear of
    /// SIGBUS. All its pages are holes, which read as zeros.
    ///
    /// # Errors
    /// [`Error::Bitmap`] for a bad name or length; [`Error::Memory`] when the system has no memory for it.
    pub fn memfd(name: &str, bytes: u64) -> Result<Self> {
        let fail = |source| Error::Memory {
            block: name.into(),
            source,
        };
        pages_of("block length", bytes)?;
        let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(|e| fail(e.into()))?;
        let file = File::from(fd);
        file.set_len(bytes).map_err(fail)?;
        fcntl_add_seals(&file, SealFlags::SHRINK).map_err(|e| fail(e.into()))?;
        Self::file(name, file, bytes)
    }

    /// A block in an existing file, shared with everybody who maps it.
    ///
    /// # Errors
    /// [`Error::Bitmap`] for a bad name or length; [`Error::Memory`] when the file is not exactly `bytes` long or can't be
    /// mapped.
    pub fn file(name: &str, file: File, bytes: u64) -> Result<Self> {
        let fail = |source| Error::Memory {
            block: name.into(),
            source,
        };
        pages_of("block length", bytes)?;
        let actual = file.metadata().map_err(fail)?.len();
        if actual != bytes {
            return Err(fail(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the file has {actual} bytes, the block {bytes}"),
            )));
        }
        Self::part_of(name, file, 0, bytes)
    }

    /// A block in a part of an existing file, from byte `start` on, that is known to be long enough.
    pub(crate) fn part_of(name: &str, file: File, start: u64, bytes: u64) -> Result<Self> {
        let log = WriteLog::new(BlockId::fresh(), pages_of("block length", bytes)?);
        let region =
            map_file(&Arc::new(file), start, bytes, log).map_err(|source| Error::Memory {
                block: name.into(),
                source,
            })?;
        Self::from_region(name, Arc::new(region))
    }

    /// A block from a `vm-memory` region that the VMM has mapped, built with [`WriteLog::new`] and [`BlockId::fresh`] for
    /// its bitmap. Without a file behind it the block can be tracked and sent from this process, but not by an agent.
    ///
    /// # Errors
    /// [`Error::Bitmap`] for a bad name or length; [`Error::WriteLogLength`] when the log is not that of the whole region.
    pub fn from_region(name: &str, region: Arc<MmapRegion<WriteLog>>) -> Result<Self> {
        let log = region.bitmap();
        let bytes = region.size() as u64;
        if log.len() != bytes {
            return Err(Error::WriteLogLength {
                block: name.into(),
                log: log.len(),
                memory: bytes,
            });
        }
        let needed = libc::PROT_READ | libc::PROT_WRITE;
        if region.prot() & needed != needed {
            return Err(Error::Memory {
                block: name.into(),
                source: io::Error::new(
                    io::ErrorKind::PermissionDenied,
                    "the region is not mapped for reading and writing",
                ),
            });
        }
        let info = BlockInfo::new(log.block(), name, bytes)?;
        let shared = region.flags() & libc::MAP_SHARED != 0;
        let file = region.file_offset().filter(|_| shared);
        let holes = file.and_then(Holes::of).map(Arc::new);
        Ok(Self {
            info,
            region,
            holes,
        })
    }

    /// Its identity, name and length.
    #[must_use]
    pub const fn info(&self) -> &BlockInfo {
        &self.info
    }

    /// Its identity.
    #[must_use]
    pub const fn id(&self) -> BlockId {
        self.info.id
    }

    /// Some of its pages, as a slot maps them.
    #[must_use]
    pub const fn extent(&self, range: PageRange) -> Extent {
        Extent {
            block: self.info.id,
            range,
        }
    }

    /// Its memory; what is written through `vm-memory`'s interfaces is logged.
    #[must_use]
    pub const fn memory(&self) -> &Arc<MmapRegion<WriteLog>> {
        &self.region
    }

    /// The log of the VMM's own writes.
    #[must_use]
    pub fn write_log(&self) -> &WriteLog {
        self.region.bitmap()
    }

    /// The file that others may map, and the block's offset in it.
    ///
    /// # Errors
    /// [`Error::NoFile`] for anonymous or private memory.
    pub fn shared_backing(&self) -> Result<(&File, u64)> {
        match self.region.file_offset() {
            Some(offset) if self.is_shared() => Ok((offset.file(), offset.start())),
            _ => Err(Error::NoFile {
                block: self.info.name.clone(),
            }),
        }
    }

    /// Whether the pages are shared with the file's other users.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.region.flags() & libc::MAP_SHARED != 0
    }

    /// A `vm-memory` region that shows some of the block's pages at `gpa`: what a VMM builds its memory map from. It is
    /// a window: its writes go into the block's log, however often the map is replaced.
    ///
    /// # Errors
    /// [`Error::NoFile`] for a block without a shared file; [`Error::Memory`] when it can't be mapped; [`Error::Bitmap`]
    /// when the range lies outside the block.
    pub fn region(&self, range: PageRange, gpa: GuestAddress) -> Result<GuestRegionMmap<WriteLog>> {
        let fail = |source| Error::Memory {
            block: self.info.name.clone(),
            source,
        };
        let no_file = || Error::NoFile {
            block: self.info.name.clone(),
        };
        let log = self.write_log().window(range)?;
        let offset = self.region.file_offset().ok_or_else(no_file)?;
        if !self.is_shared() {
            return Err(no_file());
        }
        let start = offset.start() + range.first * PAGE_SIZE;
        let region = map_file(offset.arc(), start, range.pages * PAGE_SIZE, log).map_err(fail)?;
        GuestRegionMmap::new(region, gpa).ok_or_else(|| fail(io::ErrorKind::InvalidInput.into()))
    }

    /// Gives pages back to the host and makes them zero (balloon, virtio-mem, hole punching). For everybody who follows
    /// the guest's memory this is a write of zeros, and it is logged as one.
    ///
    /// # Errors
    /// [`Error::Bitmap`] when the range lies outside; [`Error::NoFile`] without a shared file; [`Error::Memory`] when the
    /// host refuses. The contents may be partly discarded then; the whole range is logged all the same.
    pub fn discard(&self, range: PageRange) -> Result<()> {
        let log = self.write_log().window(range)?;
        let Some(offset) = self.region.file_offset().filter(|_| self.is_shared()) else {
            return Err(Error::NoFile {
                block: self.info.name.clone(),
            });
        };
        let done = fallocate(
            offset.file().as_fd(),
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset.start() + range.first * PAGE_SIZE,
            range.pages * PAGE_SIZE,
        );
        log.mark_dirty(0, usize::try_from(log.len()).unwrap_or(usize::MAX));
        done.map_err(|e| Error::Memory {
            block: self.info.name.clone(),
            source: e.into(),
        })
    }

    /// The memory as KVM is told of it.
    pub(crate) fn host(&self) -> HostRange {
        // SAFETY: the region is mapped readable and writable (checked by `from_region`) for as long as the Arc that goes along lives, and this crate
        // never makes a reference into it: all access is by volatile slices.
        unsafe {
            HostRange::new(
                self.region.as_ptr() as u64,
                self.region.size() as u64,
                Arc::clone(&self.region) as Arc<_>,
            )
        }
    }
}

/// Maps a part of a file, shared.
fn map_file(
    file: &Arc<File>,
    start: u64,
    bytes: u64,
    log: WriteLog,
) -> io::Result<MmapRegion<WriteLog>> {
    let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
    MmapRegionBuilder::new_with_bitmap(bytes, log)
        .with_file_offset(FileOffset::from_arc(Arc::clone(file), start))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .build()
        .map_err(io::Error::other)
}

impl PageMemory for Block {
    fn pages(&self) -> u64 {
        self.info.pages
    }

    fn slice(&self, range: PageRange) -> gleaner_migrate::Result<VolatileSlice<'_>> {
        let outside = || {
            gleaner_migrate::Error::source(gleaner_bitmap::Error::OutsideBlock {
                block: self.info.id,
                pages: self.info.pages,
                range,
            })
        };
        if !self.info.all().contains(&range) {
            return Err(outside());
        }
        let offset = usize::try_from(range.first * PAGE_SIZE).map_err(|_| outside())?;
        let bytes = usize::try_from(range.pages * PAGE_SIZE).map_err(|_| outside())?;
        let slice = self
            .region
            .get_slice(offset, bytes)
            .map_err(|_| outside())?;
        // SAFETY: the same bytes as `slice`, which vm-memory has checked, for the same lifetime; only the bitmap is left
        // off, because the reader of a lease marks nothing.
        Ok(unsafe { VolatileSlice::new(slice.ptr_guard_mut().as_ptr(), slice.len()) })
    }

    fn data(&self, range: PageRange) -> Option<PageRange> {
        match &self.holes {
            Some(holes) => holes.data(range),
            None => Some(range),
        }
    }
}
