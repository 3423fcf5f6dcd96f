//! What a transaction did and what it cost.

use std::collections::BTreeMap;
use std::time::Duration;

use gleaner_bitmap::{Generation, PageBitmap, SlotKey};

/// The time in which the gate was closed, by part. How soon a vCPU's thread gets a CPU after that is the scheduler's.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Blackout {
    /// Until every vCPU was out of `KVM_RUN`.
    pub kick: Duration,
    /// The harvest inside.
    pub harvest: Duration,
    /// KVM's own calls.
    pub calls: Duration,
    /// Everything else: external logs, the caller's `publish`, until the gate is open.
    pub rest: Duration,
}

impl Blackout {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.kick + self.harvest + self.calls + self.rest
    }
}

/// What a transaction did.
#[derive(Clone, Debug, Default)]
pub struct TransactionReport {
    /// The layout that is in force now.
    pub generation: Generation,
    /// KVM calls made.
    pub calls: usize,
    /// Swaps of the kernel's slot lists that they cost.
    pub list_swaps: u32,
    /// The guest's stall.
    pub blackout: Blackout,
    /// Pages that the harvests of this transaction brought into the store.
    pub harvested: u64,
    /// Dirty pages of changed slots that the new layout maps.
    pub carried: u64,
    /// Dirty pages of changed slots that no slot maps any more; they stay dirty in their block.
    pub unmapped: u64,
    /// Dirty pages of blocks that were removed.
    pub retired: u64,
    /// What each new or changed slot has dirty now, for any consumer. Empty while there is none.
    pub slots: BTreeMap<SlotKey, PageBitmap>,
}
