//! Building a tracker.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex};

use gleaner_bitmap::{DirtyStore, Harvester, Layout};
use gleaner_ring::{BitmapSource, Kvm, Mode, RingSource, StockKvm, Tracking};
use kvm_ioctls::VmFd;

use super::{KvmLog, Reaper, Shared, State, Tracker, reaper};
use crate::gate::Gate;
use crate::{Result, writers::Writers};

/// What a tracker is built from. Build it before the first vCPU: rings can't be enabled later.
pub struct TrackerBuilder {
    kvm: Arc<dyn Kvm>,
    tracking: Tracking,
    kick_signal: i32,
    pool: Option<Arc<rayon::ThreadPool>>,
    reaper: bool,
}

impl std::fmt::Debug for TrackerBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TrackerBuilder")
            .field("tracking", &self.tracking)
            .field("kick_signal", &self.kick_signal)
            .finish_non_exhaustive()
    }
}

impl Tracker {
    /// A tracker for `vm`, whose slots are made through it alone.
    #[must_use]
    pub fn builder(vm: Arc<VmFd>) -> TrackerBuilder {
        Self::on(Arc::new(StockKvm::new(vm)))
    }

    /// A tracker on whatever makes the memory calls: KVM, or the model.
    #[must_use]
    pub fn on(kvm: Arc<dyn Kvm>) -> TrackerBuilder {
        TrackerBuilder {
            kvm,
            tracking: Tracking::Auto,
            kick_signal: libc::SIGRTMIN(),
            pool: None,
            reaper: true,
        }
    }
}

impl TrackerBuilder {
    /// How to track dirty pages; [`Tracking::Auto`] unless set.
    #[must_use]
    pub const fn tracking(mut self, tracking: Tracking) -> Self {
        self.tracking = tracking;
        self
    }

    /// The signal that gets vCPU threads out of `KVM_RUN`; `SIGRTMIN` unless set. Gleaner installs a handler for it that
    /// does nothing.
    #[must_use]
    pub const fn kick_signal(mut self, signal: i32) -> Self {
        self.kick_signal = signal;
        self
    }

    /// The pool in which bits are remapped; rayon's global one unless set.
    #[must_use]
    pub fn pool(mut self, pool: Arc<rayon::ThreadPool>) -> Self {
        self.pool = Some(pool);
        self
    }

    /// Lets `between` stand between the tracker and KVM, for the project's own tests: calls that fail, or lie.
    #[cfg(feature = "mutants")]
    #[must_use]
    pub fn between(mut self, between: impl FnOnce(Arc<dyn Kvm>) -> Arc<dyn Kvm>) -> Self {
        self.kvm = between(self.kvm);
        self
    }

    /// No thread empties the rings: whoever runs the vCPUs harvests when one is full. For simulations, which do one thing
    /// after the other.
    #[cfg(feature = "mutants")]
    #[must_use]
    pub const fn without_reaper(mut self) -> Self {
        self.reaper = false;
        self
    }

    /// Builds the tracker: settles the mode and enables what it needs.
    ///
    /// # Errors
    /// [`crate::Error::Kvm`] when the kernel does not offer the mode or a vCPU exists already; [`crate::Error::KickSignal`];
    /// [`crate::Error::Thread`].
    pub fn build(self) -> Result<Tracker> {
        let kvm = self.kvm;
        let capabilities = kvm.capabilities();
        let mode = capabilities.settle(self.tracking)?;
        kvm.enable(mode)?;
        let log = match mode {
            Mode::Bitmap => KvmLog::Bitmap(BitmapSource::new(Arc::clone(&kvm), false)),
            Mode::BitmapClear => KvmLog::Bitmap(BitmapSource::new(Arc::clone(&kvm), true)),
            Mode::Ring { .. } => KvmLog::Ring(RingSource::new(Arc::clone(&kvm))),
        };
        let shared = Arc::new(Shared {
            kvm,
            mode,
            capabilities,
            gate: Arc::new(Gate::new(self.kick_signal)?),
            writers: Writers::default(),
            store: Arc::new(DirtyStore::default()),
            pool: self.pool,
            reaper: Arc::new(Reaper::default()),
            transactions: AtomicU64::new(0),
            blackouts: Mutex::default(),
            throttled: AtomicBool::new(false),
            away: AtomicBool::new(false),
            state: Mutex::new(State {
                layout: Arc::new(Layout::empty(capabilities.slot_limit)),
                blocks: BTreeMap::new(),
                log,
                harvester: Harvester::default(),
                external: Vec::new(),
                unlogged: Vec::new(),
                retired: BTreeSet::new(),
                frozen: false,
                logging: false,
                broken: false,
            }),
        });
        if self.reaper && matches!(mode, Mode::Ring { .. }) {
            reaper::start(&shared)?;
        }
        Ok(Tracker(shared))
    }
}
