//! What can go wrong between Gleaner and KVM.

use std::io;

use gleaner_bitmap::SlotKey;

/// An error of this crate. A failed call has changed nothing in the kernel, unless the variant says otherwise.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// KVM refused a change of a slot. The slot is as it was.
    #[error("KVM_SET_USER_MEMORY_REGION, {what} {slot}: {source}")]
    SetRegion {
        /// What was asked for.
        what: &'static str,
        /// The slot.
        slot: SlotKey,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A dirty log could not be fetched. With EFAULT its bits are gone; otherwise it is as it was.
    #[error("KVM_GET_DIRTY_LOG, {slot}: {source}")]
    GetDirtyLog {
        /// The slot.
        slot: SlotKey,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A dirty log could not be cleared: its bits are still set, its pages not armed.
    #[error("KVM_CLEAR_DIRTY_LOG, {slot}, pages {first}..{}: {source}", first + pages)]
    ClearDirtyLog {
        /// The slot.
        slot: SlotKey,
        /// First page of the range.
        first: u64,
        /// Its length.
        pages: u64,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The rings could not be reset: their entries are still there, their pages not armed.
    #[error("KVM_RESET_DIRTY_RINGS: {source}")]
    ResetRings {
        /// The kernel's reason.
        source: io::Error,
    },
    /// A buffer is too short for the slot, or the slot was not made through this object.
    #[error(
        "dirty log of {slot}: the slot has {pages} pages, the buffer {words} words; slots must be made by the tracker"
    )]
    LogBuffer {
        /// The slot.
        slot: SlotKey,
        /// Pages of the slot; 0 when it is not known.
        pages: u64,
        /// Words of the buffer.
        words: usize,
    },
    /// A capability that the chosen mode needs could not be enabled.
    #[error("capability {capability} ({number}) could not be enabled: {source}{hint}")]
    EnableCapability {
        /// Its name.
        capability: &'static str,
        /// Its number.
        number: u32,
        /// The kernel's reason.
        source: io::Error,
        /// What usually helps.
        hint: &'static str,
    },
    /// The kernel does not offer the chosen mode.
    #[error("this kernel does not offer {mode}: choose another --tracking, or auto")]
    NotOffered {
        /// The mode.
        mode: &'static str,
    },
    /// The ring's size is impossible.
    #[error("a dirty ring of {bytes} bytes is not possible: a power of two from 4096 to {max} is")]
    RingSize {
        /// What was asked for.
        bytes: u64,
        /// The kernel's maximum.
        max: u64,
    },
    /// A ring could not be mapped.
    #[error("dirty ring of vCPU {vcpu} could not be mapped: {source}")]
    MapRing {
        /// The vCPU.
        vcpu: u64,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A call was taken back because somebody else refused the change.
    #[error("{reason}")]
    Refused {
        /// Who and why.
        reason: String,
    },
    /// The signal mask could not be changed.
    #[error("signals could not be blocked: {source}")]
    SignalMask {
        /// The reason.
        source: io::Error,
    },
}

impl From<Error> for gleaner_bitmap::Error {
    fn from(error: Error) -> Self {
        Self::Source {
            source_name: "KVM".into(),
            cause: Box::new(error),
        }
    }
}

/// The result of this crate's operations.
pub type Result<T> = std::result::Result<T, Error>;
