//! Pages, memory slots, layouts, dirty bitmaps and the dirty store of Gleaner.
//!
//! This crate knows neither KVM nor I/O, and has no `unsafe` code but in the kernels that are written for AVX2 and AVX-512. It keeps
//! the part of the work that must never go wrong: which page a dirty bit means, and who holds it at any moment.
//!
//! ```text
//! DirtySource --collect--> Collected --re-arm--> publish --> DirtyStore --lease--> Lease --ack--> gone
//!                (opaque: no page number comes out of it)         ^                  |
//!                                                                 +--- dropped ------+
//! ```
//!
//! * [`Slot`], [`Layout`]: what guest-physical memory maps, at one moment.
//! * [`PageBitmap`], [`Runs`]: bits by words; one kernel, [`or_bits`], serves every shift.
//! * [`WriteLog`]: the VMM's own writes, as a `vm_memory::bitmap::Bitmap`.
//! * [`DirtySource`], [`Harvester`]: collect, re-arm, publish, in this order and in no other.
//! * [`DirtyStore`], [`Consumer`], [`Lease`]: the bits by (block, page), a set for each consumer, in chunks that take no
//!   memory while they are all clean or all dirty.
//! * [`RemapPlan`]: where the dirty pages of one layout are in the next one.

mod atomic_bitmap;
mod bits;
mod block;
mod coverage;
mod edges;
mod error;
mod isa;
mod layout;
mod lease;
#[doc(hidden)]
pub mod mutant;
mod page;
mod page_bitmap;
mod page_set;
mod primitive;
mod remap;
mod runs;
mod slot;
mod source;
mod store;
mod write_log;

pub use bits::{count_bits, masked_words, or_bits};
pub use block::{BlockId, BlockInfo};
pub use error::{Error, Result};
pub use layout::{Generation, Layout, LayoutEditor};
pub use lease::{Consumer, Lease};
pub use page::{Extent, PAGE_SHIFT, PAGE_SIZE, PageRange, pages_of};
pub use page_bitmap::PageBitmap;
pub use remap::{RemapPlan, Remapped};
pub use runs::Runs;
pub use slot::{Slot, SlotKey};
pub use source::{Collected, DirtySource, HarvestReport, Harvester, Rearm, Scope};
pub use store::{ConsumerId, DirtyStore, Start};
pub use write_log::{WriteLog, WriteLogSlice};
