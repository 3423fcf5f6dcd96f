//! A source whose dirty pages go into a trace.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::time::Instant;

use gleaner_bitmap::{BlockId, Layout};

use super::{Followed, TraceWriter};
use crate::{Clock, Harvested, LeaseId, Memory, PageLease, Result, Source, Throttle, Throttles};

/// A [`Source`] like the one inside, which writes a trace of what the guest dirties: what was leased after a harvest was
/// dirtied between that harvest and the one before. Where nothing was leased between two harvests, as before the guest is
/// stopped, both intervals are one.
///
/// Its intervals are the rounds of the sender, so the first one is as long as it takes to send all memory. No round is
/// harvested while it goes on: what was found then could not be told from what was dirty before. So a migration sends some
/// pages more for being recorded. What a harvest
/// finds and nobody leases, as where a migration is called off, is not in the trace. Nor is a trace worth a migration: when
/// it can't be written, it ends and says so once, as [`Recorder::failure`] and in the log.
pub struct Recorder<'a, W> {
    source: &'a mut dyn Source,
    clock: Clock,
    /// None before the first layout, and after a failure.
    writer: Option<TraceWriter<W>>,
    out: Option<W>,
    failure: Option<String>,
    numbers: HashMap<BlockId, usize>,
    /// The first harvest, with which the trace begins.
    began: Option<Instant>,
    /// The latest one, until which all that is leased was dirtied.
    harvested: Option<Instant>,
    /// What it found has not been leased, and comes with what the next one finds.
    waiting: bool,
}

impl<'a, W: Write + Send> Recorder<'a, W> {
    /// Records what `source` leases into `out`. The clock is the sender's.
    #[must_use]
    pub fn new(source: &'a mut dyn Source, out: W, clock: Clock) -> Self {
        Self {
            source,
            clock,
            writer: None,
            out: Some(out),
            failure: None,
            numbers: HashMap::new(),
            began: None,
            harvested: None,
            waiting: false,
        }
    }

    /// Writes what the last harvest found. To be called when the migration is over.
    pub fn end(&mut self) {
        self.record();
    }

    /// Why the trace ended before the migration.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    fn record(&mut self) {
        if let (Some(began), Some(harvested)) = (self.began, self.harvested)
            && began < harvested
            && !self.waiting
        {
            self.write(|writer, _| writer.record(harvested - began));
        }
    }

    fn learn(&mut self, layout: &Layout) {
        if let Some(out) = self.out.take() {
            let pages = layout.blocks().map(|block| block.pages).sum();
            match TraceWriter::new(out, Followed::usual(pages)) {
                Ok(writer) => self.writer = Some(writer),
                Err(error) => self.fail(&error),
            }
        }
        let blocks: Vec<_> = layout
            .blocks()
            .map(|b| (b.id, b.name.clone(), b.pages))
            .collect();
        self.write(|writer, numbers| {
            for (id, name, pages) in blocks {
                if let Entry::Vacant(new) = numbers.entry(id) {
                    new.insert(writer.block(&name, pages)?);
                }
            }
            Ok(())
        });
    }

    fn write(
        &mut self,
        what: impl FnOnce(&mut TraceWriter<W>, &mut HashMap<BlockId, usize>) -> Result<()>,
    ) {
        if let Some(writer) = &mut self.writer
            && let Err(error) = what(writer, &mut self.numbers)
        {
            self.fail(&error);
        }
    }

    fn fail(&mut self, error: &crate::Error) {
        tracing::warn!(%error, "the trace ends here");
        self.failure = Some(error.to_string());
        self.writer = None;
    }
}

impl<W: Write + Send> Source for Recorder<'_, W> {
    fn layout(&mut self) -> Result<Layout> {
        let layout = self.source.layout()?;
        self.learn(&layout);
        Ok(layout)
    }

    fn harvest(&mut self) -> Result<Harvested> {
        let now = self.clock.now();
        let harvested = self.source.harvest()?;
        self.record();
        self.began.get_or_insert(now);
        self.harvested = Some(now);
        self.waiting = harvested.dirty_pages > 0;
        Ok(harvested)
    }

    fn harvest_early(&mut self) -> Result<Option<Harvested>> {
        Ok(None)
    }

    fn lease(&mut self, max_pages: u64) -> Result<Option<PageLease>> {
        let lease = self.source.lease(max_pages)?;
        self.waiting &= lease.is_none();
        // Before the first harvest after the start everything is dirty, whatever the guest does.
        if let Some(lease) = &lease
            && self.began < self.harvested
        {
            self.write(|writer, numbers| {
                for part in &lease.parts {
                    let extent = part.extent();
                    // A block that came just now is learnt of, all of it dirty, with the layout that the sender asks for.
                    if let Some(number) = numbers.get(&extent.block) {
                        writer.dirtied(*number, extent.range);
                    }
                }
                Ok(())
            });
        }
        Ok(lease)
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
        self.source.stop()
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
        self.source.resume()
    }

    fn transactions(&mut self) -> Result<u64> {
        self.source.transactions()
    }
}
