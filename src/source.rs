//! A tracker as the source of a migration, in the process that runs the guest.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use gleaner_bitmap::mutant::{self, Mutant};
use gleaner_bitmap::{BlockId, Layout, Start};
use gleaner_migrate::{
    Error as MigrateError, Harvested, LeaseId, LeasedPart, Memory, PageLease, Result, Source,
    Throttle, Throttles,
};

use crate::gate::StoppedVcpus;
use crate::{Block, Consumer, Error, Leased, StoppedGuest, Throttling, Tracker};

/// What the VMM does at a switchover.
pub trait Hooks: Send {
    /// Every vCPU is parked: pause devices and external logs, so that nothing but the VMM's counted writers is left.
    ///
    /// # Errors
    /// Why it can't; the guest goes on.
    fn pause_devices(&mut self) -> std::result::Result<(), String>;

    /// Device and vCPU state, as the destination's VMM wants it. It may write guest memory.
    ///
    /// # Errors
    /// Why it can't; the guest goes on.
    fn save(&mut self, stopped: &StoppedVcpus) -> std::result::Result<Vec<u8>, String>;

    /// The guest goes on here: devices may too.
    fn resume(&mut self);

    /// The guest runs elsewhere. It stays stopped here.
    fn migrated_away(&mut self);
}

/// Where the guest is.
#[derive(Debug)]
enum Guest {
    /// It runs here.
    Running,
    /// It is stopped here.
    Stopped(StoppedGuest),
    /// It may run elsewhere: only a proven refusal lets it go on here.
    Relinquished(StoppedGuest),
    /// It runs elsewhere, and never here again.
    Away(StoppedGuest),
}

/// What is dirty for the destination of an attempt.
#[derive(Debug)]
enum Log {
    /// Nobody has asked yet.
    Off,
    /// Since the first who asked.
    On(Consumer),
    /// The attempt has ended.
    Ended,
}

/// A [`Source`] on a tracker in this process, for one attempt: its consumer starts all-dirty, because nothing is known of
/// what the destination holds, and is gone when the attempt has ended. Another attempt takes another `LocalSource`.
///
/// Dropped before [`Source::relinquish`], the guest goes on; dropped after it, the guest may be running elsewhere, and stays
/// stopped here for good.
pub struct LocalSource {
    tracker: Tracker,
    hooks: Box<dyn Hooks>,
    log: Log,
    leases: BTreeMap<LeaseId, Leased>,
    next_lease: u64,
    guest: Guest,
    throttling: Option<Throttling>,
    transactions_before: u64,
}

impl std::fmt::Debug for LocalSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LocalSource")
            .field("leases", &self.leases.len())
            .field("guest", &self.guest)
            .finish_non_exhaustive()
    }
}

impl LocalSource {
    /// Begins an attempt: logging is switched on, everything is dirty.
    ///
    /// # Errors
    /// Those of [`Tracker::consumer`].
    pub fn new(tracker: &Tracker, hooks: Box<dyn Hooks>) -> crate::Result<Self> {
        let mut source = Self::unlogged(tracker, hooks);
        source.log = Log::On(tracker.consumer(Start::AllDirty)?);
        Ok(source)
    }

    /// Begins an attempt in which logging is switched on, and everything dirty, by the first harvest or lease; by then it
    /// fails as [`LocalSource::new`] does. A migration that hands the memory over makes none of them: the guest is not
    /// slowed, and may have devices that report nothing of what they write.
    #[must_use]
    pub fn unlogged(tracker: &Tracker, hooks: Box<dyn Hooks>) -> Self {
        Self {
            log: Log::Off,
            tracker: tracker.clone(),
            hooks,
            leases: BTreeMap::new(),
            next_lease: 0,
            guest: Guest::Running,
            throttling: None,
            transactions_before: tracker.transactions(),
        }
    }

    /// Takes over a guest that is stopped already, devices too.
    #[cfg(feature = "qmp")]
    pub(crate) fn take_over(&mut self, stopped: StoppedGuest) {
        self.throttling = None;
        self.guest = Guest::Stopped(stopped);
    }

    /// Gives it back, stopped as it is: the attempt has to be ended by [`Source::resume`] next.
    #[cfg(feature = "qmp")]
    pub(crate) fn give_back(&mut self) -> Option<StoppedGuest> {
        match std::mem::replace(&mut self.guest, Guest::Running) {
            Guest::Stopped(stopped) | Guest::Relinquished(stopped) => Some(stopped),
            other => {
                self.guest = other;
                None
            }
        }
    }

    /// A block of the layout in force, or of an open lease.
    pub(crate) fn block(&self, id: BlockId) -> Option<Block> {
        let leased = || {
            let mut parts = self.leases.values().flat_map(Leased::parts);
            parts.find(|(e, _)| e.block == id).map(|(_, b)| b.clone())
        };
        self.tracker.block(id).or_else(leased)
    }

    fn consumer(&mut self) -> Result<&Consumer> {
        if let Log::Off = self.log {
            let consumer = self.tracker.consumer(Start::AllDirty);
            self.log = Log::On(consumer.map_err(MigrateError::source)?);
        }
        match &self.log {
            Log::On(consumer) => Ok(consumer),
            _ => Err(MigrateError::source(gleaner_bitmap::Error::ConsumerGone)),
        }
    }

    /// What the destination of this attempt has says nothing about the next one's.
    fn end_attempt(&mut self) {
        self.throttling = None;
        self.leases.clear();
        if !mutant::is_planted(Mutant::AttemptOnConsumedBits) {
            self.log = Log::Ended;
        }
    }

    fn take(&mut self, lease: LeaseId) -> Result<Leased> {
        self.leases
            .remove(&lease)
            .ok_or_else(|| MigrateError::source(Error::UnknownLease { lease: lease.0 }))
    }
}

impl Source for LocalSource {
    fn layout(&mut self) -> Result<Layout> {
        Ok(Layout::clone(&self.tracker.layout()))
    }

    fn harvest(&mut self) -> Result<Harvested> {
        self.consumer()?;
        self.tracker.harvest().map_err(MigrateError::source)?;
        Ok(Harvested {
            generation: self.tracker.layout().generation(),
            dirty_pages: self.consumer()?.dirty_pages(),
        })
    }

    fn lease(&mut self, max_pages: u64) -> Result<Option<PageLease>> {
        let leased = self.consumer()?.lease(max_pages);
        let Some(leased) = leased.map_err(MigrateError::source)? else {
            return Ok(None);
        };
        let id = LeaseId(self.next_lease);
        self.next_lease += 1;
        let parts = leased
            .parts()
            .iter()
            .map(|(extent, block)| LeasedPart::new(*extent, Arc::new(block.clone())))
            .collect();
        let lease = PageLease {
            id,
            generation: leased.generation(),
            parts,
        };
        self.leases.insert(id, leased);
        Ok(Some(lease))
    }

    fn ack(&mut self, lease: LeaseId) -> Result<()> {
        self.take(lease)?.ack();
        Ok(())
    }

    fn release(&mut self, lease: LeaseId) -> Result<()> {
        self.take(lease).map(drop)
    }

    fn throttles(&mut self) -> Result<Throttles> {
        Ok(self.tracker.throttles())
    }

    fn throttle(&mut self, throttle: Throttle) -> Result<()> {
        self.consumer()?;
        let Guest::Running = self.guest else {
            return Err(MigrateError::source(Error::AlreadyStopped));
        };
        match (&self.throttling, throttle) {
            (_, Throttle::Off) => self.throttling = None,
            (Some(throttling), _) => throttling.set(throttle).map_err(MigrateError::source)?,
            (None, _) => {
                let throttling = self.tracker.throttle(throttle);
                self.throttling = Some(throttling.map_err(MigrateError::source)?);
            }
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<()> {
        let hooks = &mut self.hooks;
        match self.tracker.stop(|| hooks.pause_devices()) {
            Ok(stopped) => {
                self.throttling = None;
                self.guest = Guest::Stopped(stopped);
                Ok(())
            }
            // By somebody else, whose devices are paused.
            Err(error @ Error::AlreadyStopped) => Err(MigrateError::source(error)),
            Err(error) => {
                // Some devices may be paused already; the guest runs.
                self.hooks.resume();
                Err(MigrateError::source(error))
            }
        }
    }

    fn state(&mut self) -> Result<Vec<u8>> {
        let Guest::Stopped(stopped) = &self.guest else {
            return Err(MigrateError::source(Error::NotStopped));
        };
        self.hooks
            .save(stopped.vcpus())
            .map_err(|reason| MigrateError::source(Error::DeviceState { reason }))
    }

    fn memory(&mut self, block: BlockId) -> Result<Memory> {
        let Guest::Stopped(_) = &self.guest else {
            return Err(MigrateError::source(Error::NotStopped));
        };
        match self.block(block) {
            Some(block) => Ok(Arc::new(block)),
            None => Err(gleaner_bitmap::Error::UnknownBlock { block }.into()),
        }
    }

    fn hand_over(&mut self, block: BlockId) -> Result<(OwnedFd, u64)> {
        let Guest::Stopped(_) = &self.guest else {
            return Err(MigrateError::source(Error::NotStopped));
        };
        let known = self.block(block);
        let known = known.ok_or(gleaner_bitmap::Error::UnknownBlock { block })?;
        let (file, offset) = known.shared_backing().map_err(MigrateError::source)?;
        // The very open file, with the locks on it: they end when nobody has the memory any more.
        let file = file.try_clone().map_err(MigrateError::source)?;
        Ok((file.into(), offset))
    }

    fn relinquish(&mut self) -> Result<()> {
        match std::mem::replace(&mut self.guest, Guest::Running) {
            Guest::Stopped(stopped) => {
                self.guest = Guest::Relinquished(stopped);
                Ok(())
            }
            other => {
                self.guest = other;
                Err(MigrateError::source(Error::NotStopped))
            }
        }
    }

    fn complete(&mut self) -> Result<()> {
        match std::mem::replace(&mut self.guest, Guest::Running) {
            Guest::Relinquished(stopped) => {
                self.guest = Guest::Away(stopped);
                self.end_attempt();
                self.tracker.migrated_away();
                self.hooks.migrated_away();
                Ok(())
            }
            // Told again, because its answer was lost or a hook panicked: nothing is left to do.
            away @ Guest::Away(_) => {
                self.guest = away;
                Ok(())
            }
            other => {
                self.guest = other;
                Err(MigrateError::source(Error::NotStopped))
            }
        }
    }

    fn resume(&mut self) -> Result<()> {
        match std::mem::replace(&mut self.guest, Guest::Running) {
            Guest::Running => {}
            Guest::Stopped(stopped) | Guest::Relinquished(stopped) => {
                self.hooks.resume();
                drop(stopped);
            }
            away @ Guest::Away(_) => {
                self.guest = away;
                return Err(MigrateError::source(Error::MigratedAway));
            }
        }
        self.end_attempt();
        Ok(())
    }

    fn transactions(&mut self) -> Result<u64> {
        Ok(self.tracker.transactions() - self.transactions_before)
    }
}

impl Drop for LocalSource {
    fn drop(&mut self) {
        self.throttling = None;
        match std::mem::replace(&mut self.guest, Guest::Running) {
            Guest::Running => {}
            // Before the consumer goes: switching the log off takes time that the guest need not wait for.
            Guest::Stopped(stopped) => {
                self.hooks.resume();
                drop(stopped);
            }
            // It may run elsewhere: here it stays stopped for good.
            Guest::Relinquished(stopped) | Guest::Away(stopped) => stopped.keep(),
        }
    }
}
