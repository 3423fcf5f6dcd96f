//! What the bytes of a history mean.

use gleaner_bitmap::SlotKey;

use crate::bytes::Bytes;

/// Number of steps.
pub const STEPS: usize = 11;
/// The number of edits, then the edits.
pub const TRANSACTION: usize = 0;
/// A vCPU writes: slot, page of the slot.
pub const WRITE: usize = 1;
/// The VMM or a device writes: block, page.
pub const DEVICE_WRITES: usize = 2;
/// Collect, re-arm, publish.
pub const HARVEST: usize = 3;
/// What becomes of a source from now on.
pub const FAULT: usize = 4;
/// A new consumer; an odd byte: that starts empty.
pub const CONSUMER: usize = 5;
/// Consumer, most pages.
pub const LEASE: usize = 6;
/// Consumer: its oldest lease was applied.
pub const ACK: usize = 7;
/// Consumer: its oldest lease was not.
pub const FALL_BACK: usize = 8;
/// Consumer: it goes, its leases stay.
pub const LEAVE: usize = 9;
/// Leases that stayed end.
pub const ORPHANS_END: usize = 10;

/// Number of edits.
pub const EDITS: usize = 11;
/// Pages.
pub const ADD_BLOCK: usize = 0;
/// Block.
pub const REMOVE_BLOCK: usize = 1;
/// Slot, guest page, block, first page, pages.
pub const CREATE: usize = 2;
/// Slot.
pub const DELETE: usize = 3;
/// All slots go.
pub const CLEAR: usize = 4;
/// Slot, guest page.
pub const MOVE: usize = 5;
/// Slot, odd: read-only.
pub const ACCESS: usize = 6;
/// Slot, pages.
pub const RESIZE: usize = 7;
/// Slot, page, upper slot.
pub const SPLIT: usize = 8;
/// Slot, page, pages, upper slot.
pub const PUNCH: usize = 9;
/// Lower slot, upper slot.
pub const MERGE: usize = 10;

/// A slot: one of eight ids, of which one is too many, in one of two address spaces.
pub fn key(bytes: &mut Bytes<'_>) -> Option<SlotKey> {
    let byte = bytes.byte()?;
    Some(SlotKey {
        address_space: u16::from(byte >> 3 & 1),
        id: u16::from(byte & 7),
    })
}
