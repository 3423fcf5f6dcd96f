//! Where a file of guest memory has no pages yet.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

use gleaner_bitmap::{PAGE_SIZE, PageRange};
use rustix::fs::{SeekFrom, fstatfs, seek};
use vm_memory::FileOffset;

/// `TMPFS_MAGIC`: memfds, and files in /dev/shm.
const TMPFS: u64 = 0x0102_1994;

/// Whether a file has its pages in memory alone.
pub(crate) fn is_in_memory(file: BorrowedFd<'_>) -> bool {
    fstatfs(file).is_ok_and(|fs| u64::try_from(fs.f_type) == Ok(TMPFS))
}

/// The holes of a file that is mapped shared. Only files in memory are taken: there a page is a hole exactly if nobody ever
/// touched it, while a file system on a disk may learn late of what was written through a mapping.
///
/// Asking moves the file's offset, which nobody who maps memory uses.
#[derive(Debug)]
pub struct Holes {
    file: FileOffset,
    /// Bytes known to be data. A search for the next hole goes over every page up to there, however little of that is
    /// wanted, so it is made once for each stretch of data. Holes are not kept: they may be filled at any moment.
    known: Mutex<(u64, u64)>,
}

impl Holes {
    /// Of a file, if its holes are to be trusted.
    #[must_use]
    pub fn of(file: &FileOffset) -> Option<Self> {
        is_in_memory(file.file().as_fd()).then(|| Self {
            file: FileOffset::from_arc(Arc::clone(file.arc()), file.start()),
            known: Mutex::default(),
        })
    }

    /// See [`PageMemory::data`](crate::PageMemory::data).
    #[must_use]
    pub fn data(&self, range: PageRange) -> Option<PageRange> {
        let byte = |page: u64| self.file.start() + page * PAGE_SIZE;
        let page = |byte: u64| (byte - self.file.start()) / PAGE_SIZE;
        let (start, end) = (byte(range.first), byte(range.end()));
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if !(known.0..known.1).contains(&start) {
            let fd = self.file.file().as_fd();
            let data = match seek(fd, SeekFrom::Data(start)) {
                Ok(data) => data,
                // No data up to the file's end.
                Err(rustix::io::Errno::NXIO) => return None,
                Err(_) => return Some(range),
            };
            if data >= end {
                return None;
            }
            if !(known.0..known.1).contains(&data) {
                let Ok(hole) = seek(fd, SeekFrom::Hole(data)) else {
                    return Some(range);
                };
                *known = (data, hole);
            }
        }
        let (from, to) = (known.0.max(start), known.1.min(end));
        // In whole pages, outwards.
        let first = page(from);
        let end = page(to.next_multiple_of(PAGE_SIZE));
        Some(PageRange::new(first, end - first))
    }
}
