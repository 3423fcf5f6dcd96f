//! Memory slots: what KVM maps.

use std::fmt;

use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use crate::{BlockId, PAGE_SIZE, PageRange};

/// Names a memory slot: address space and slot id, as KVM packs them into one `u32`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct SlotKey {
    /// Address space (0; 1 is SMM on x86).
    pub address_space: u16,
    /// Slot id, below KVM's number of slots (32,764 on x86).
    pub id: u16,
}

impl SlotKey {
    /// Slot `id` of address space 0.
    #[must_use]
    pub const fn new(id: u16) -> Self {
        Self {
            address_space: 0,
            id,
        }
    }

    /// As KVM wants it: `address_space << 16 | id`.
    #[must_use]
    pub const fn raw(self) -> u32 {
        (self.address_space as u32) << 16 | self.id as u32
    }

    /// From KVM's packing.
    #[must_use]
    #[allow(clippy::cast_possible_truncation)] // both halves are 16 bits by construction
    pub const fn from_raw(raw: u32) -> Self {
        Self {
            address_space: (raw >> 16) as u16,
            id: raw as u16,
        }
    }
}

impl From<u16> for SlotKey {
    fn from(id: u16) -> Self {
        Self::new(id)
    }
}

impl fmt::Display for SlotKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.address_space == 0 {
            write!(f, "slot {}", self.id)
        } else {
            write!(f, "slot {}:{}", self.address_space, self.id)
        }
    }
}

/// A memory slot: a guest-physical range, backed by pages of a RAM block.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Slot {
    /// Its name.
    pub key: SlotKey,
    /// Guest-physical address of its first byte. A multiple of the page size.
    pub gpa: u64,
    /// The block that backs it.
    pub block: BlockId,
    /// Which of the block's pages it maps.
    pub range: PageRange,
    /// Guest writes exit to the VMM. KVM keeps no log for such a slot, and needs none.
    pub readonly: bool,
}

impl Slot {
    /// Guest-physical address of its first byte.
    #[must_use]
    pub const fn address(&self) -> GuestAddress {
        GuestAddress(self.gpa)
    }

    /// Guest-physical address after its last byte. Saturates.
    #[must_use]
    pub const fn gpa_end(&self) -> u64 {
        self.gpa
            .saturating_add(self.range.pages.saturating_mul(PAGE_SIZE))
    }

    /// Whether both slots show the same pages in the same way; where in guest-physical space does not matter.
    #[must_use]
    pub fn same_backing(&self, other: &Self) -> bool {
        self.block == other.block && self.range == other.range && self.readonly == other.readonly
    }

    /// Whether the guest-physical ranges meet (in one address space).
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.key.address_space == other.key.address_space
            && self.gpa < other.gpa_end()
            && other.gpa < self.gpa_end()
    }
}
