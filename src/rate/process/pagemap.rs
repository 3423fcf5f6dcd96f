//! Which pages of a process are there.
#![allow(unsafe_code)] // PAGEMAP_SCAN is a call that no crate has

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use gleaner_bitmap::PAGE_SIZE;

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: u64 = 0xc060_6610;
/// `PAGE_IS_PRESENT`.
const IS_PRESENT: u64 = 1 << 3;
/// The same in an entry of the file.
const ENTRY_IS_PRESENT: u64 = 1 << 63;
/// Pages that cost as much to walk over as a call.
const WALKED: u64 = 64;

#[derive(Debug)]
pub(super) struct Pagemap {
    file: File,
    /// The kernel has the call.
    scans: bool,
}

/// `struct pm_scan_arg`, as the kernel has it.
#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    regions: u64,
    regions_length: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

impl Pagemap {
    pub fn open(pid: u32) -> io::Result<Self> {
        let file = File::open(format!("/proc/{pid}/pagemap"))?;
        let mut this = Self { file, scans: true };
        // Of nothing: it is there or not.
        this.scans = this.scan(0, 0, &mut |_, _| ()).is_ok();
        Ok(this)
    }

    /// Whether the pages at these addresses are there, of those of which it is not known.
    pub fn present(&self, addresses: &[u64], there: &mut [bool]) -> io::Result<()> {
        let asked: Vec<usize> = (0..there.len()).filter(|at| !there[*at]).collect();
        let all = asked.iter().map(|at| addresses[*at]);
        let (Some(first), Some(last)) = (all.clone().min(), all.max()) else {
            return Ok(());
        };
        let end = last + PAGE_SIZE;
        if !self.scans {
            for at in asked {
                there[at] = self.entry(addresses[at])?;
            }
            return Ok(());
        }
        let mut scan = |start, end| {
            self.scan(start, end, &mut |from, to| {
                for at in &asked {
                    there[*at] |= (from..to).contains(&addresses[*at]);
                }
            })
        };
        if (end - first) / PAGE_SIZE <= WALKED * asked.len() as u64 {
            return scan(first, end);
        }
        for at in &asked {
            scan(addresses[*at], addresses[*at] + PAGE_SIZE)?;
        }
        Ok(())
    }

    fn entry(&self, address: u64) -> io::Result<bool> {
        let mut entry = [0; 8];
        match self.file.read_exact_at(&mut entry, address / PAGE_SIZE * 8) {
            Ok(()) => Ok(u64::from_ne_bytes(entry) & ENTRY_IS_PRESENT != 0),
            // The process has no memory any more.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Tells `found` from where to where pages are there.
    fn scan(&self, start: u64, end: u64, found: &mut dyn FnMut(u64, u64)) -> io::Result<()> {
        let mut regions = [Region::default(); 64];
        let mut scan = Scan {
            size: size_of::<Scan>() as u64,
            start,
            end,
            regions: regions.as_mut_ptr() as u64,
            regions_length: regions.len() as u64,
            category_mask: IS_PRESENT,
            return_mask: IS_PRESENT,
            ..Scan::default()
        };
        loop {
            // SAFETY: the kernel reads and writes the argument, whose layout is its own, and writes no more than
            // `regions_length` regions to `regions`; both outlive the call.
            let count = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
            let Ok(count) = usize::try_from(count) else {
                return Err(io::Error::last_os_error());
            };
            for region in regions.iter().take(count) {
                found(region.start, region.end);
            }
            if scan.walk_end >= scan.end || scan.walk_end <= scan.start {
                return Ok(());
            }
            scan.start = scan.walk_end;
        }
    }
}
