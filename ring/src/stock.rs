//! The real KVM: one call a slot.
#![allow(unsafe_code)] // ioctls that hand addresses to the kernel

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gleaner_bitmap::{PageRange, SlotKey};
use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVMIO, kvm_clear_dirty_log, kvm_dirty_log,
    kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr, ioctl_iowr_nr};

use crate::capabilities::{enable_manual_protect, manual_flags};
use crate::kvm::check_log;
use crate::signals::voluntary_switches;
use crate::{Capabilities, Error, Kvm, Mode, Region, Reset, Result};

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// A VM's memory calls, made by `ioctl`.
///
/// Invariant: `regions` holds exactly the slots that KVM has of this object's making. It keeps their host memory mapped,
/// and it is what buffers are checked against: the kernel writes a slot's whole bitmap, whatever size a caller believes in.
/// The slots are deleted when it is dropped, so that no guest can reach memory that is no longer kept.
#[derive(Debug)]
pub struct StockKvm {
    vm: Arc<VmFd>,
    regions: Mutex<BTreeMap<SlotKey, Region>>,
}

impl StockKvm {
    /// The memory calls of `vm`. The ids it is used with must not be used by anybody else.
    #[must_use]
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self {
            vm,
            regions: Mutex::default(),
        }
    }

    fn regions(&self) -> MutexGuard<'_, BTreeMap<SlotKey, Region>> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, what: &'static str, key: SlotKey, region: Option<&Region>) -> Result<()> {
        let mut arg = kvm_userspace_memory_region {
            slot: key.raw(),
            ..Default::default()
        };
        if let Some(region) = region {
            arg.guest_phys_addr = region.gpa;
            arg.memory_size = region.host.bytes();
            arg.userspace_addr = region.host.addr();
            arg.flags = if region.log {
                KVM_MEM_LOG_DIRTY_PAGES
            } else {
                0
            } | if region.readonly { KVM_MEM_READONLY } else { 0 };
        }
        // SAFETY: the host range is mapped for as long as its keeper lives (duty of `HostRange::new`), and `regions` holds
        // the keeper until the slot is gone. A delete names no memory.
        unsafe { self.vm.set_user_memory_region(arg) }.map_err(|error| Error::SetRegion {
            what,
            slot: key,
            source: io::Error::from_raw_os_error(error.errno()),
        })
    }
}

/// The outcome of a raw ioctl.
fn checked(code: libc::c_int) -> io::Result<u64> {
    u64::try_from(code).map_err(|_| io::Error::last_os_error())
}

impl Kvm for StockKvm {
    fn capabilities(&self) -> Capabilities {
        Capabilities::query(&self.vm)
    }

    fn enable(&self, mode: Mode) -> Result<()> {
        self.capabilities().enable(&self.vm, mode)
    }

    fn set_region(&self, what: &'static str, region: &Region) -> Result<()> {
        let mut regions = self.regions();
        self.set(what, region.key, Some(region))?;
        regions.insert(region.key, region.clone());
        Ok(())
    }

    fn delete_region(&self, key: SlotKey) -> Result<()> {
        let mut regions = self.regions();
        self.set("delete", key, None)?;
        regions.remove(&key);
        Ok(())
    }

    fn get_dirty_log(&self, key: SlotKey, words: &mut [u64]) -> Result<()> {
        let regions = self.regions();
        check_log(key, regions.get(&key).map_or(0, Region::pages), words)?;
        let mut arg = kvm_dirty_log {
            slot: key.raw(),
            ..Default::default()
        };
        arg.__bindgen_anon_1.dirty_bitmap = words.as_mut_ptr().cast();
        // SAFETY: the kernel writes ALIGN(pages, 64) / 8 bytes, which is the length of `words`; the slot can't change
        // meanwhile, because changes take the lock that is held here.
        let code = unsafe { ioctl_with_ref(&*self.vm, KVM_GET_DIRTY_LOG(), &arg) };
        match checked(code) {
            Ok(_) => Ok(()),
            Err(source) => Err(Error::GetDirtyLog { slot: key, source }),
        }
    }

    fn clear_dirty_log(&self, key: SlotKey, range: PageRange, words: &[u64]) -> Result<()> {
        let num_pages = u32::try_from(range.pages).ok();
        let (Some(num_pages), true) = (num_pages, words.len() as u64 >= range.pages.div_ceil(64))
        else {
            return Err(Error::LogBuffer {
                slot: key,
                pages: range.pages,
                words: words.len(),
            });
        };
        let mut arg = kvm_clear_dirty_log {
            slot: key.raw(),
            num_pages,
            first_page: range.first,
            ..Default::default()
        };
        arg.__bindgen_anon_1.dirty_bitmap = words.as_ptr().cast_mut().cast();
        // SAFETY: the kernel only reads ALIGN(num_pages, 64) / 8 bytes, which `words` has.
        let code = unsafe { ioctl_with_mut_ref(&*self.vm, KVM_CLEAR_DIRTY_LOG(), &mut arg) };
        match checked(code) {
            Ok(_) => Ok(()),
            Err(source) => Err(Error::ClearDirtyLog {
                slot: key,
                first: range.first,
                pages: range.pages,
                source,
            }),
        }
    }

    /// A stop that comes right after the last entry leaves up to 64 pages unarmed and the count complete. Its one trace is
    /// that the thread was away when the call came back. Without a trace are a stop that is called off before it takes
    /// effect, and task work (io_uring) of the calling thread: harvest and commit from threads that do no such work.
    fn reset_dirty_rings(&self) -> Result<Reset> {
        let before = voluntary_switches();
        // SAFETY: the call takes no argument and touches no memory of this process but the rings, which are the kernel's.
        let code = unsafe { ioctl(&*self.vm, KVM_RESET_DIRTY_RINGS()) };
        let entries = checked(code).map_err(|source| Error::ResetRings { source })?;
        Ok(Reset {
            entries,
            disturbed: voluntary_switches() != before,
        })
    }

    fn set_manual_protect(&self, on: bool, initially_set: bool) -> Result<()> {
        enable_manual_protect(&self.vm, manual_flags(on, initially_set))
    }
}

impl Drop for StockKvm {
    fn drop(&mut self) {
        let keys: Vec<SlotKey> = self.regions().keys().copied().collect();
        for key in keys {
            if self.delete_region(key).is_err() {
                // A slot that stays must keep its memory: a leak is better than a guest in freed memory.
                std::mem::forget(self.regions().remove(&key));
            }
        }
    }
}
