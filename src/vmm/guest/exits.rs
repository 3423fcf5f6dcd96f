//! What the guest says when it leaves, and its accesses to memory that no slot maps.

use gleaner_bitmap::PAGE_SIZE;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{Bytes, VolatileSlice};

use super::mailbox::byte_offset;
use super::memory_map::MemoryMap;
use super::{CheckResult, GuestError, Result};

/// The guest writes here at the end of a batch, then looks into its mailbox.
pub const PORT_BATCH: u16 = 0xe0;
/// The guest writes the result of a check here: a code, and the page above it.
pub const PORT_CHECK: u16 = 0xe1;

pub(super) const CODE_SHIFT: u32 = 4;
pub(super) const CODE_OK: u32 = 0;
pub(super) const CODE_PAGE_WRONG: u32 = 1;
pub(super) const CODE_SUM: u32 = 2;
pub(super) const CODE_CONTROL: u32 = 3;
pub(super) const CODE_FPU: u32 = 4;

/// Why the guest left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GuestEvent {
    /// A batch is done. Before its next write the guest looks into its mailbox.
    BatchDone,
    /// A check is done. The guest goes on with the next batch, whatever the check found.
    Check(CheckResult),
}

impl GuestEvent {
    /// The meaning of [`VcpuExit::IoOut`](kvm_ioctls::VcpuExit::IoOut). All of it is in the data, so that the exit may
    /// go on borrowing the vCPU.
    ///
    /// # Errors
    /// [`GuestError::UnknownOut`].
    pub fn decode(port: u16, data: &[u8]) -> Result<Self> {
        let unknown = || GuestError::UnknownOut {
            port,
            data: data.to_vec(),
        };
        let eax = u32::from_le_bytes(data.try_into().map_err(|_| unknown())?);
        match (port, eax & ((1 << CODE_SHIFT) - 1)) {
            (PORT_BATCH, _) => Ok(Self::BatchDone),
            (PORT_CHECK, CODE_PAGE_WRONG) => Ok(Self::Check(CheckResult::Page {
                index: u64::from(eax >> CODE_SHIFT),
            })),
            (PORT_CHECK, CODE_OK) => Ok(Self::Check(CheckResult::Ok)),
            (PORT_CHECK, CODE_SUM) => Ok(Self::Check(CheckResult::Sum)),
            (PORT_CHECK, CODE_CONTROL) => Ok(Self::Check(CheckResult::ControlPage)),
            (PORT_CHECK, CODE_FPU) => Ok(Self::Check(CheckResult::Fpu)),
            _ => Err(unknown()),
        }
    }
}

/// Carries out [`VcpuExit::MmioRead`](kvm_ioctls::VcpuExit::MmioRead) on `ram`, the whole RAM block, as if the page
/// were mapped at its home.
///
/// # Errors
/// [`GuestError::NotRam`] when the address is no RAM, or the access leaves its page.
pub fn emulate_read<B: BitmapSlice>(
    ram: &VolatileSlice<'_, B>,
    map: &MemoryMap,
    gpa: u64,
    data: &mut [u8],
) -> Result<()> {
    let at = locate(map, gpa, data.len())?;
    Ok(ram.read_slice(data, at)?)
}

/// Carries out [`VcpuExit::MmioWrite`](kvm_ioctls::VcpuExit::MmioWrite), as [`emulate_read`]. The write is the VMM's:
/// KVM's log does not have it, the bitmap of `ram` must.
///
/// # Errors
/// As [`emulate_read`].
pub fn emulate_write<B: BitmapSlice>(
    ram: &VolatileSlice<'_, B>,
    map: &MemoryMap,
    gpa: u64,
    data: &[u8],
) -> Result<()> {
    let at = locate(map, gpa, data.len())?;
    Ok(ram.write_slice(data, at)?)
}

/// Where in the RAM block an access is.
fn locate(map: &MemoryMap, gpa: u64, len: usize) -> Result<usize> {
    let in_page = gpa % PAGE_SIZE;
    let page = map
        .page_of_gpa(gpa)
        .filter(|_| in_page + len as u64 <= PAGE_SIZE)
        .ok_or(GuestError::NotRam { gpa, len })?;
    byte_offset(page, in_page)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::guest::HOME;

    #[test]
    fn only_what_the_program_says_is_understood() {
        let out = |port, eax: u32| GuestEvent::decode(port, &eax.to_le_bytes());
        assert_eq!(out(PORT_BATCH, 0xffff_ffff).unwrap(), GuestEvent::BatchDone);
        assert_eq!(
            out(PORT_CHECK, 0).unwrap(),
            GuestEvent::Check(CheckResult::Ok)
        );
        let page = CheckResult::Page { index: 0x0abc_def0 };
        assert_eq!(
            out(PORT_CHECK, 0xabcd_ef01).unwrap(),
            GuestEvent::Check(page)
        );
        assert_eq!(
            out(PORT_CHECK, 2).unwrap(),
            GuestEvent::Check(CheckResult::Sum)
        );
        assert_eq!(
            out(PORT_CHECK, 3).unwrap(),
            GuestEvent::Check(CheckResult::ControlPage)
        );
        assert_eq!(
            out(PORT_CHECK, 4).unwrap(),
            GuestEvent::Check(CheckResult::Fpu)
        );
        assert!(matches!(
            out(PORT_CHECK, 5),
            Err(GuestError::UnknownOut { .. })
        ));
        assert!(matches!(out(0x80, 0), Err(GuestError::UnknownOut { .. })));
        let short = GuestEvent::decode(PORT_CHECK, &[0]);
        assert!(matches!(short, Err(GuestError::UnknownOut { .. })));
    }

    #[test]
    fn accesses_reach_the_home_page_or_fail() {
        let map = MemoryMap::new(4 << 20, 1).unwrap();
        let mut bytes = vec![0u8; 4 << 20];
        let ram = VolatileSlice::from(&mut bytes[..]);
        emulate_write(&ram, &map, HOME + 0x1008, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        let mut back = [0u8; 8];
        emulate_read(&ram, &map, HOME + 0x1008, &mut back).unwrap();
        assert_eq!(back, [1, 2, 3, 4, 5, 6, 7, 8]);
        for (gpa, len) in [
            (2 << 20, 8),
            (HOME - 8, 8),
            (HOME + (2 << 20), 1),
            (HOME + 0xffc, 8),
            (u64::MAX, 1),
        ] {
            let error = emulate_read(&ram, &map, gpa, &mut back[..len]).unwrap_err();
            assert!(matches!(error, GuestError::NotRam { .. }), "{gpa:#x}");
        }
        assert_eq!(&bytes[(2 << 20) + 0x1008..][..8], &back);
    }
}
