//! Dirty-page tracking for KVM that follows every page through any change of memory slots, and feeds a live migration.
//!
//! ```text
//! tracker.harvest()        collect from every dirty source, re-arm, publish into the store
//! tracker.transaction()    from one slot layout to the next, all or nothing, no page lost
//! tracker.consumer()       an independent reader: a sender, a rate meter, a snapshot
//! consumer.lease()         dirty pages, re-armed, so that their contents may be read
//! lease.ack()              applied at the destination; a dropped lease falls back
//! tracker.stop()           nothing writes guest memory any more: the switchover
//! ```
//!
//! # The way of a dirty bit
//!
//! ```text
//!  vCPUs, VMM, devices write
//!         |
//!   dirty sources        KVM bitmap | KVM bitmap + CLEAR | KVM rings | WriteLog | ExternalLog
//!         |  harvest = collect, re-arm, publish       (one VM-wide lock covers all three, and whole transactions)
//!         v
//!   dirty store          keyed by (block, page): a slot may come and go, the bit stays
//!         |  a lease for each consumer; ack = applied at the destination
//!    +----+--------+-----------+
//!  sender     rate meter    snapshot
//! ```
//!
//! # Laws
//!
//! 1. **Conservation.** Every page that is dirty before a transaction, or harvested in it, is dirty after it, except pages of a
//!    block that the same transaction removed ([`TransactionReport::retired`]). What no slot maps any more stays dirty in its
//!    block.
//! 2. **Precision.** A transaction makes no page dirty beyond new memory and what KVM reports.
//! 3. **Re-arm before read.** Page numbers come out of the store alone, as a [`Leased`]; a bit gets into the store only after
//!    its source was re-armed for it (the `Harvester` of `gleaner-bitmap`), or because all memory is dirty to begin with, and
//!    is armed before it is leased for the first time (the `BitmapSource` of `gleaner-ring`).
//! 4. **Each dirtying is in exactly one of: source, store, lease, acknowledged.** An ack never touches the store; a page on
//!    lease is not leased again to the same consumer.
//! 5. **Generations.** A bit is interpreted by the layout it was recorded under: all rings are drained and reset before a
//!    layout changes.
//! 6. **Failure.** After any error its value says what state things are in; tracker and KVM agree, no bit is gone, and the vCPUs
//!    run again, unless the error says otherwise ([`Error::RollbackFailed`]).
//!
//! # Where things are
//!
//! [`Tracker`] and its [`Transaction`]s; the [`gate`] that vCPU threads pass; [`LocalSource`], which a
//! [`migrate::Sender`] drives in this process, and the [`service`], through which an agent in another process does; the
//! [`rate`] meter; `qmp`, for tools that speak QEMU's protocol; `vmm`, the reference VMM; [`compare`], what a call
//! that KVM does not have would be worth.

mod block;
#[cfg(feature = "cli")]
pub mod cli;
mod codec;
#[cfg(feature = "cli")]
pub mod compare;
mod error;
mod external;
pub mod gate;
#[cfg(loom)]
#[path = "../ring/src/loom_atomic.rs"]
mod loom_atomic;
#[cfg(all(loom, test))]
mod loom_model;
mod primitive;
#[cfg(feature = "qmp")]
pub mod qmp;
pub mod rate;
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
    BlockId, BlockInfo, Collected, Error as BitmapError, Extent, Generation, HarvestReport, Layout,
    PAGE_SIZE, PageBitmap, PageRange, Slot, SlotKey, Start, WriteLog, WriteLogSlice,
};
pub use gleaner_migrate as migrate;
pub use gleaner_ring::{Capabilities, Mode, Tracking, model};
pub use source::{Hooks, LocalSource};
pub use tracker::{
    Blackout, Blackouts, Consumer, Histogram, Leased, StoppedGuest, Throttling, Tracker,
    TrackerBuilder, Transaction, TransactionReport,
};
pub use vhost_log::{VhostBackend, VhostLog};
pub use writers::{QuietWriters, Writers, Writing};

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
