//! One connection, as it carries pages.

use std::collections::VecDeque;
use std::time::Duration;

use gleaner_bitmap::{Extent, Generation, PageRange};

use crate::batch::{Batch, Tally};
use crate::job::Job;
use crate::link::Link;
use crate::pack::{Applied, Packer};
use crate::scan::{self, bytes};
use crate::sender::unexpected;
use crate::there::There;
use crate::wire::{Message, Payload};
use crate::{Channel, Error, LeaseId, Result};

/// Jobs that may be under way on a connection whose frames are answered one by one: enough to keep a fast link busy while answers travel.
pub(crate) const MAX_IN_FLIGHT: usize = 4;

/// A job whose pages are written, and not known to be applied.
struct InFlight {
    lease: LeaseId,
    /// The Sync after it.
    sync: u64,
    applied: Applied,
}

/// A connection that carries pages.
///
/// Invariant: a job is in `in_flight` from its last page to the answer that it has been applied; nothing else makes it
/// done.
pub(crate) struct Lane<C: Channel + ?Sized> {
    in_flight: VecDeque<InFlight>,
    pub(crate) tally: Tally,
    packer: Option<Box<Packer>>,
    pub(crate) link: Link<C>,
}

impl<C: Channel> Lane<C> {
    pub(crate) fn new(link: Link<C>, packer: Option<Box<Packer>>) -> Self {
        Self {
            in_flight: VecDeque::new(),
            tally: Tally::default(),
            packer,
            link,
        }
    }
}

impl<C: Channel + ?Sized> Lane<C> {
    /// Jobs that may be under way at a time.
    pub(crate) fn most_under_way(&self) -> usize {
        self.link.most_unanswered()
    }

    /// Jobs that are not known to be applied.
    pub(crate) fn under_way(&self) -> usize {
        self.in_flight.len()
    }

    /// Sends the pages of a job, under the layout of `generation`.
    pub(crate) fn send(&mut self, job: &Job, generation: Generation, there: &There) -> Result<()> {
        let most = self.link.limits.frame_bytes();
        let applied = Applied::default();
        let packer = self.packer.as_deref_mut();
        let mut batch = Batch::new(generation, there, packer, applied.clone(), most);
        let before = self.link.bytes();
        let sent = send_parts(&mut self.link, job, &mut batch);
        let tally = batch.tally;
        self.tally += tally;
        sent?;
        let sync = self.link.send(&Message::Sync, &Payload::None)?;
        let bytes = self.link.bytes().saturating_sub(before);
        self.link.limits.totals.add(tally.pages, tally.zeros, bytes);
        self.in_flight.push_back(InFlight {
            lease: job.lease,
            sync,
            applied,
        });
        Ok(())
    }

    /// Waits until the earliest job under way has been applied; its lease. `None` when nothing is under way.
    pub(crate) fn applied(&mut self) -> Result<Option<LeaseId>> {
        let Some(job) = self.in_flight.pop_front() else {
            return Ok(None);
        };
        self.await_applied(job.sync)?;
        job.applied.set();
        Ok(Some(job.lease))
    }

    /// The time from a question to its answer.
    pub(crate) fn round_trip(&mut self) -> Result<Duration> {
        let sync = self.link.send(&Message::Sync, &Payload::None)?;
        let asked = self.link.limits.clock.now();
        self.await_applied(sync)?;
        Ok(self.link.limits.clock.since(asked))
    }

    pub(crate) fn await_applied(&mut self, sync: u64) -> Result<()> {
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
}

fn send_parts<'m, C: Channel + ?Sized>(
    link: &mut Link<C>,
    job: &'m Job,
    batch: &mut Batch<'m>,
) -> Result<()> {
    for part in &job.parts {
        let block = part.extent().block;
        let memory = part.slice()?;
        let whole = part.extent().range;
        scan::runs(part, &memory, |mut run, zero| {
            if zero {
                return batch.zeros(link, Extent { block, range: run });
            }
            while run.pages > 0 {
                let take = run.pages.min(batch.room());
                let range = PageRange::new(run.first, take);
                let offset = bytes(range.first - whole.first)?;
                let piece = memory
                    .subslice(offset, bytes(take)?)
                    .map_err(|e| Error::Memory {
                        what: "of a lease can't be reached",
                        detail: e.to_string(),
                    })?;
                batch.pages(link, Extent { block, range }, piece)?;
                run = PageRange::new(run.first + take, run.pages - take);
            }
            Ok(())
        })?;
    }
    batch.flush(link)
}
