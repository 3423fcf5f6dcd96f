//! Rounds: harvest, lease, send, acknowledge.

use std::sync::Arc;
use std::time::{Duration, Instant};

use gleaner_bitmap::{Extent, Generation, Layout, PAGE_SIZE, PageRange};
use vm_memory::VolatileSlice;

use crate::policy::{Round, Verdict, bytes_per_second};
use crate::scan::{self, bytes};
use crate::sender::{InFlight, Session, millis, unexpected};
use crate::wire::{Extents, LayoutBody, MAX_EXTENTS, Message, Payload};
use crate::{Error, Harvested, PageLease, Progress, Result};

/// Pages in a lease: 16 MiB.
const LEASE_PAGES: u64 = 4096;
/// Leases that may be under way: enough to keep a fast link busy while answers travel.
const MAX_IN_FLIGHT: usize = 4;
/// Between two rounds that only wait for the switchover to be let go.
const HELD_PAUSE: Duration = Duration::from_millis(20);

/// Counts at one moment, to tell what came since.
pub(crate) struct Mark {
    at: Instant,
    pages: u64,
    zeros: u64,
    bytes: u64,
}

impl Session<'_> {
    /// Rounds with the guest running, until the policy says to stop it.
    pub(crate) fn precopy(&mut self) -> Result<()> {
        let mut round = 0;
        let mut harvested_at = self.start;
        let mut harvested = self.harvest()?;
        loop {
            let mark = self.mark();
            if round > 0 || harvested.dirty_pages > 0 {
                round += 1;
                self.send_pages(Some(harvested.dirty_pages))?;
                let sent = self.round_since(&mark);
                self.history.push(sent);
            }
            let since = std::mem::replace(&mut harvested_at, self.clock().now());
            harvested = self.harvest()?;
            self.history.remaining_pages = harvested.dirty_pages;
            self.history.dirty_pages_per_second =
                harvested.dirty_pages as f64 / self.clock().since(since).as_secs_f64().max(1e-6);
            let decision = self.decide();
            if round > 0 {
                let progress = self.progress(round, &mark, &decision);
                self.tell(progress);
            }
            Self::obey(&decision)?;
            if decision.verdict == Verdict::SwitchOver {
                return Ok(());
            }
            self.link.limits.check()?;
            if self.goal.held {
                self.link.pause(HELD_PAUSE)?;
            }
        }
    }

    /// Harvests, and sends the layout if there is a new one.
    pub(crate) fn harvest(&mut self) -> Result<Harvested> {
        let start = self.clock().now();
        let harvested = self.source.harvest()?;
        self.history.harvest_seconds = self.clock().since(start).as_secs_f64();
        self.send_layout(harvested.generation)?;
        Ok(harvested)
    }

    /// Leases and sends up to `limit` pages, or all there are, and waits until every one has been applied.
    /// Returns the number of pages leased.
    pub(crate) fn send_pages(&mut self, limit: Option<u64>) -> Result<u64> {
        let most = limit.unwrap_or(u64::MAX);
        let mut left = most;
        while left > 0 {
            match self.source.lease(left.min(LEASE_PAGES))? {
                Some(lease) => {
                    let pages: u64 = lease.parts.iter().map(|p| p.extent().range.pages).sum();
                    self.send_lease(&lease)?;
                    left = left.saturating_sub(pages);
                }
                // With the guest stopped, what is on lease may be dirty a second time: it is free once acknowledged.
                None if limit.is_none() && !self.in_flight.is_empty() => self.acknowledge(0)?,
                None => break,
            }
        }
        // Also tells a destination that has nothing to do that this end is alive.
        if self.in_flight.is_empty() {
            let sync = self.link.send(&Message::Sync, &Payload::None)?;
            let asked = self.clock().now();
            self.await_applied(sync)?;
            // Without leases nothing else shows that answers come sooner than they once did.
            self.history.round_trip_seconds = self.clock().since(asked).as_secs_f64();
        }
        self.acknowledge(0)?;
        Ok(most - left)
    }

    fn send_lease(&mut self, lease: &PageLease) -> Result<()> {
        self.in_flight.push_back(InFlight {
            lease: lease.id,
            sync: None,
            since: self.clock().now(),
        });
        self.send_layout(lease.generation)?;
        let Some(known) = self.sent_layout.clone() else {
            return Ok(()); // not reached: the call above sends one or fails
        };
        let mut batch = Batch::new(known.generation(), self.link.frame_bytes());
        for part in &lease.parts {
            let extent = part.extent();
            // The block went between the lease and the layout that was just sent: its pages are retired.
            if known.block(extent.block).is_none() {
                continue;
            }
            let memory = part.slice()?;
            let whole = extent.range;
            scan::runs(part, &memory, |mut run, zero| {
                if zero {
                    return batch.zeros(
                        self,
                        Extent {
                            block: extent.block,
                            range: run,
                        },
                    );
                }
                while run.pages > 0 {
                    let take = run.pages.min(batch.room(self)?);
                    let range = PageRange::new(run.first, take);
                    let offset = bytes(range.first - whole.first)?;
                    let piece =
                        memory
                            .subslice(offset, bytes(take)?)
                            .map_err(|e| Error::Memory {
                                what: "of a lease can't be reached",
                                detail: e.to_string(),
                            })?;
                    batch.pages(
                        Extent {
                            block: extent.block,
                            range,
                        },
                        piece,
                    );
                    run = PageRange::new(run.first + take, run.pages - take);
                }
                Ok(())
            })?;
        }
        batch.flush(self)?;
        let sync = self.link.send(&Message::Sync, &Payload::None)?;
        let now = self.clock().now();
        if let Some(last) = self.in_flight.back_mut() {
            last.sync = Some(sync);
            last.since = now;
        }
        self.acknowledge(MAX_IN_FLIGHT - 1)
    }

    /// Waits until at most `remain` leases are under way.
    fn acknowledge(&mut self, remain: usize) -> Result<()> {
        while self.in_flight.len() > remain {
            let Some(sync) = self.in_flight.front().and_then(|lease| lease.sync) else {
                return Ok(());
            };
            self.await_applied(sync)?;
            if let Some(first) = self.in_flight.front() {
                self.history.round_trip_seconds = self.clock().since(first.since).as_secs_f64();
                // Taken out only when acknowledged: what fails here must be released.
                self.source.ack(first.lease)?;
                self.in_flight.pop_front();
            }
        }
        Ok(())
    }

    fn await_applied(&mut self, sync: u64) -> Result<()> {
        if !self.link.is_answered() {
            return Ok(());
        }
        match self.link.answer("awaiting that pages are applied")? {
            Message::Applied(found) if found == sync => Ok(()),
            Message::Applied(found) => Err(Error::Sequence {
                expected: sync,
                found,
            }),
            other => Err(unexpected(&other, "pages were to be applied")),
        }
    }

    /// Sends the layout unless the destination has it, or a later one, already.
    fn send_layout(&mut self, needed: Generation) -> Result<()> {
        let sent = self.sent_layout.as_deref().map(Layout::generation);
        if sent.is_some_and(|sent| sent >= needed) {
            return Ok(());
        }
        let layout = self.source.layout()?;
        if layout.generation() < needed {
            return Err(Error::Stale {
                what: "the layout of the source",
                expected: needed,
                found: layout.generation(),
            });
        }
        self.link
            .send(&Message::Layout(LayoutBody::from(&layout)), &Payload::None)?;
        self.sent_layout = Some(Arc::new(layout));
        Ok(())
    }

    pub(crate) fn mark(&self) -> Mark {
        Mark {
            at: self.clock().now(),
            pages: self.report.pages_sent,
            zeros: self.report.zero_pages,
            bytes: self.link.bytes(),
        }
    }

    fn round_since(&self, mark: &Mark) -> Round {
        Round {
            pages: self.report.pages_sent - mark.pages,
            zero_pages: self.report.zero_pages - mark.zeros,
            seconds: self.clock().since(mark.at).as_secs_f64(),
        }
    }

    pub(crate) fn progress(
        &self,
        round: u32,
        mark: &Mark,
        decision: &crate::policy::Decision,
    ) -> Progress {
        let sent = self.round_since(mark);
        Progress {
            round,
            pages_sent: sent.pages,
            zero_pages: sent.zero_pages,
            bytes: self.link.bytes() - mark.bytes,
            duration_ms: sent.seconds * 1e3,
            remaining_pages: self.history.remaining_pages,
            rate_bytes_per_second: bytes_per_second(
                self.history.pages_per_second().unwrap_or_default(),
            ),
            dirty_pages_per_second: self.history.dirty_pages_per_second,
            forecast_downtime_ms: decision.forecast.map(millis),
            decision: decision.verdict,
            reason: decision.reason.clone(),
        }
    }
}

/// Pages gathered for the next frames. Nothing is copied: pieces point into guest memory.
struct Batch<'m> {
    generation: Generation,
    /// Most pages in a frame.
    most: u64,
    extents: Vec<Extent>,
    pieces: Vec<VolatileSlice<'m>>,
    count: u64,
    zeros: Vec<Extent>,
}

impl<'m> Batch<'m> {
    fn new(generation: Generation, frame_bytes: u64) -> Self {
        Self {
            generation,
            most: (frame_bytes / PAGE_SIZE).max(1),
            extents: Vec::new(),
            pieces: Vec::new(),
            count: 0,
            zeros: Vec::new(),
        }
    }

    /// Pages that the next frame still takes, at least one.
    fn room(&mut self, session: &mut Session<'_>) -> Result<u64> {
        if self.count >= self.most || self.extents.len() >= MAX_EXTENTS {
            self.flush_pages(session)?;
        }
        Ok(self.most - self.count)
    }

    fn pages(&mut self, extent: Extent, piece: VolatileSlice<'m>) {
        self.count += extent.range.pages;
        self.extents.push(extent);
        self.pieces.push(piece);
    }

    fn zeros(&mut self, session: &mut Session<'_>, extent: Extent) -> Result<()> {
        self.zeros.push(extent);
        if self.zeros.len() >= MAX_EXTENTS {
            self.flush_zeros(session)?;
        }
        Ok(())
    }

    fn flush(&mut self, session: &mut Session<'_>) -> Result<()> {
        self.flush_pages(session)?;
        self.flush_zeros(session)
    }

    fn flush_pages(&mut self, session: &mut Session<'_>) -> Result<()> {
        if self.extents.is_empty() {
            return Ok(());
        }
        let message = Message::Pages(Extents {
            generation: self.generation,
            extents: std::mem::take(&mut self.extents),
        });
        session.link.send(&message, &Payload::Pages(&self.pieces))?;
        session.report.pages_sent += self.count;
        self.pieces.clear();
        self.count = 0;
        Ok(())
    }

    fn flush_zeros(&mut self, session: &mut Session<'_>) -> Result<()> {
        if self.zeros.is_empty() {
            return Ok(());
        }
        let count: u64 = self.zeros.iter().map(|e| e.range.pages).sum();
        let message = Message::Zeros(Extents {
            generation: self.generation,
            extents: std::mem::take(&mut self.zeros),
        });
        session.link.send(&message, &Payload::None)?;
        session.report.zero_pages += count;
        Ok(())
    }
}
