//! Building a tracker.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};

use gleaner_bitmap::{DirtyStore, Harvester, Layout};
use gleaner_ring::{BitmapSource, Capabilities, Kvm, Mode, RingSource, StockKvm, Tracking};
use kvm_ioctls::VmFd;

use super::{KvmLog, Reaper, Shared, State, Tracker, reaper};
use crate::gate::Gate;
use crate::{Result, writers::Writers};

/// What a tracker is built from. Build it before the first vCPU: rings can't be enabled later.
#[derive(Debug)]
pub struct TrackerBuilder {
    vm: Arc<VmFd>,
    tracking: Tracking,
    kick_signal: i32,
    pool: Option<Arc<rayon::ThreadPool>>,
    #[cfg(feature = "mutants")]
    between: Between,
}

/// Who stands between the tracker and KVM.
#[cfg(feature = "mutants")]
#[derive(Default)]
struct Between(Option<Insert>);

#[cfg(feature = "mutants")]
type Insert = Box<dyn FnOnce(Arc<dyn Kvm>) -> Arc<dyn Kvm> + Send>;

#[cfg(feature = "mutants")]
impl std::fmt::Debug for Between {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Between").field(&self.0.is_some()).finish()
    }
}

impl Tracker {
    /// A tracker for `vm`, whose slots are made through it alone.
    #[must_use]
    pub fn builder(vm: Arc<VmFd>) -> TrackerBuilder {
        TrackerBuilder {
            vm,
            tracking: Tracking::Auto,
            kick_signal: libc::SIGRTMIN(),
            pool: None,
            #[cfg(feature = "mutants")]
            between: Between::default(),
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
    pub fn between(
        mut self,
        between: impl FnOnce(Arc<dyn Kvm>) -> Arc<dyn Kvm> + Send + 'static,
    ) -> Self {
        self.between = Between(Some(Box::new(between)));
        self
    }

    /// Builds the tracker: settles the mode and enables what it needs.
    ///
    /// # Errors
    /// [`crate::Error::Kvm`] when the kernel does not offer the mode or a vCPU exists already; [`crate::Error::KickSignal`];
    /// [`crate::Error::Thread`].
    pub fn build(self) -> Result<Tracker> {
        let capabilities = Capabilities::query(&self.vm);
        let mode = capabilities.enable(&self.vm, self.tracking)?;
        let kvm: Arc<dyn Kvm> = Arc::new(StockKvm::new(self.vm));
        #[cfg(feature = "mutants")]
        let kvm = match self.between.0 {
            Some(between) => between(kvm),
            None => kvm,
        };
        Self::assemble(kvm, mode, capabilities, self.kick_signal, self.pool)
    }

    fn assemble(
        kvm: Arc<dyn Kvm>,
        mode: Mode,
        capabilities: Capabilities,
        kick_signal: i32,
        pool: Option<Arc<rayon::ThreadPool>>,
    ) -> Result<Tracker> {
        let log = match mode {
            Mode::Bitmap => KvmLog::Bitmap(BitmapSource::new(Arc::clone(&kvm), false)),
            Mode::BitmapClear => KvmLog::Bitmap(BitmapSource::new(Arc::clone(&kvm), true)),
            Mode::Ring { .. } => KvmLog::Ring(RingSource::new(Arc::clone(&kvm))),
        };
        let shared = Arc::new(Shared {
            kvm,
            mode,
            capabilities,
            gate: Arc::new(Gate::new(kick_signal)?),
            writers: Writers::default(),
            store: Arc::new(DirtyStore::default()),
            pool,
            reaper: Arc::new(Reaper::default()),
            transactions: AtomicU64::new(0),
            planted: super::fault::Planted::default(),
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
        if let Mode::Ring { .. } = mode {
            reaper::start(&shared)?;
        }
        Ok(Tracker(shared))
    }
}
