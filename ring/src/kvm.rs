//! The memory calls of a VM, behind a trait.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use gleaner_bitmap::{PageRange, SlotKey};

use crate::{Capabilities, Error, Mode, Result};

/// Host memory that a slot may map, with what keeps it mapped.
#[derive(Clone)]
pub struct HostRange {
    addr: u64,
    bytes: u64,
    _keep: Arc<dyn Any + Send + Sync>,
}

impl HostRange {
    /// Host memory at `addr`.
    ///
    /// # Safety
    /// * `addr..addr + bytes` is mapped readable and writable in this process for as long as `keep` lives.
    /// * Nothing in this process holds a Rust reference into it: a guest writes there at any time.
    #[must_use]
    #[allow(unsafe_code)] // the constructor states a duty; it does nothing unsafe itself
    pub unsafe fn new(addr: u64, bytes: u64, keep: Arc<dyn Any + Send + Sync>) -> Self {
        Self {
            addr,
            bytes,
            _keep: keep,
        }
    }

    /// Where it begins in this process.
    #[must_use]
    pub const fn addr(&self) -> u64 {
        self.addr
    }

    /// Its length in bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A part of it; `None` when it reaches outside.
    #[must_use]
    pub fn part(&self, offset: u64, bytes: u64) -> Option<Self> {
        (offset.checked_add(bytes)? <= self.bytes).then(|| Self {
            addr: self.addr + offset,
            bytes,
            _keep: Arc::clone(&self._keep),
        })
    }
}

impl fmt::Debug for HostRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.addr, self.bytes)
    }
}

/// A slot as KVM is told of it.
#[derive(Clone, Debug)]
pub struct Region {
    /// The slot.
    pub key: SlotKey,
    /// Guest-physical address.
    pub gpa: u64,
    /// Host memory behind it.
    pub host: HostRange,
    /// Log dirty pages.
    pub log: bool,
    /// Guest writes exit to the VMM.
    pub readonly: bool,
}

impl Region {
    /// Pages that it maps.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.host.bytes() / gleaner_bitmap::PAGE_SIZE
    }
}

/// Whether `words` is the log of a slot of so many pages: no more and no less will do.
///
/// # Errors
/// [`Error::LogBuffer`]; also when there is no slot.
pub(crate) fn check_log(slot: SlotKey, pages: u64, words: &[u64]) -> Result<()> {
    if pages > 0 && words.len() as u64 == pages.div_ceil(64) {
        return Ok(());
    }
    Err(Error::LogBuffer {
        slot,
        pages,
        words: words.len(),
    })
}

/// What a RESET of the rings did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Reset {
    /// Entries that were reset.
    pub entries: u64,
    /// The calling thread was stopped meanwhile: up to 64 of their pages may be unarmed, although they are counted.
    pub disturbed: bool,
}

/// The memory calls of one VM. Every call is made by the process that made the VM (any other gets EIO).
pub trait Kvm: Send + Sync {
    /// What it offers.
    fn capabilities(&self) -> Capabilities;

    /// Switches a way of tracking on, before any vCPU exists. Manual protection is switched off unless the mode is
    /// [`Mode::BitmapClear`]: a VMM may have enabled it, and KVM accepts it together with rings or a plain log, where it
    /// loses pages.
    ///
    /// # Errors
    /// [`crate::Error::EnableCapability`] (EINVAL for a ring: a vCPU exists already).
    fn enable(&self, mode: Mode) -> Result<()>;

    /// Creates a slot, moves it, or changes its flags: `KVM_SET_USER_MEMORY_REGION`, one kind of change a call. The
    /// implementation keeps the region's host memory mapped for as long as the slot exists.
    ///
    /// # Errors
    /// [`crate::Error::SetRegion`]; the slot is as it was. EEXIST: overlap. EINVAL: a resize, another host address, or
    /// READONLY toggled, which KVM can't do in place.
    fn set_region(&self, what: &'static str, region: &Region) -> Result<()>;

    /// Deletes a slot. Its dirty log is gone with it.
    ///
    /// # Errors
    /// [`crate::Error::SetRegion`]; the slot is as it was.
    fn delete_region(&self, key: SlotKey) -> Result<()>;

    /// Fetches a slot's dirty log into `words`, all of it: the kernel writes the slot's whole bitmap, whatever size its caller
    /// believes in. So what is handed in is a buffer, which knows its length:
    ///
    /// ```
    /// # use {gleaner_bitmap::SlotKey, gleaner_ring::{Kvm, Result}};
    /// fn fetch(kvm: &dyn Kvm, slot: SlotKey, words: &mut [u64]) -> Result<()> {
    ///     kvm.get_dirty_log(slot, words)
    /// }
    /// ```
    ///
    /// and never a size:
    ///
    /// ```compile_fail,E0308
    /// # use {gleaner_bitmap::SlotKey, gleaner_ring::{Kvm, Result}};
    /// fn fetch(kvm: &dyn Kvm, slot: SlotKey, bytes: usize) -> Result<()> {
    ///     kvm.get_dirty_log(slot, bytes)
    /// }
    /// ```
    ///
    /// Plain: fetches, clears and re-arms. With manual protection: only fetches.
    ///
    /// # Errors
    /// [`crate::Error::GetDirtyLog`], [`crate::Error::LogBuffer`] when `words` is not exactly that of the slot.
    fn get_dirty_log(&self, key: SlotKey, words: &mut [u64]) -> Result<()>;

    /// Clears and re-arms the pages whose bits are set in `words`; bit 0 is page `range.first` of the slot. `range.first`
    /// and, unless the range reaches the slot's end, `range.pages` are multiples of 64.
    ///
    /// # Errors
    /// [`crate::Error::ClearDirtyLog`], [`crate::Error::LogBuffer`].
    fn clear_dirty_log(&self, key: SlotKey, range: PageRange, words: &[u64]) -> Result<()>;

    /// Re-arms the pages of all ring entries marked as harvested. Call it with all signals blocked
    /// ([`crate::with_signals_blocked`]): a signal ends it early and leaves up to 64 pages unarmed but counted (Linux 6.16
    /// and later).
    ///
    /// # Errors
    /// [`crate::Error::ResetRings`].
    fn reset_dirty_rings(&self) -> Result<Reset>;

    /// Manual protection: off, on, or on with all bits initially set in logs that start from now on.
    ///
    /// # Errors
    /// [`crate::Error::EnableCapability`].
    fn set_manual_protect(&self, on: bool, initially_set: bool) -> Result<()>;
}
