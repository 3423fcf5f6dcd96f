//! The memory of another process, looked at from outside: nothing is asked of it, and nothing is changed in it.
//!
//! A page is read only where the process has it: to read a hole of shared memory would fill it, to read what is swapped out would
//! bring it back. Which pages are there is asked of `/proc/PID/pagemap` first, by `PAGEMAP_SCAN` where the kernel has it (6.7).
//! The kernel's soft-dirty bits would show writes that change nothing too; but to clear them write-protects all of the process's
//! memory, for every page of which the guest then takes a fault more, and takes them from whoever else uses them. So they are
//! left alone.

mod error;
mod maps;
mod pagemap;

use std::fs;
use std::io::IoSliceMut;
use std::os::fd::OwnedFd;
use std::time::Duration;

use gleaner_bitmap::{BlockId, BlockInfo, PAGE_SIZE};
use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::time::{ClockId, clock_gettime};
use xxhash_rust::xxh3::xxh3_64;

use super::sample::Sight;
pub use error::ProcessError;
pub use maps::AddressRange;
use pagemap::Pagemap;

type Result<T> = std::result::Result<T, ProcessError>;

const PAGE: usize = 4096;
/// Pages that are read by one call.
const BATCH: usize = 64;

/// Some memory of a process.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    /// The process itself: its number may be another one's when it has ended.
    itself: OwnedFd,
    pagemap: Pagemap,
    parts: Vec<Part>,
    has_vm: bool,
    /// Of a page of zeros.
    zeros: u64,
    buffer: Vec<u8>,
}

#[derive(Debug)]
struct Part {
    info: BlockInfo,
    /// Its first byte in the process, and its first page of all.
    address: u64,
    first: u64,
}

impl Process {
    /// Finds the guest's RAM: all memory of 16 MiB or more in one piece that may be written and is no device's, unless it is
    /// small beside the largest; or the `ranges` that are given.
    ///
    /// # Errors
    /// [`ProcessError`]: there is no such process, it may not be read, it has no such memory.
    pub fn open(pid: u32, ranges: &[AddressRange]) -> Result<Self> {
        let none = || ProcessError::None { pid };
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let itself = pidfd_open(number.ok_or_else(none)?, PidfdFlags::empty());
        let itself = itself.map_err(|_| none())?;
        let denied = |error| ProcessError::of_io(pid, &error);
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).map_err(denied)?;
        let found = if ranges.is_empty() {
            maps::guest_ram(&maps).ok_or(ProcessError::NoGuest { pid })?
        } else {
            maps::given(&maps, ranges).map_err(|range| ProcessError::NotMapped { pid, range })?
        };
        let mut parts = Vec::new();
        let mut first = 0;
        for (id, (name, range)) in (1..).zip(found) {
            let info = BlockInfo::new(BlockId(id), name, range.bytes);
            let info = info.map_err(|_| ProcessError::NotMapped { pid, range })?;
            parts.push(Part {
                address: range.address,
                first,
                info: info.clone(),
            });
            first += info.pages;
        }
        let mut this = Self {
            pid,
            itself,
            pagemap: Pagemap::open(pid).map_err(denied)?,
            parts,
            has_vm: has_vm(pid),
            zeros: xxh3_64(&[0; PAGE]),
            buffer: vec![0; BATCH * PAGE],
        };
        // What may be found may still not be read.
        this.look(&[(0, false)])?;
        Ok(this)
    }

    /// The pieces of memory, as blocks.
    #[must_use]
    pub fn blocks(&self) -> Vec<BlockInfo> {
        self.parts.iter().map(|part| part.info.clone()).collect()
    }

    /// Whether it holds a VM of KVM.
    #[must_use]
    pub const fn has_vm(&self) -> bool {
        self.has_vm
    }

    /// How long this process's CPUs take for a look at a page, about: of some pages that are looked at for that.
    ///
    /// # Errors
    /// As [`Self::look`].
    pub fn time_look(&mut self) -> Result<Duration> {
        const LOOKS: u64 = 512;
        let all: u64 = self.parts.iter().map(|part| part.info.pages).sum();
        let pages: Vec<_> = (0..LOOKS).map(|n| (all * n / LOOKS, false)).collect();
        let before = cpu_time();
        self.look(&pages)?;
        let took = cpu_time().saturating_sub(before);
        Ok(took / u32::try_from(LOOKS).unwrap_or(u32::MAX))
    }

    /// Looks at pages, counted through all blocks; of those that were not there a moment ago it is asked first whether they are.
    ///
    /// # Errors
    /// [`ProcessError::Gone`]; [`ProcessError::Denied`]. A page that is not mapped any more is none: it is not there.
    pub fn look(&mut self, pages: &[(u64, bool)]) -> Result<Vec<Sight>> {
        let mut sights = Vec::with_capacity(pages.len());
        for batch in pages.chunks(BATCH) {
            let addresses: Vec<_> = batch.iter().map(|page| self.address(page.0)).collect();
            let mut there: Vec<bool> = batch.iter().map(|page| page.1).collect();
            let present = self.pagemap.present(&addresses, &mut there);
            present.map_err(|error| ProcessError::of_io(self.pid, &error))?;
            let wanted: Vec<_> = addresses.into_iter().zip(&there).collect();
            let wanted: Vec<_> = wanted
                .iter()
                .filter(|(_, there)| **there)
                .map(|w| w.0)
                .collect();
            let mut found = self.read(&wanted)?.into_iter();
            let sight = |there: &bool| if *there { found.next().flatten() } else { None };
            sights.extend(there.iter().map(sight));
        }
        self.alive()?;
        Ok(sights)
    }

    fn alive(&self) -> Result<()> {
        let mut fds = [PollFd::new(&self.itself, PollFlags::IN)];
        match poll(&mut fds, Some(&Timespec::default())) {
            Ok(0) => Ok(()),
            _ => Err(ProcessError::Gone { pid: self.pid }),
        }
    }

    fn address(&self, page: u64) -> u64 {
        let at = self.parts.partition_point(|part| part.first <= page);
        let part = &self.parts[at.saturating_sub(1)];
        part.address + (page - part.first) * PAGE_SIZE
    }

    /// Hashes of pages that are there.
    fn read(&mut self, addresses: &[u64]) -> Result<Vec<Sight>> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.pid).unwrap_or(0));
        let mut sights = Vec::with_capacity(addresses.len());
        while sights.len() < addresses.len() {
            let rest = &addresses[sights.len()..];
            let from = |address: &u64| RemoteIoVec {
                base: usize::try_from(*address).unwrap_or(0),
                len: PAGE,
            };
            let from: Vec<_> = rest.iter().map(from).collect();
            let into = &mut self.buffer[..rest.len() * PAGE];
            let read = match process_vm_readv(pid, &mut [IoSliceMut::new(into)], &from) {
                Ok(bytes) => bytes / PAGE,
                Err(Errno::EFAULT) => 0,
                Err(Errno::ESRCH) => return Err(ProcessError::Gone { pid: self.pid }),
                Err(error) => return Err(ProcessError::of_io(self.pid, &error.into())),
            };
            let read_pages = self.buffer[..read * PAGE].chunks(PAGE);
            sights.extend(read_pages.map(|page| Some(self.seen(page))));
            if read < rest.len() {
                // It has gone meanwhile.
                sights.push(None);
            }
        }
        Ok(sights)
    }

    fn seen(&self, page: &[u8]) -> u64 {
        match xxh3_64(page) {
            zeros if zeros == self.zeros => 0,
            // 0 means zeros.
            hash => hash.max(1),
        }
    }
}

/// CPU time of this process.
#[must_use]
pub fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    // Neither is ever negative.
    let seconds = Duration::from_secs(time.tv_sec.unsigned_abs());
    seconds + Duration::from_nanos(time.tv_nsec.unsigned_abs())
}

/// Whether some descriptor of a process is a VM.
fn has_vm(pid: u32) -> bool {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return false;
    };
    let target = |entry: std::io::Result<fs::DirEntry>| fs::read_link(entry.ok()?.path()).ok();
    entries
        .filter_map(target)
        .any(|of| of.as_os_str() == "anon_inode:kvm-vm")
}
