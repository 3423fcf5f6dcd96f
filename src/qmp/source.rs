//! The source of a migration that a client began: what clients are told of it, and a guest that they have stopped before.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use gleaner_bitmap::{BlockId, Layout};
use gleaner_migrate::{Harvested, LeaseId, Memory, PageLease, Result, Source, Throttle, Throttles};

use super::monitor::{Monitor, lock};
use super::run::Pause;
use crate::{Hooks, LocalSource};

/// A [`LocalSource`] whose harvests are told as passes. A guest that a client has stopped moves stopped as it is; when the
/// migration fails it is the client's again.
pub(super) struct Monitored {
    monitor: Arc<Monitor>,
    source: LocalSource,
    /// Those of a guest that was stopped before.
    paused: Option<Box<dyn Hooks>>,
}

impl Monitored {
    pub(super) fn new(monitor: &Arc<Monitor>) -> Self {
        Self {
            source: LocalSource::unlogged(&monitor.tracker, monitor.hooks.make()),
            monitor: Arc::clone(monitor),
            paused: None,
        }
    }
}

impl Source for Monitored {
    fn layout(&mut self) -> Result<Layout> {
        self.source.layout()
    }

    fn harvest(&mut self) -> Result<Harvested> {
        let harvested = self.source.harvest()?;
        self.monitor.pass();
        self.monitor.sent(|sent| {
            sent.remaining_pages = harvested.dirty_pages;
            sent.total_pages = sent.total_pages.max(harvested.dirty_pages);
        });
        Ok(harvested)
    }

    // No pass: what is left to this one is not known by it.
    fn harvest_early(&mut self) -> Result<Option<Harvested>> {
        self.source.harvest_early()
    }

    fn lease(&mut self, max_pages: u64) -> Result<Option<PageLease>> {
        self.source.lease(max_pages)
    }

    fn ack(&mut self, lease: LeaseId) -> Result<()> {
        self.source.ack(lease)
    }

    fn release(&mut self, lease: LeaseId) -> Result<()> {
        self.source.release(lease)
    }

    fn throttles(&mut self) -> Result<Throttles> {
        self.source.throttles()
    }

    fn throttle(&mut self, throttle: Throttle) -> Result<()> {
        self.source.throttle(throttle)
    }

    fn stop(&mut self) -> Result<()> {
        // Held, so that no client stops the guest in between.
        let mut paused = lock(&self.monitor.paused);
        let Some(Pause { stopped, hooks }) = paused.take() else {
            return self.source.stop();
        };
        self.source.take_over(stopped);
        self.paused = Some(hooks);
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<u8>> {
        self.source.state()
    }

    fn memory(&mut self, block: BlockId) -> Result<Memory> {
        self.source.memory(block)
    }

    fn hand_over(&mut self, block: BlockId) -> Result<(OwnedFd, u64)> {
        self.source.hand_over(block)
    }

    fn relinquish(&mut self) -> Result<()> {
        self.source.relinquish()
    }

    fn complete(&mut self) -> Result<()> {
        self.source.complete()
    }

    fn resume(&mut self) -> Result<()> {
        if let Some(hooks) = self.paused.take()
            && let Some(stopped) = self.source.give_back()
        {
            *lock(&self.monitor.paused) = Some(Pause { stopped, hooks });
        }
        self.source.resume()
    }

    fn transactions(&mut self) -> Result<u64> {
        self.source.transactions()
    }
}
