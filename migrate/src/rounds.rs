//! Rounds: harvest, lease, send, acknowledge.

use std::time::{Duration, Instant};

use crate::policy::{Round, Verdict, bytes_per_second};
use crate::sender::{Session, millis, unexpected};
use crate::wire::{LayoutBody, Message, Payload};
use crate::{Error, Harvested, Progress, Result};

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
            let since = std::mem::replace(&mut harvested_at, self.clock.now());
            harvested = self.harvest()?;
            self.history.remaining_pages = harvested.dirty_pages;
            self.history.dirty_pages_per_second =
                harvested.dirty_pages as f64 / self.clock.since(since).as_secs_f64().max(1e-6);
            let decision = self.decide();
            if round > 0 {
                let progress = self.progress(round, &mark, &decision);
                self.tell(progress);
            }
            Self::obey(&decision)?;
            if decision.verdict == Verdict::SwitchOver {
                return Ok(());
            }
            let link = &mut self.lanes.lead().link;
            link.limits.check()?;
            if self.goal.held {
                link.pause(HELD_PAUSE)?;
            }
        }
    }

    /// Harvests, and sends the layout if it has other blocks than the one that the destination has.
    pub(crate) fn harvest(&mut self) -> Result<Harvested> {
        let start = self.clock.now();
        let harvested = self.supply.harvest()?;
        self.history.harvest_seconds = self.clock.since(start).as_secs_f64();
        self.send_layout()?;
        Ok(harvested)
    }

    /// Leases and sends up to `limit` pages, or all there are, and waits until every one has been applied.
    /// Returns the number of pages leased.
    pub(crate) fn send_pages(&mut self, limit: Option<u64>) -> Result<u64> {
        self.supply.begin(limit);
        self.there.round();
        loop {
            let carried = self.lanes.carry(&mut self.supply, &self.there);
            self.count();
            carried?;
            if self.supply.next_layout().is_none() {
                break;
            }
            self.send_layout()?;
        }
        let leased = self.supply.leased();
        let lead = self.lanes.lead();
        if leased == 0 {
            // Tells a destination that has nothing to do that this end is alive. And without leases nothing else shows
            // that answers come sooner than they once did.
            lead.settle()?;
        }
        self.history.round_trip_seconds = lead.round_trip;
        Ok(leased)
    }

    /// Sends the layout that the destination needs, if it needs one. Nothing is under way on any connection.
    pub(crate) fn send_layout(&mut self) -> Result<()> {
        let Some(layout) = self.supply.next_layout() else {
            return Ok(());
        };
        let link = &mut self.lanes.lead().link;
        let message = Message::Layout(LayoutBody::from(layout));
        link.send(&message, &Payload::None)?;
        if link.is_answered() {
            match link.answer("awaiting that the layout is adopted")? {
                Message::Adopted(adopted) if adopted.generation == layout.generation() => {
                    self.there.adopt(layout, &adopted.zero);
                }
                Message::Adopted(adopted) => {
                    return Err(Error::Stale {
                        what: "the layout that the destination adopted",
                        expected: layout.generation(),
                        found: adopted.generation,
                    });
                }
                other => return Err(unexpected(&other, "a layout was to be adopted")),
            }
        } else {
            self.there.adopt(layout, &[]);
        }
        self.supply.adopted()
    }

    pub(crate) fn mark(&self) -> Mark {
        Mark {
            at: self.clock.now(),
            pages: self.report.pages_sent,
            zeros: self.report.zero_pages,
            bytes: self.report.bytes_on_wire,
        }
    }

    fn round_since(&self, mark: &Mark) -> Round {
        Round {
            pages: self.report.pages_sent - mark.pages,
            zero_pages: self.report.zero_pages - mark.zeros,
            seconds: self.clock.since(mark.at).as_secs_f64(),
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
            bytes: self.report.bytes_on_wire - mark.bytes,
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
