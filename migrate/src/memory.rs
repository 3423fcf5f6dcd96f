//! Memory of a RAM block, as the stream reads and writes it.

use std::fs::File;
use std::sync::Arc;

use gleaner_bitmap::{PAGE_SIZE, PageRange, pages_of};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use crate::{Error, Holes, Result};

/// Bytes in a page, as lengths in memory are counted.
#[allow(clippy::cast_possible_truncation)] // 4096
pub(crate) const PAGE: usize = PAGE_SIZE as usize;

/// The memory of one RAM block. It may change at any moment, so it is never a `&[u8]`.
pub trait PageMemory: Send + Sync {
    /// Its length in pages.
    fn pages(&self) -> u64;

    /// Some of its pages.
    ///
    /// # Errors
    /// [`Error::Memory`] when the range reaches past the end.
    fn slice(&self, range: PageRange) -> Result<VolatileSlice<'_>>;

    /// The first part of `range` that may hold anything but zeros; what comes before it is zero, and need not be read
    /// (reading a hole of a memfd allocates it). `None`: all of it is zero. Whoever can't tell says `Some(range)`.
    ///
    /// Ask only for pages that are re-armed: what is written to a hole later comes again.
    fn data(&self, range: PageRange) -> Option<PageRange> {
        Some(range)
    }
}

/// Shared handle on the memory of a block: it stays mapped for as long as somebody sends or writes its pages.
pub type Memory = Arc<dyn PageMemory>;

/// Memory that was made for a block that arrives.
///
/// What it holds decides what has to travel: where it is known to be zero, the source sends no zeros. So whoever makes it
/// says which it is, and says `zero` only if the system has made the memory for this block and nobody has written to it.
pub struct NewMemory {
    pub(crate) memory: Memory,
    pub(crate) is_zero: bool,
}

impl NewMemory {
    /// Memory that holds nothing but zeros: anonymous, or a file's that is new or was emptied.
    #[must_use]
    pub fn zero(memory: Memory) -> Self {
        Self {
            memory,
            is_zero: true,
        }
    }

    /// Memory that may hold anything, because it was used before. Every page of it will be written.
    #[must_use]
    pub fn used(memory: Memory) -> Self {
        Self {
            memory,
            is_zero: false,
        }
    }
}

/// Memory mapped by this process.
#[derive(Debug)]
pub struct MappedMemory {
    region: MmapRegion<()>,
    holes: Option<Holes>,
}

impl MappedMemory {
    /// Anonymous memory of `pages` pages, all zero.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn anonymous(pages: u64) -> Result<Self> {
        Self::map(
            None,
            pages,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE,
        )
    }

    /// A file of at least `pages` pages, mapped shared.
    ///
    /// # Errors
    /// [`Error::Memory`], for a file that is too short too.
    pub fn of_file(file: File, pages: u64) -> Result<Self> {
        Self::map(
            Some(FileOffset::new(file, 0)),
            pages,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_NORESERVE,
        )
    }

    /// As [`MappedMemory::of_file`], but from byte `start` of the file on and for reading alone: writing to it is a
    /// segmentation fault, so it serves sources and is not for a [`Destination`](crate::Destination).
    ///
    /// # Errors
    /// [`Error::Memory`], for a file that is too short too.
    pub fn of_file_read_only(file: File, start: u64, pages: u64) -> Result<Self> {
        Self::map(
            Some(FileOffset::new(file, start)),
            pages,
            libc::PROT_READ,
            libc::MAP_SHARED | libc::MAP_NORESERVE,
        )
    }

    /// A pointer to its first byte, for KVM. Valid for as long as `self` is.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.region.as_ptr()
    }

    fn map(file: Option<FileOffset>, pages: u64, prot: i32, flags: i32) -> Result<Self> {
        let fail = |detail: String| Error::Memory {
            what: "can't be mapped",
            detail: format!("{pages} pages: {detail}"),
        };
        let size = pages
            .checked_mul(PAGE_SIZE)
            .and_then(|bytes| usize::try_from(bytes).ok())
            .filter(|bytes| *bytes > 0)
            .ok_or_else(|| fail("no such length".into()))?;
        if let Some(file) = &file {
            // Touching pages past the end of a file kills the process.
            let length = file
                .file()
                .metadata()
                .map_err(|cause| fail(cause.to_string()))?
                .len();
            if length.saturating_sub(file.start()) < size as u64 {
                return Err(fail(format!("the file has only {length} bytes")));
            }
        }
        // Only a shared mapping shows what the file holds.
        let holes = file
            .as_ref()
            .filter(|_| flags & libc::MAP_SHARED != 0)
            .and_then(Holes::of);
        let region =
            MmapRegion::build(file, size, prot, flags).map_err(|cause| fail(cause.to_string()))?;
        Ok(Self { region, holes })
    }
}

impl PageMemory for MappedMemory {
    fn pages(&self) -> u64 {
        // Mapped in whole pages, so this can't fail.
        pages_of("mapping", self.region.size() as u64).unwrap_or_default()
    }

    fn slice(&self, range: PageRange) -> Result<VolatileSlice<'_>> {
        let outside = || Error::Memory {
            what: "has no such pages",
            detail: format!("{}..{} of {}", range.first, range.end(), self.pages()),
        };
        if range.end() > self.pages() || range.pages > self.pages() {
            return Err(outside());
        }
        let offset = usize::try_from(range.first * PAGE_SIZE).map_err(|_| outside())?;
        let count = usize::try_from(range.pages * PAGE_SIZE).map_err(|_| outside())?;
        self.region.get_slice(offset, count).map_err(|_| outside())
    }

    fn data(&self, range: PageRange) -> Option<PageRange> {
        match &self.holes {
            Some(holes) => holes.data(range),
            None => Some(range),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_only_mapping_shows_what_the_writable_one_wrote() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * PAGE_SIZE).unwrap();
        let writable = MappedMemory::of_file(file.try_clone().unwrap(), 4).unwrap();
        let reader = MappedMemory::of_file_read_only(file, 0, 4).unwrap();
        let last = PageRange::new(3, 1);
        writable.slice(last).unwrap().copy_from(&[7u8; 4096]);
        let mut seen = [0u8; 4096];
        reader.slice(last).unwrap().copy_to(&mut seen);
        assert_eq!(seen, [7; 4096]);
    }

    #[test]
    fn holes_are_told_from_data_without_being_read() {
        use std::os::unix::fs::MetadataExt;
        let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(64 * PAGE_SIZE).unwrap();
        let memory = MappedMemory::of_file(file.try_clone().unwrap(), 64).unwrap();
        let range = PageRange::new;
        let write = |page| {
            let page = memory.slice(range(page, 1)).unwrap();
            page.copy_from(&[1u8; 4096]);
        };
        assert_eq!(memory.data(range(0, 64)), None);
        write(20);
        write(21);
        assert_eq!(memory.data(range(0, 64)), Some(range(20, 2)));
        assert_eq!(memory.data(range(21, 43)), Some(range(21, 1)));
        assert_eq!(memory.data(range(22, 42)), None);
        // A hole is never remembered.
        write(22);
        assert_eq!(memory.data(range(22, 42)), Some(range(22, 1)));
        assert_eq!(file.metadata().unwrap().blocks() * 512, 3 * PAGE_SIZE);
        assert_eq!(memory.data(range(40, 2)), None);
    }

    #[test]
    fn pages_outside_are_refused() {
        let memory = MappedMemory::anonymous(2).unwrap();
        assert_eq!(memory.slice(PageRange::new(0, 2)).unwrap().len(), 8192);
        for (first, pages) in [
            (0, 3),
            (2, 1),
            (u64::MAX, 1),
            (1, u64::MAX),
            (u64::MAX, u64::MAX),
        ] {
            assert!(memory.slice(PageRange::new(first, pages)).is_err());
        }
    }

    #[test]
    fn impossible_mappings_are_errors() {
        assert!(MappedMemory::anonymous(0).is_err());
        assert!(MappedMemory::anonymous(u64::MAX).is_err());
        assert!(MappedMemory::of_file(tempfile::tempfile().unwrap(), 1).is_err());
    }
}
