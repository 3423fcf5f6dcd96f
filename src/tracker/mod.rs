//! The tracker: one VM's dirty pages through any change of its memory slots.
//!
//! One VM-wide lock covers whole transactions, and whole harvests from collecting to publishing: a bit that has left its
//! source and is not in the store yet can't meet another layout.

mod allowance;
mod blackouts;
mod builder;
mod consumer;
mod harvest;
mod logging;
mod pace;
mod plan;
mod reaper;
mod report;
mod throttle;
mod transaction;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use gleaner_bitmap::mutant::{self, Mutant};
use gleaner_bitmap::{
    BlockId, DirtyStore, HarvestReport, Harvester, Layout, PageBitmap, PageRange, SlotKey, Start,
};
use gleaner_ring::{BitmapSource, Capabilities, Kvm, Mode, RingSource, Vcpu};

pub use blackouts::{Blackouts, Histogram};
pub use builder::TrackerBuilder;
pub use consumer::{Consumer, Leased};
#[cfg(feature = "cli")]
pub(crate) use plan::plan;
pub use report::{Blackout, TransactionReport};
pub use throttle::Throttling;
pub use transaction::Transaction;

use crate::gate::{Gate, Seat, StoppedVcpus};
use crate::writers::{QuietWriters, Writers, Writing};
use crate::{Block, Error, ExternalLog, Result};
use reaper::{Reaper, RingRequest};

/// KVM's own log, in the mode that was settled.
enum KvmLog {
    Bitmap(BitmapSource),
    Ring(RingSource),
}

/// What the VM-wide lock protects.
struct State {
    layout: Arc<Layout>,
    blocks: BTreeMap<BlockId, Block>,
    log: KvmLog,
    harvester: Harvester,
    external: Vec<Box<dyn ExternalLog>>,
    /// Devices that write guest memory and report nothing.
    unlogged: Vec<String>,
    /// Blocks that were removed: their ids may still be in leases.
    retired: BTreeSet<BlockId>,
    /// The guest is stopped for a switchover: the destination builds this layout.
    frozen: bool,
    /// Slots carry the log flag, because a consumer exists.
    logging: bool,
    /// A rollback failed: tracker and KVM no longer agree.
    broken: bool,
}

struct Shared {
    kvm: Arc<dyn Kvm>,
    mode: Mode,
    capabilities: Capabilities,
    gate: Arc<Gate>,
    writers: Writers,
    store: Arc<DirtyStore>,
    pool: Option<Arc<rayon::ThreadPool>>,
    reaper: Arc<Reaper>,
    transactions: AtomicU64,
    /// Apart from the state, so that asking waits for nobody.
    blackouts: Mutex<Blackouts>,
    /// There is a [`Throttling`].
    throttled: AtomicBool,
    /// The guest runs elsewhere.
    away: AtomicBool,
    state: Mutex<State>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn blackouts(&self) -> MutexGuard<'_, Blackouts> {
        self.blackouts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.reaper.shutdown();
        self.gate.shutdown();
    }
}

/// Follows every page a guest dirties. A handle: clones share the one tracker of the VM.
#[derive(Clone)]
pub struct Tracker(Arc<Shared>);

impl std::fmt::Debug for Tracker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tracker")
            .field("mode", &self.0.mode)
            .finish_non_exhaustive()
    }
}

impl Tracker {
    /// How dirty pages are tracked.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.0.mode
    }

    /// The layout in force.
    #[must_use]
    pub fn layout(&self) -> Arc<Layout> {
        Arc::clone(&self.0.lock().layout)
    }

    /// A block of the layout in force.
    #[must_use]
    pub fn block(&self, id: BlockId) -> Option<Block> {
        self.0.lock().blocks.get(&id).cloned()
    }

    /// Transactions committed so far.
    pub fn transactions(&self) -> u64 {
        self.0.transactions.load(Ordering::Relaxed)
    }

    /// The blackouts of all transactions so far.
    #[must_use]
    pub fn blackouts(&self) -> Blackouts {
        *self.0.blackouts()
    }

    /// Times that a vCPU left `KVM_RUN` because its dirty ring was full, and waited until it was emptied: none while the
    /// reaper keeps up. None in other modes.
    #[must_use]
    pub fn ring_full_exits(&self) -> u64 {
        self.0.reaper.full_exits()
    }

    /// Whether the guest has migrated away: it runs elsewhere, and nothing is written here any more.
    #[must_use]
    pub fn is_migrated_away(&self) -> bool {
        self.0.away.load(Ordering::SeqCst)
    }

    pub(crate) fn migrated_away(&self) {
        self.0.away.store(true, Ordering::SeqCst);
    }

    /// The gate that vCPU threads pass.
    #[must_use]
    pub fn gate(&self) -> &Arc<Gate> {
        &self.0.gate
    }

    /// The VMM's own writers of guest memory.
    #[must_use]
    pub fn writers(&self) -> &Writers {
        &self.0.writers
    }

    /// A seat for the calling thread, before its vCPU runs for the first time. In ring mode the vCPU's ring is mapped, so
    /// no reaper ever meets a vCPU whose ring it can't read.
    ///
    /// # Errors
    /// [`Error::SeatTaken`], [`Error::RunPage`], [`Error::Kvm`] when the ring can't be mapped.
    pub fn register(&self, vcpu: &impl Vcpu, id: u64) -> Result<Seat> {
        let ring: Option<Box<dyn crate::gate::RingFull>> = match self.0.mode {
            Mode::Ring { bytes } => {
                let mut state = self.0.lock();
                let KvmLog::Ring(source) = &mut state.log else {
                    unreachable!("ring mode has a ring source: both are set once, by the builder");
                };
                let handle = source.add(id, vcpu.identity(), || vcpu.ring(id, bytes))?;
                Some(Box::new(RingRequest::new(
                    Arc::clone(&self.0.reaper),
                    handle,
                )))
            }
            Mode::Bitmap | Mode::BitmapClear => None,
        };
        Seat::new(&self.0.gate, vcpu, id, ring)
    }

    /// Collects from every dirty source, re-arms, publishes. Whatever was dirtied before this call is in the store when it
    /// returns.
    ///
    /// # Errors
    /// [`Error::Bitmap`], [`Error::Kvm`]: what was collected is held back, and published by the next harvest that succeeds.
    pub fn harvest(&self) -> Result<HarvestReport> {
        self.timed_harvest().map(|(report, _)| report)
    }

    /// A harvest and what it took, without the wait for a transaction or for another harvest.
    pub(crate) fn timed_harvest(&self) -> Result<(HarvestReport, Duration)> {
        let mut state = self.0.lock();
        let began = Instant::now();
        let report = self.0.harvest_all(&mut state)?;
        Ok((report, began.elapsed()))
    }

    /// A new consumer of the dirty store. The first one switches logging on: with manual protection and
    /// [`Start::AllDirty`] in an instant, if the kernel can start logs with all bits set (Linux 5.8 and later); leases pay for
    /// it then, each 64 MiB once.
    ///
    /// # Errors
    /// [`Error::UnloggedWriter`] while a device reports nothing; [`Error::Kvm`] when logging can't be switched on, which is
    /// off everywhere then, or when memory can't be armed that another consumer has not leased yet.
    pub fn consumer(&self, start: Start) -> Result<Consumer> {
        let mut state = self.0.lock();
        if let Some(device) = state.unlogged.first()
            && !mutant::is_planted(Mutant::SilentDeviceTaken)
        {
            return Err(Error::UnloggedWriter {
                device: device.clone(),
            });
        }
        if state.logging {
            if start == Start::Empty {
                self.0.arm_all(&mut state)?;
            }
            // What came before belongs to the others alone.
            self.0.harvest_all(&mut state)?;
        } else {
            self.0.start_logging(&mut state, start)?;
        }
        let consumer = self.0.store.consumer(start);
        drop(state);
        Ok(Consumer::new(Arc::clone(&self.0), consumer))
    }

    /// A transaction: steps are gathered, then committed all or nothing.
    pub fn transaction(&self) -> Transaction<'_> {
        Transaction::new(&self.0)
    }

    /// Takes a device that writes guest memory and keeps a log of it.
    ///
    /// # Errors
    /// [`Error::ExternalLog`] when it can't follow the layout in force; it is not attached then.
    pub fn attach(&self, mut log: Box<dyn ExternalLog>) -> Result<()> {
        let mut state = self.0.lock();
        // It may have been made for an earlier layout.
        let told = log.pause().and_then(|()| log.layout_changed(&state.layout));
        log.resume();
        told.map_err(|reason| Error::ExternalLog {
            device: log.name(),
            reason,
        })?;
        state.external.push(log);
        Ok(())
    }

    /// Takes a device that writes guest memory and reports nothing. While it is there, no consumer can be.
    ///
    /// # Errors
    /// [`Error::UnloggedWriter`] while a consumer exists: its destination would miss what the device writes.
    pub fn attach_unlogged(&self, device: &str) -> Result<()> {
        let mut state = self.0.lock();
        if state.logging {
            return Err(Error::UnloggedWriter {
                device: device.into(),
            });
        }
        state.unlogged.push(device.into());
        Ok(())
    }

    /// Takes a device away, by name. A device with a log is paused for good and harvested a last time.
    ///
    /// # Errors
    /// [`Error::ExternalLog`] and those of [`Tracker::harvest`]; the device is still attached and goes on then.
    pub fn detach(&self, device: &str) -> Result<()> {
        let mut state = self.0.lock();
        if let Some(at) = state.external.iter().position(|l| l.name() == device) {
            let paused = state.external[at]
                .pause()
                .map_err(|reason| Error::ExternalLog {
                    device: device.into(),
                    reason,
                });
            let harvested = paused.and_then(|()| {
                if mutant::is_planted(Mutant::LogDroppedAtDetach) {
                    return Ok(HarvestReport::default());
                }
                self.0.harvest_all(&mut state)
            });
            if let Err(error) = harvested {
                state.external[at].resume();
                return Err(error);
            }
            drop(state.external.remove(at));
        }
        state.unlogged.retain(|d| d != device);
        Ok(())
    }

    /// What any consumer has dirty or on lease in a slot; bit `n` is page `n` of the slot. `None` when there is no such slot.
    #[must_use]
    pub fn slot_bitmap(&self, key: impl Into<SlotKey>) -> Option<PageBitmap> {
        let state = self.0.lock();
        let slot = *state.layout.slot(key.into())?;
        let all = self.0.store.snapshot(&[slot.block]);
        Some(all.get(&slot.block)?.slice(slot.range))
    }

    /// Gives pages of a block back to the host: see [`Block::discard`]. For every consumer it is a write of zeros, which is
    /// why it takes a writer's token.
    ///
    /// # Errors
    /// [`Error::Bitmap`] for a block or range that is not there; those of [`Block::discard`].
    pub fn discard(&self, _: &Writing, block: BlockId, range: PageRange) -> Result<()> {
        let block = self
            .block(block)
            .ok_or(gleaner_bitmap::Error::UnknownBlock { block })?;
        block.discard(range)
    }

    /// Stops the guest: every vCPU thread parked with its I/O complete, every writer of the VMM's out, the layout as it is.
    /// `pause_devices` runs once the vCPUs are parked, and has to leave no device writing.
    ///
    /// # Errors
    /// [`Error::KickTimeout`], [`Error::WritersBusy`], [`Error::AlreadyStopped`], [`Error::ExternalLog`] with what
    /// `pause_devices` says. The guest runs on, unless it was stopped before.
    pub fn stop(
        &self,
        pause_devices: impl FnOnce() -> std::result::Result<(), String>,
    ) -> Result<StoppedGuest> {
        let vcpus = self.0.gate.stop()?;
        pause_devices().map_err(|reason| Error::ExternalLog {
            device: "devices".into(),
            reason,
        })?;
        let quiet = self.0.writers.quiet(QUIET_LIMIT)?;
        // A transaction that is under way is waited for here.
        self.0.lock().frozen = true;
        Ok(StoppedGuest {
            thaw: Thaw {
                shared: Arc::clone(&self.0),
                for_good: false,
            },
            quiet,
            vcpus,
        })
    }

    /// Ends vCPU threads ([`Seat::run`] returns `Shutdown`) and the reaper.
    pub fn shutdown(&self) {
        self.0.gate.shutdown();
        self.0.reaper.shutdown();
    }
}

/// How long the VMM's writers may take to finish when the guest is stopped.
const QUIET_LIMIT: Duration = Duration::from_secs(10);

/// Lets the layout change again when it is dropped, unless it is to stay as it is for good.
struct Thaw {
    shared: Arc<Shared>,
    for_good: bool,
}

impl std::fmt::Debug for Thaw {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Thaw")
    }
}

impl Drop for Thaw {
    fn drop(&mut self) {
        if !self.for_good {
            self.shared.lock().frozen = false;
        }
    }
}

/// Nothing writes guest memory any more: vCPUs are parked, writers out. Dropping it lets everything go on.
#[derive(Debug)]
#[must_use = "dropping it lets the guest go on"]
pub struct StoppedGuest {
    // In this order: the layout may change and writers go on before the vCPUs do.
    thaw: Thaw,
    quiet: QuietWriters,
    vcpus: StoppedVcpus,
}

impl StoppedGuest {
    /// Leaves it stopped for good: it may run elsewhere. Its memory is given back with the tracker.
    pub(crate) fn keep(mut self) {
        self.thaw.for_good = true;
        self.quiet.keep();
        self.vcpus.keep();
    }

    /// The stopped vCPUs, for saving their state.
    pub const fn vcpus(&self) -> &StoppedVcpus {
        &self.vcpus
    }
}
