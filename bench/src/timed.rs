//! KVM's memory calls, with their time kept: what is left of a harvest or a transaction is user space.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use gleaner_bitmap::{PageRange, SlotKey};
use gleaner_ring::{Capabilities, Kvm, Mode, Region, Reset};

use crate::sample::time;

/// See the module.
pub struct TimedKvm {
    kvm: Arc<dyn Kvm>,
    nanos: AtomicU64,
}

impl TimedKvm {
    pub fn new(kvm: Arc<dyn Kvm>) -> Arc<Self> {
        Arc::new(Self {
            kvm,
            nanos: AtomicU64::new(0),
        })
    }

    /// Nanoseconds in KVM since the last time that this was asked.
    pub fn take_ns(&self) -> f64 {
        self.nanos.swap(0, Ordering::Relaxed) as f64
    }

    fn timed<T>(&self, call: impl FnOnce(&dyn Kvm) -> T) -> T {
        let (took, value) = time(|| call(&*self.kvm));
        self.nanos
            .fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
        value
    }
}

impl Kvm for TimedKvm {
    fn capabilities(&self) -> Capabilities {
        self.kvm.capabilities()
    }

    fn enable(&self, mode: Mode) -> gleaner_ring::Result<()> {
        self.kvm.enable(mode)
    }

    fn set_region(&self, what: &'static str, region: &Region) -> gleaner_ring::Result<()> {
        self.timed(|kvm| kvm.set_region(what, region))
    }

    fn delete_region(&self, key: SlotKey) -> gleaner_ring::Result<()> {
        self.timed(|kvm| kvm.delete_region(key))
    }

    fn get_dirty_log(&self, key: SlotKey, words: &mut [u64]) -> gleaner_ring::Result<()> {
        self.timed(|kvm| kvm.get_dirty_log(key, words))
    }

    fn clear_dirty_log(
        &self,
        key: SlotKey,
        range: PageRange,
        words: &[u64],
    ) -> gleaner_ring::Result<()> {
        self.timed(|kvm| kvm.clear_dirty_log(key, range, words))
    }

    fn reset_dirty_rings(&self) -> gleaner_ring::Result<Reset> {
        self.timed(|kvm| kvm.reset_dirty_rings())
    }

    fn set_manual_protect(&self, on: bool, initially_set: bool) -> gleaner_ring::Result<()> {
        self.timed(|kvm| kvm.set_manual_protect(on, initially_set))
    }
}
