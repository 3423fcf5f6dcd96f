//! What can go wrong in this crate.

use crate::{BlockId, PageRange, SlotKey};

/// An error of this crate. After any of them the object it came from is as it was before the call, unless the
/// variant says otherwise.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A length or address that must be a positive multiple of the page size is not.
    #[error("{what} {value:#x} is not a positive multiple of 4096")]
    Unaligned {
        /// Which value.
        what: &'static str,
        /// The value.
        value: u64,
    },
    /// A block's name can't be used.
    #[error(
        "block name \"{name}\" is not usable: 1 to 64 characters of A-Z a-z 0-9 . _ - : @, not starting with a dot"
    )]
    BlockName {
        /// The name, escaped and cut.
        name: String,
    },
    /// The name belongs to a block that exists.
    #[error("a block named \"{name}\" exists already: remove it first, or choose another name")]
    BlockNameTaken {
        /// The name.
        name: String,
    },
    /// No such block in the layout.
    #[error("block {block} is not part of the layout")]
    UnknownBlock {
        /// The block.
        block: BlockId,
    },
    /// The block is still mapped.
    #[error("block {block} is still mapped by {slot}: delete its slots first")]
    BlockInUse {
        /// The block.
        block: BlockId,
        /// A slot that maps it.
        slot: SlotKey,
    },
    /// A range reaches past its block.
    #[error("pages {}..{} lie outside block {block}, which has {pages} pages", range.first, range.end())]
    OutsideBlock {
        /// The block.
        block: BlockId,
        /// Its length in pages.
        pages: u64,
        /// The offending range.
        range: PageRange,
    },
    /// No such slot in the layout.
    #[error("{slot} does not exist")]
    UnknownSlot {
        /// The slot.
        slot: SlotKey,
    },
    /// The slot id is taken.
    #[error("{slot} exists already: delete it first, or use another id")]
    SlotExists {
        /// The slot.
        slot: SlotKey,
    },
    /// Two slots claim the same guest-physical memory.
    #[error("{slot} at {gpa:#x}..{end:#x} overlaps {other}")]
    Overlap {
        /// The slot that was to be placed.
        slot: SlotKey,
        /// Its guest-physical start.
        gpa: u64,
        /// The byte after its end.
        end: u64,
        /// The slot in its way.
        other: SlotKey,
    },
    /// The guest-physical range wraps or exceeds what KVM can address (2^52 bytes on x86).
    #[error("{slot} at {gpa:#x} with {pages} pages does not fit into guest-physical space")]
    OutOfAddressSpace {
        /// The slot.
        slot: SlotKey,
        /// Its guest-physical start.
        gpa: u64,
        /// Its length.
        pages: u64,
    },
    /// Slot ids end here.
    #[error("{slot}: KVM has {limit} slots, ids 0 to {}", limit - 1)]
    TooManySlots {
        /// The slot.
        slot: SlotKey,
        /// Number of slots.
        limit: u32,
    },
    /// A split, hole or resize outside of its slot.
    #[error("{slot} has {pages} pages: {what} at page {at} is not possible")]
    BadCut {
        /// The slot.
        slot: SlotKey,
        /// What was asked for.
        what: &'static str,
        /// Where, in pages from the slot's start.
        at: u64,
        /// The slot's length.
        pages: u64,
    },
    /// Two slots that do not continue each other can't be merged.
    #[error(
        "{left} and {right} can't be merged: guest addresses or block pages do not continue, or access differs"
    )]
    NotAdjacent {
        /// The lower slot.
        left: SlotKey,
        /// The upper slot.
        right: SlotKey,
    },
    /// Bitmaps of different lengths were to be combined.
    #[error("bitmaps of {left} and {right} pages can't be combined")]
    LengthMismatch {
        /// Pages of the destination.
        left: u64,
        /// Pages of the operand.
        right: u64,
    },
    /// The VMM wrote guest memory outside of the log that must record it. Sticky: every harvest fails until the
    /// block is removed, because a write is known to have gone unrecorded.
    #[error(
        "write log of block {block}: a mark at byte {offset} of {len} bytes lies outside its window; that write went unrecorded, remove the block or start again"
    )]
    MarkOutside {
        /// The block.
        block: BlockId,
        /// Offset of the first byte in the window.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// A dirty source failed. What it had collected is held back and will be published by the next harvest that
    /// succeeds; nothing is lost and nothing can be read meanwhile.
    #[error("dirty source {source_name}: {cause}")]
    Source {
        /// Which source.
        source_name: String,
        /// Why.
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A source could not be re-armed for all that was collected. Its pages are held back from every lease until it
    /// is healed.
    #[error(
        "dirty source {source_name}: re-armed {rearmed} of {collected} pages; they are held back until the log is healed"
    )]
    RearmShort {
        /// Which source.
        source_name: String,
        /// Pages collected and awaiting re-arming.
        collected: u64,
        /// Pages the kernel says it re-armed.
        rearmed: u64,
    },
    /// No such consumer any more.
    #[error("the consumer is gone")]
    ConsumerGone,
}

/// The result of this crate's operations.
pub type Result<T> = std::result::Result<T, Error>;
