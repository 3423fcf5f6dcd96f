//! One change of one slot, and how to take it back.

use gleaner_bitmap::SlotKey;

use crate::{Kvm, Region, Result};

/// A change that KVM makes in one call. It carries both sides, so that it can be taken back.
#[derive(Clone, Debug)]
pub enum MemslotCall {
    /// Adds a slot.
    Create(Region),
    /// Removes a slot.
    Delete(Region),
    /// Changes where it is in guest-physical space, and maybe whether it is logged. KVM keeps its dirty log.
    Move {
        /// Before.
        from: Region,
        /// After.
        to: Region,
    },
    /// Changes whether it is logged.
    Flags {
        /// Before.
        from: Region,
        /// After.
        to: Region,
    },
}

impl MemslotCall {
    /// The slot.
    #[must_use]
    pub const fn key(&self) -> SlotKey {
        match self {
            Self::Create(region) | Self::Delete(region) => region.key,
            Self::Move { to, .. } | Self::Flags { to, .. } => to.key,
        }
    }

    /// Makes the call.
    ///
    /// # Errors
    /// That of [`Kvm::set_region`]; nothing has changed then.
    pub fn apply(&self, kvm: &dyn Kvm) -> Result<()> {
        match self {
            Self::Create(region) => kvm.set_region("create", region),
            Self::Delete(region) => kvm.delete_region(region.key),
            Self::Move { to, .. } => kvm.set_region("move", to),
            Self::Flags { to, .. } => kvm.set_region("flags", to),
        }
    }

    /// The call that takes this one back. What was in the dirty log of a deleted slot does not come back: harvest before.
    #[must_use]
    pub fn inverse(&self) -> Self {
        match self.clone() {
            Self::Create(region) => Self::Delete(region),
            Self::Delete(region) => Self::Create(region),
            Self::Move { from, to } => Self::Move { from: to, to: from },
            Self::Flags { from, to } => Self::Flags { from: to, to: from },
        }
    }

    /// Whether the slot's dirty log is gone after this call, so that it has to be harvested before.
    #[must_use]
    pub const fn ends_log(&self) -> bool {
        match self {
            Self::Create(_) => false,
            Self::Delete(region) => region.log,
            Self::Move { from, to } | Self::Flags { from, to } => from.log && !to.log,
        }
    }

    /// How often the kernel swaps its active and inactive slot lists for this call: twice for a delete or a move, which
    /// pass through an invalid slot; once for the others.
    #[must_use]
    pub const fn list_swaps(&self) -> u32 {
        match self {
            Self::Delete(_) | Self::Move { .. } => 2,
            Self::Create(_) | Self::Flags { .. } => 1,
        }
    }
}
