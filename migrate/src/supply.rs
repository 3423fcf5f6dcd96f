//! What the source has to send, as jobs for the connections.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use gleaner_bitmap::{Generation, Layout};

use crate::early::{Early, LEASE_PAGES};
use crate::job::{self, Job};
use crate::watch::Watch;
use crate::{Error, Harvested, LeaseId, LeasedPart, PageLease, Result, Source};

/// Connections that a lease is for, at most.
const MOST_SHARES: u64 = 4;
/// Pages that are worth a connection's while.
const LEAST_JOB: u64 = 16;

/// What comes next.
pub(crate) enum Next {
    /// Pages to send.
    Job(Job),
    /// Nothing before a lease has been acknowledged: what is on lease may be dirty a second time.
    Wait,
    /// Nothing, or nothing before the destination has [`Supply::next_layout`].
    Nothing,
}

/// The source's leases and the layout that they are sent under.
///
/// Invariants: a lease is in `open` from the source's answer until it is acknowledged or released, and it is acknowledged
/// when all its jobs have been applied. Only pages of blocks that the destination has become jobs.
pub(crate) struct Supply<'a> {
    pub(crate) source: &'a mut dyn Source,
    /// Leases that are not acknowledged, with the number of their jobs that are not done.
    open: BTreeMap<LeaseId, usize>,
    jobs: VecDeque<Job>,
    /// Connections that the jobs are for.
    lanes: u64,
    /// Pages that may still be leased in this round.
    left: u64,
    /// All that there is shall be leased.
    all: bool,
    leased: u64,
    /// The layout that the destination has.
    sent: Option<Arc<Layout>>,
    /// The source's latest layout that is known to have the same blocks.
    same: Generation,
    /// The source's layout has other blocks.
    ahead: Option<Layout>,
    /// A lease under that layout.
    held: Option<PageLease>,
    early: Early,
    watch: Watch,
}

impl<'a> Supply<'a> {
    pub(crate) fn new(source: &'a mut dyn Source, lanes: usize, watch: Watch) -> Self {
        Self {
            source,
            open: BTreeMap::new(),
            jobs: VecDeque::new(),
            lanes: lanes as u64,
            left: 0,
            all: false,
            leased: 0,
            sent: None,
            same: Generation::default(),
            ahead: None,
            held: None,
            early: Early::new(watch.clock()),
            watch,
        }
    }

    /// Begins a round of up to `limit` pages, or of all there are, with the guest stopped.
    pub(crate) fn begin(&mut self, limit: Option<u64>) {
        self.left = limit.unwrap_or(u64::MAX);
        self.all = limit.is_none();
        self.leased = 0;
        self.early.begin(limit);
        self.watch.begin();
    }

    /// Pages leased in this round.
    pub(crate) const fn leased(&self) -> u64 {
        self.leased
    }

    pub(crate) fn next(&mut self) -> Result<Next> {
        loop {
            if let Some(job) = self.jobs.pop_front() {
                return Ok(Next::Job(job));
            }
            let over = !self.all && self.watch.is_over();
            if self.ahead.is_some() || self.left == 0 || over {
                return Ok(Next::Nothing);
            }
            if self.early.is_due() {
                self.harvest_early()?;
                continue; // it may have shown another layout
            }
            let most = LEASE_PAGES * self.lanes.min(MOST_SHARES);
            match self.source.lease(self.left.min(most))? {
                Some(lease) => {
                    self.open.insert(lease.id, 0);
                    let pages = lease.pages();
                    self.leased += pages;
                    self.early.took(pages);
                    self.left = self.left.saturating_sub(pages);
                    if !self.all {
                        self.watch.tick(self.leased, self.left);
                    }
                    if self.needs_layout(lease.generation)? {
                        self.held = Some(lease);
                    } else {
                        self.cut(lease)?;
                    }
                }
                None if self.all && !self.open.is_empty() => return Ok(Next::Wait),
                None => return Ok(Next::Nothing),
            }
        }
    }

    /// Makes jobs of a lease.
    fn cut(&mut self, lease: PageLease) -> Result<()> {
        let Some(sent) = &self.sent else {
            return Ok(()); // not reached: a lease is cut when the destination has a layout
        };
        let pages = lease.pages().div_ceil(self.lanes).max(LEAST_JOB);
        // A block that went between the lease and the layout: its pages are retired.
        let there = |part: &LeasedPart| sent.block(part.extent().block).is_some();
        let parts = lease.parts.into_iter().filter(there).collect();
        let jobs = job::split(lease.id, parts, pages);
        if jobs.is_empty() {
            self.open.remove(&lease.id);
            return self.source.ack(lease.id);
        }
        self.open.insert(lease.id, jobs.len());
        self.jobs.extend(jobs);
        Ok(())
    }

    /// A job of this lease has been applied.
    pub(crate) fn done(&mut self, lease: LeaseId) -> Result<()> {
        match self.open.get_mut(&lease) {
            Some(jobs) if *jobs > 1 => *jobs -= 1,
            _ => {
                // Taken out only when acknowledged: what fails here must be released.
                self.source.ack(lease)?;
                self.open.remove(&lease);
            }
        }
        Ok(())
    }

    /// Harvests, and notes whether the destination needs another layout before what was harvested can be sent.
    pub(crate) fn harvest(&mut self) -> Result<Harvested> {
        let source = &mut self.source;
        let harvested = self.early.harvest(|| source.harvest())?;
        self.needs_layout(harvested.generation)?;
        Ok(harvested)
    }

    /// The same while a round goes on: what was written before its turn need not go again. Nothing depends on it: that of the
    /// round's end says whether the source can be harvested.
    fn harvest_early(&mut self) -> Result<()> {
        let source = &mut self.source;
        match self.early.harvest(|| source.harvest_early()) {
            Ok(Some(harvested)) => self.needs_layout(harvested.generation).map(|_| ()),
            Ok(None) => Ok(()),
            Err(error) => {
                tracing::warn!(%error, "a round is not harvested while it goes on");
                self.early.begin(None);
                Ok(())
            }
        }
    }

    /// Notes whether the destination needs another layout before memory can be handed over under it: slots count too.
    pub(crate) fn look_at_layout(&mut self) -> Result<()> {
        let layout = self.source.layout()?;
        if self.sent.is_none() || self.sent_generation() < layout.generation() {
            self.ahead = Some(layout);
        }
        Ok(())
    }

    /// Whether the destination needs another layout for pages of this generation: one with other blocks. Slots that
    /// merely moved are told at the switchover.
    fn needs_layout(&mut self, needed: Generation) -> Result<bool> {
        let newest = self.ahead.as_ref().map_or(self.same, Layout::generation);
        if self.sent.is_some() && needed <= newest {
            return Ok(self.ahead.is_some());
        }
        let layout = self.layout(needed)?;
        match &self.sent {
            Some(sent) if sent.blocks().eq(layout.blocks()) => {
                self.same = layout.generation();
                self.ahead = None;
            }
            _ => self.ahead = Some(layout),
        }
        Ok(self.ahead.is_some())
    }

    /// The source's layout, which is at least of this generation.
    fn layout(&mut self, needed: Generation) -> Result<Layout> {
        let layout = self.source.layout()?;
        if layout.generation() < needed {
            return Err(Error::Stale {
                what: "the layout of the source",
                expected: needed,
                found: layout.generation(),
            });
        }
        Ok(layout)
    }

    /// The layout that the destination needs before anything else can be sent. Nothing is under way when it goes.
    pub(crate) const fn next_layout(&self) -> Option<&Layout> {
        self.ahead.as_ref()
    }

    /// The guest is stopped: slots count too, in the layout that the destination ends with.
    pub(crate) fn last_layout(&mut self) -> Result<()> {
        if self.ahead.is_none() && self.sent_generation() < self.same {
            self.ahead = Some(self.layout(self.same)?);
        }
        Ok(())
    }

    /// The destination has [`Supply::next_layout`].
    pub(crate) fn adopted(&mut self) -> Result<()> {
        if let Some(layout) = self.ahead.take() {
            self.same = layout.generation();
            self.sent = Some(Arc::new(layout));
        }
        match self.held.take() {
            Some(lease) => self.cut(lease),
            None => Ok(()),
        }
    }

    /// The layout that the destination has.
    pub(crate) fn sent(&self) -> Option<Arc<Layout>> {
        self.sent.clone()
    }

    /// The generation of the layout that the destination has.
    pub(crate) fn sent_generation(&self) -> Generation {
        let sent = self.sent.as_deref();
        sent.map(Layout::generation).unwrap_or_default()
    }

    /// Pages that are not known to be applied are dirty again.
    pub(crate) fn release(&mut self) {
        self.jobs.clear();
        self.held = None;
        for lease in std::mem::take(&mut self.open).into_keys() {
            // A source that lost its leases starts the next attempt with everything dirty.
            if let Err(error) = self.source.release(lease) {
                tracing::warn!(%error, "a lease can't be released");
            }
        }
    }
}
