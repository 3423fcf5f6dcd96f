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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn slot(address_space: u16, gpa: u64, pages: u64) -> Slot {
        Slot {
            key: SlotKey {
                address_space,
                id: 3,
            },
            gpa: gpa * PAGE_SIZE,
            block: BlockId(0),
            range: PageRange::new(0, pages),
            readonly: false,
        }
    }

    proptest! {
        #[test]
        fn a_key_survives_kvms_packing(address_space: u16, id: u16) {
            let key = SlotKey { address_space, id };
            prop_assert_eq!(key.raw(), u32::from(address_space) * 65_536 + u32::from(id));
            prop_assert_eq!(SlotKey::from_raw(key.raw()), key);
        }

        #[test]
        fn slots_overlap_where_they_share_a_guest_page(a in 0u64..20, n in 1u64..20, b in 0u64..20, m in 1u64..20) {
            let share = (a..a + n).any(|page| (b..b + m).contains(&page));
            prop_assert_eq!(slot(0, a, n).overlaps(&slot(0, b, m)), share);
            prop_assert!(!slot(0, a, n).overlaps(&slot(1, b, m)), "address spaces are apart");
        }
    }

    #[test]
    fn the_same_backing_may_lie_anywhere_but_must_show_the_same_pages_in_the_same_way() {
        let one = slot(0, 5, 4);
        let moved = Slot {
            key: 9.into(),
            gpa: 0,
            ..one
        };
        assert!(one.same_backing(&moved));
        for other in [
            Slot {
                block: BlockId(1),
                ..one
            },
            Slot {
                range: PageRange::new(1, 4),
                ..one
            },
            Slot {
                readonly: true,
                ..one
            },
        ] {
            assert!(!one.same_backing(&other));
        }
    }

    #[test]
    fn a_slot_says_where_it_is() {
        let one = slot(1, 5, 4);
        assert_eq!(one.address(), GuestAddress(5 * 4096));
        assert_eq!(one.gpa_end(), 9 * 4096);
        assert_eq!(slot(0, 5, u64::MAX).gpa_end(), u64::MAX);
        assert_eq!(one.key.to_string(), "slot 1:3");
        assert_eq!(SlotKey::from(3).to_string(), "slot 3");
    }
}
