//! How the guest gets into its RAM, and its vCPUs to its first instruction.

use gleaner_bitmap::PAGE_SIZE;
use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{Bytes, VolatileSlice};

use super::mailbox::{Mailbox, Word, byte_offset};
use super::memory_map::{CODE_PAGE, DIRECTORY_PAGE, MAPPED_GIB, MemoryMap, PDPT_PAGE, PML4_PAGE};
use super::{GuestError, Result, Workload, program};

/// A guest that is ready to be put into RAM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Guest {
    map: MemoryMap,
    workload: Workload,
    batch: u32,
    seed: u64,
}

/// Present, writable, for user code, accessed.
const TABLE_ENTRY: u64 = 0x27;
/// The same, dirty, and a page of 2 MiB. With the dirty bit set beforehand reads are mapped writable, as they are under
/// EPT and NPT, where no guest page table is looked at.
const PAGE_ENTRY: u64 = 0xe7;
const ENTRIES: u64 = 512;

const CR0: u64 = 0x8005_0033; // PG, AM, WP, NE, ET, MP, PE
const CR4: u64 = 0x220; // PAE, OSFXSR for xmm0
const EFER: u64 = 0x500; // LMA, LME
const RFLAGS: u64 = 0x3002; // IOPL 3

impl Guest {
    /// The longest batch. A VMM that paces the guest waits for batches to end.
    pub const MAX_BATCH: u32 = 1 << 20;

    /// A guest of `workload` that leaves after every `batch` writes (or, if idle, as many pauses). The same seed makes
    /// the same writes.
    ///
    /// # Errors
    /// [`GuestError::Batch`]; [`GuestError::HotTooLarge`].
    pub fn new(map: MemoryMap, workload: Workload, batch: u32, seed: u64) -> Result<Self> {
        if !(1..=Self::MAX_BATCH).contains(&batch) {
            return Err(GuestError::Batch {
                batch,
                max: Self::MAX_BATCH,
            });
        }
        let guest = Self {
            map,
            workload,
            batch,
            seed,
        };
        if let Workload::Hot(bytes) = workload {
            let mut smallest = u64::MAX;
            for index in 0..map.vcpus() {
                smallest = smallest.min(map.vcpu(index)?.data.pages);
            }
            if guest.hot_pages(bytes) > smallest {
                return Err(GuestError::HotTooLarge {
                    bytes,
                    available: smallest * map.vcpus() as u64 * PAGE_SIZE,
                });
            }
        }
        Ok(guest)
    }

    /// Its memory map.
    #[must_use]
    pub const fn map(&self) -> &MemoryMap {
        &self.map
    }

    /// A vCPU's part of a hot set.
    fn hot_pages(&self, bytes: u64) -> u64 {
        bytes.div_ceil(PAGE_SIZE).div_ceil(self.map.vcpus() as u64)
    }

    /// Writes page tables, code and control pages into the low region of `ram`, the RAM block, which must be zero.
    ///
    /// # Errors
    /// [`GuestError::Memory`] when `ram` is shorter than the low region.
    pub fn load<B: BitmapSlice>(&self, ram: &VolatileSlice<'_, B>) -> Result<()> {
        write_table(ram, PML4_PAGE, |i| {
            (i == 0).then_some((PDPT_PAGE * PAGE_SIZE) | TABLE_ENTRY)
        })?;
        write_table(ram, PDPT_PAGE, |i| {
            (i < MAPPED_GIB).then_some(((DIRECTORY_PAGE + i) * PAGE_SIZE) | TABLE_ENTRY)
        })?;
        for gib in 0..MAPPED_GIB {
            write_table(ram, DIRECTORY_PAGE + gib, |i| {
                Some((gib << 30) | (i << 21) | PAGE_ENTRY)
            })?;
        }
        ram.write_slice(program::code(), byte_offset(CODE_PAGE, 0)?)?;
        (0..self.map.vcpus()).try_for_each(|index| self.write_control(ram, index))
    }

    fn write_control<B: BitmapSlice>(
        &self,
        ram: &VolatileSlice<'_, B>,
        index: usize,
    ) -> Result<()> {
        let pages = self.map.vcpu(index)?;
        let seed = seed_of(self.seed, index as u64);
        let last = pages.data.pages - 1;
        let batch = u64::from(self.batch);
        let (batch, span, state) = match self.workload {
            Workload::Idle => (0, 0, 0),
            // The sweep's first step leads to page 0.
            Workload::Sweep => (batch, 0, last),
            Workload::Random => (batch, pages.data.pages, seed),
            Workload::Hot(bytes) => (batch, self.hot_pages(bytes), seed),
        };
        let control = Mailbox::new(ram, &self.map, index)?;
        for (word, value) in [
            (Word::Table, self.map.home_gpa(pages.table.first)),
            (Word::Data, self.map.home_gpa(pages.data.first)),
            (Word::Pages, pages.data.pages),
            (Word::Span, span),
            (Word::Batch, batch),
            (Word::IdleTurns, u64::from(self.batch)),
            (Word::State, state),
        ] {
            control.store(word, value)?;
        }
        Ok(())
    }

    /// Sets the registers of vCPU `index`, fresh from `KVM_CREATE_VCPU`, to the start of the program. The VM needs no
    /// interrupt controller and the vCPU no CPUID.
    ///
    /// # Errors
    /// [`GuestError::NoSuchVcpu`], [`GuestError::Kvm`].
    pub fn start(&self, vcpu: &VcpuFd, index: usize) -> Result<()> {
        let failed = |call| move |cause| GuestError::Kvm { call, cause };
        let control = self.map.home_gpa(self.map.vcpu(index)?.control);
        let mut sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        sregs.cr0 = CR0;
        sregs.cr3 = PML4_PAGE * PAGE_SIZE;
        sregs.cr4 = CR4;
        sregs.efer = EFER;
        sregs.cs = user_segment(0x33, 0xb);
        sregs.cs.l = 1;
        let data = kvm_segment {
            db: 1,
            ..user_segment(0x2b, 0x3)
        };
        for segment in [
            &mut sregs.ds,
            &mut sregs.es,
            &mut sregs.fs,
            &mut sregs.gs,
            &mut sregs.ss,
        ] {
            *segment = data;
        }
        vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
        let regs = kvm_regs {
            rip: CODE_PAGE * PAGE_SIZE,
            rbp: control,
            rflags: RFLAGS,
            ..kvm_regs::default()
        };
        vcpu.set_regs(&regs).map_err(failed("KVM_SET_REGS"))
    }
}

/// A flat segment at privilege level 3.
fn user_segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 3,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    }
}

/// One step of `splitmix64` apart for each vCPU; never zero, where `xorshift` would stay.
fn seed_of(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add((index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)).max(1)
}

fn write_table<B: BitmapSlice>(
    ram: &VolatileSlice<'_, B>,
    page: u64,
    entry: impl Fn(u64) -> Option<u64>,
) -> Result<()> {
    let bytes: Vec<u8> = (0..ENTRIES)
        .flat_map(|i| entry(i).unwrap_or(0).to_le_bytes())
        .collect();
    Ok(ram.write_slice(&bytes, byte_offset(page, 0)?)?)
}

#[cfg(test)]
mod tests {
    use gleaner_bitmap::{BlockId, WriteLog};
    use vm_memory::VolatileMemory;
    use vm_memory::bitmap::Bitmap;
    use vm_memory::mmap::MmapRegionBuilder;

    use super::*;
    use crate::vmm::guest::LOW_PAGES;

    #[test]
    fn impossible_parameters_are_refused() {
        let map = MemoryMap::new(4 << 20, 2).unwrap();
        for batch in [0, Guest::MAX_BATCH + 1] {
            let error = Guest::new(map, Workload::Sweep, batch, 0).unwrap_err();
            assert!(matches!(error, GuestError::Batch { .. }));
        }
        let available = 2 * map.vcpu(0).unwrap().data.pages * PAGE_SIZE;
        assert!(Guest::new(map, Workload::Hot(available), 256, 0).is_ok());
        let error = Guest::new(map, Workload::Hot(available + 1), 256, 0).unwrap_err();
        assert!(matches!(error, GuestError::HotTooLarge { available: a, .. } if a == available));
    }

    #[test]
    fn what_boot_writes_is_marked_and_stays_low() {
        let map = MemoryMap::new(4 << 20, 3).unwrap();
        let log = WriteLog::new(BlockId(0), map.pages());
        let ram = MmapRegionBuilder::new_with_bitmap(4 << 20, log)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
            .build()
            .unwrap();
        let guest = Guest::new(map, Workload::Random, 256, 7).unwrap();
        guest.load(&ram.as_volatile_slice()).unwrap();
        for i in 0..map.pages() {
            let mut bytes = [0u8; 4096];
            let at = byte_offset(i, 0).unwrap();
            ram.as_volatile_slice().read_slice(&mut bytes, at).unwrap();
            let written = bytes.iter().any(|b| *b != 0);
            assert_eq!(ram.bitmap().dirty_at(at), written, "page {i}");
            assert!(i < LOW_PAGES || !written);
        }
    }

    #[test]
    fn ram_that_is_too_short_is_an_error() {
        let mut bytes = vec![0u8; 1 << 20];
        let map = MemoryMap::new(4 << 20, 1).unwrap();
        let guest = Guest::new(map, Workload::Sweep, 256, 0).unwrap();
        let error = guest
            .load(&VolatileSlice::from(&mut bytes[..]))
            .unwrap_err();
        assert!(matches!(error, GuestError::Memory(_)));
    }
}
