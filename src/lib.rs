//! Dirty-page tracking for KVM that follows every page through any change of memory slots.
//!
//! ```text
//! tracker.harvest()        collect from every dirty source, re-arm, publish into the store
//! tracker.transaction()    from one slot layout to the next, all or nothing, no page lost
//! tracker.consumer()       an independent reader: a sender, a rate meter, a snapshot
//! consumer.lease()         dirty pages, re-armed, so that their contents may be read
//! lease.ack()              applied at the destination; a dropped lease falls back
//! tracker.stop()           nothing writes guest memory any more: the switchover
//! ```

mod block;
#[cfg(feature = "cli")]
pub mod cli;
mod codec;
mod error;
mod external;
pub mod gate;
pub mod service;
mod source;
mod tracker;
mod vhost_log;
#[cfg(feature = "reference-vmm")]
pub mod vmm;
mod writers;

pub use block::Block;
pub use error::{Error, Result};
pub use external::ExternalLog;
pub use gleaner_bitmap::{
    BlockId, BlockInfo, Collected, Extent, Generation, HarvestReport, Layout, PAGE_SIZE,
    PageBitmap, PageRange, Slot, SlotKey, Start, WriteLog, WriteLogSlice,
};
pub use gleaner_ring::{Capabilities, Mode, Tracking};
pub use source::{Hooks, LocalSource};
pub use tracker::{
    Blackout, Consumer, Leased, StoppedGuest, Tracker, TrackerBuilder, Transaction,
    TransactionReport,
};
pub use vhost_log::{VhostBackend, VhostLog};
pub use writers::{QuietWriters, Writers, Writing};
