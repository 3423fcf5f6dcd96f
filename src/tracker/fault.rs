//! Bugs to plant, for the project's own tests: a test that never fails shows nothing.

#[cfg(feature = "mutants")]
use std::sync::atomic::{AtomicU8, Ordering};

/// A bug that a test plants in a tracker, to see that it is found. Only with the feature `mutants`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[cfg_attr(not(feature = "mutants"), allow(dead_code))]
pub enum Fault {
    /// Transactions don't close the gate: vCPUs run while slots change.
    GateOpen = 1,
    /// Transactions harvest nothing, neither before nor inside.
    HarvestLeftOut = 2,
    /// Harvests publish first, and re-arm what they published when the next harvest begins. Plain bitmaps can't have this
    /// bug: fetching is re-arming.
    RearmLate = 3,
}

/// The bug that a tracker has. Without the feature `mutants` there is none.
#[derive(Debug, Default)]
pub(super) struct Planted {
    #[cfg(feature = "mutants")]
    fault: AtomicU8,
}

impl Planted {
    #[cfg(feature = "mutants")]
    pub(super) fn set(&self, fault: Option<Fault>) {
        self.fault
            .store(fault.map_or(0, |f| f as u8), Ordering::SeqCst);
    }

    #[cfg(feature = "mutants")]
    pub(super) fn is(&self, fault: Fault) -> bool {
        self.fault.load(Ordering::SeqCst) == fault as u8
    }

    #[cfg(not(feature = "mutants"))]
    #[allow(clippy::unused_self)] // as with the feature
    pub(super) const fn is(&self, _: Fault) -> bool {
        false
    }
}
