//! Where what is: the guest's one RAM block, in pages.

use gleaner_bitmap::{PAGE_SIZE, PageRange};

use super::{GuestError, Result};

/// Pages of the low region: page tables, code and control pages. Slot 0 maps it at address 0, and stays.
pub const LOW_PAGES: u64 = 512;

/// The guest-physical address of the home region: of page [`LOW_PAGES`].
pub const HOME: u64 = 4 << 30;

pub(super) const MIN_BYTES: u64 = 4 << 20;
pub(super) const MAX_BYTES: u64 = 16 << 30;
pub(super) const MAX_VCPUS: usize = 16;

/// What the page tables map by identity, in GiB.
pub(super) const MAPPED_GIB: u64 = 64;
pub(super) const PML4_PAGE: u64 = 2;
pub(super) const PDPT_PAGE: u64 = 3;
/// The first of [`MAPPED_GIB`] page directories.
pub(super) const DIRECTORY_PAGE: u64 = 16;
/// The control page of vCPU 0.
pub(super) const CONTROL_PAGE: u64 = 128;
pub(super) const CODE_PAGE: u64 = 256;

const _: () = {
    assert!(DIRECTORY_PAGE + MAPPED_GIB <= CONTROL_PAGE);
    assert!(CONTROL_PAGE + MAX_VCPUS as u64 <= CODE_PAGE);
    assert!(CODE_PAGE < LOW_PAGES);
    assert!(HOME + MAX_BYTES <= MAPPED_GIB << 30);
    // A check's result carries a page index in 28 bits.
    assert!(MAX_BYTES / PAGE_SIZE <= 1 << 28);
};

/// The pages of one vCPU, counted from the start of the RAM block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VcpuPages {
    /// One word of 8 bytes for each data page.
    pub table: PageRange,
    /// What it writes.
    pub data: PageRange,
    /// The page through which the VMM talks to it.
    pub control: u64,
}

/// How the pages of the guest's RAM block `ram` are used.
///
/// ```text
/// page  0            512                                                 N
///       | low region | table 0 | data 0 | table 1 | data 1 | ... | device |
/// GPA   0            4 GiB (home region)
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryMap {
    pages: u64,
    vcpus: usize,
}

impl MemoryMap {
    /// The map of `ram_bytes` bytes for `vcpus` vCPUs.
    ///
    /// # Errors
    /// [`GuestError::RamSize`], [`GuestError::Vcpus`].
    pub fn new(ram_bytes: u64, vcpus: usize) -> Result<Self> {
        if !(MIN_BYTES..=MAX_BYTES).contains(&ram_bytes) || !ram_bytes.is_multiple_of(PAGE_SIZE) {
            return Err(GuestError::RamSize { bytes: ram_bytes });
        }
        if !(1..=MAX_VCPUS).contains(&vcpus) {
            return Err(GuestError::Vcpus { vcpus });
        }
        Ok(Self {
            pages: ram_bytes / PAGE_SIZE,
            vcpus,
        })
    }

    /// Pages of the RAM block.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Number of vCPUs.
    #[must_use]
    pub const fn vcpus(&self) -> usize {
        self.vcpus
    }

    /// The low region.
    #[must_use]
    pub const fn low(&self) -> PageRange {
        PageRange::new(0, LOW_PAGES)
    }

    /// The home region, whose slots may change at any time.
    #[must_use]
    pub const fn home(&self) -> PageRange {
        PageRange::new(LOW_PAGES, self.pages - LOW_PAGES)
    }

    /// The pages at the end that only the VMM writes.
    #[must_use]
    pub const fn device_area(&self) -> PageRange {
        let pages = self.home().pages / 16;
        PageRange::new(self.pages - pages, pages)
    }

    /// Where the guest sees a page when nothing is moved: the low region at 0, the rest from [`HOME`] on.
    #[must_use]
    pub const fn home_gpa(&self, page: u64) -> u64 {
        if page < LOW_PAGES {
            page * PAGE_SIZE
        } else {
            HOME + (page - LOW_PAGES) * PAGE_SIZE
        }
    }

    /// The page whose home address this is, or is inside of.
    #[must_use]
    pub const fn page_of_gpa(&self, gpa: u64) -> Option<u64> {
        if gpa < LOW_PAGES * PAGE_SIZE {
            return Some(gpa / PAGE_SIZE);
        }
        if gpa < HOME {
            return None;
        }
        let page = LOW_PAGES + (gpa - HOME) / PAGE_SIZE;
        if page < self.pages { Some(page) } else { None }
    }

    /// The pages of a vCPU.
    ///
    /// # Errors
    /// [`GuestError::NoSuchVcpu`].
    pub fn vcpu(&self, index: usize) -> Result<VcpuPages> {
        if index >= self.vcpus {
            return Err(GuestError::NoSuchVcpu {
                index,
                vcpus: self.vcpus,
            });
        }
        let (index, vcpus) = (index as u64, self.vcpus as u64);
        let shared = self.device_area().first - LOW_PAGES;
        let first = LOW_PAGES + shared * index / vcpus;
        let end = LOW_PAGES + shared * (index + 1) / vcpus;
        // A page of the table and the 512 data pages that it has words for make 513.
        let table = (end - first).div_ceil(WORDS + 1);
        Ok(VcpuPages {
            table: PageRange::new(first, table),
            data: PageRange::new(first + table, end - first - table),
            control: CONTROL_PAGE + index,
        })
    }
}

/// Words of 8 bytes in a page.
const WORDS: u64 = PAGE_SIZE / 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_of_home_has_one_use() {
        for pages in [1024, 1025, 1087, 513 * 7 + 512, 262_144, 262_143, 4 << 20] {
            for vcpus in [1, 2, 3, 7, 16] {
                let map = MemoryMap::new(pages * PAGE_SIZE, vcpus).unwrap();
                let mut next = map.home().first;
                for i in 0..vcpus {
                    let v = map.vcpu(i).unwrap();
                    assert_eq!(v.table.first, next);
                    assert_eq!(v.data.first, v.table.end());
                    assert!(v.data.pages > 0);
                    assert!(v.data.pages <= v.table.pages * WORDS, "{pages} {vcpus}");
                    assert!(
                        v.data.pages > (v.table.pages - 1) * WORDS,
                        "{pages} {vcpus}"
                    );
                    next = v.data.end();
                }
                assert_eq!(map.device_area().first, next);
                assert_eq!(map.device_area().end(), map.home().end());
                assert_eq!(map.home().end(), pages);
                assert!(map.device_area().pages >= map.home().pages / 17);
            }
        }
    }

    #[test]
    fn addresses_and_pages_agree() {
        let map = MemoryMap::new(1087 * PAGE_SIZE, 1).unwrap();
        for page in 0..map.pages() {
            let gpa = map.home_gpa(page);
            assert_eq!(map.page_of_gpa(gpa), Some(page));
            assert_eq!(map.page_of_gpa(gpa + PAGE_SIZE - 1), Some(page));
        }
        assert_eq!(map.home_gpa(LOW_PAGES), HOME);
        for gpa in [
            LOW_PAGES * PAGE_SIZE,
            HOME - 1,
            map.home_gpa(1087),
            u64::MAX,
        ] {
            assert_eq!(map.page_of_gpa(gpa), None, "{gpa:#x}");
        }
    }

    #[test]
    fn impossible_guests_are_refused() {
        for bytes in [
            0,
            MIN_BYTES - PAGE_SIZE,
            MIN_BYTES + 1,
            MAX_BYTES + PAGE_SIZE,
            u64::MAX,
        ] {
            let error = MemoryMap::new(bytes, 1).unwrap_err();
            assert!(matches!(error, GuestError::RamSize { .. }), "{bytes}");
        }
        for vcpus in [0, 17, usize::MAX] {
            let error = MemoryMap::new(MIN_BYTES, vcpus).unwrap_err();
            assert!(matches!(error, GuestError::Vcpus { .. }), "{vcpus}");
        }
        let map = MemoryMap::new(MIN_BYTES, 2).unwrap();
        assert!(matches!(map.vcpu(2), Err(GuestError::NoSuchVcpu { .. })));
    }
}
