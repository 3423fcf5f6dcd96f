//! Rounds: harvest, lease, send, acknowledge.

use std::time::{Duration, Instant};

use gleaner_bitmap::PAGE_SIZE;

use crate::policy::{Curve, Decision, Round, Verdict};
use crate::sender::{Session, millis, unexpected};
use crate::wire::{LayoutBody, Message, Payload};
use crate::{Error, Harvested, Progress, Result};

/// Between two rounds that only wait for the switchover to be let go.
pub(crate) const HELD_PAUSE: Duration = Duration::from_millis(20);

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
            let mut sent = None;
            if round > 0 || harvested.dirty_pages > 0 {
                round += 1;
                self.send_pages(Some(harvested.dirty_pages))?;
                sent = Some(self.round_since(&mark));
                // Asked with nothing under way: behind pages an answer waits until the link has taken them. And a
                // destination that had nothing to do hears that this end is alive.
                self.history.round_trip_seconds = self.lanes.lead().round_trip()?.as_secs_f64();
            }
            let since = std::mem::replace(&mut harvested_at, self.clock.now());
            harvested = self.harvest()?;
            self.history.remaining_pages = harvested.dirty_pages;
            let dirty_seconds = self.clock.since(since).as_secs_f64();
            if let Some(sent) = sent {
                self.history.push(Round {
                    dirty_pages: harvested.dirty_pages,
                    dirty_seconds,
                    ..sent
                });
            }
            let decision = self.decide();
            if round > 0 {
                let progress = self.progress(round, &mark, &decision);
                self.tell(progress);
            }
            self.obey(&decision)?;
            if decision.verdict == Verdict::SwitchOver {
                return Ok(());
            }
            let link = &mut self.lanes.lead().link;
            link.limits.check()?;
            if self.goal.held.is_some() {
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
        Ok(self.supply.leased())
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
            bytes: self.report.bytes_on_wire - mark.bytes,
            seconds: self.clock.since(mark.at).as_secs_f64(),
            ..Round::default()
        }
    }

    pub(crate) fn progress(&self, round: u32, mark: &Mark, decision: &Decision) -> Progress {
        let sent = self.round_since(mark);
        Progress {
            round,
            pages_sent: sent.pages,
            zero_pages: sent.zero_pages,
            bytes: sent.bytes,
            duration_ms: sent.seconds * 1e3,
            elapsed_ms: millis(self.clock.since(self.start)),
            remaining_pages: self.history.remaining_pages,
            total_pages: self.history.total_pages(),
            rate_bytes_per_second: PAGE_SIZE as f64
                * self.history.pages_per_second().unwrap_or_default().likely,
            dirty_ms: self.history.dirty_seconds() * 1e3,
            harvest_ms: self.history.harvest_seconds * 1e3,
            round_trip_ms: self.history.round_trip_seconds * 1e3,
            curve: Curve::of(&self.history),
            dirty_pages_per_second: self.history.dirty_pages_per_second(),
            forecast_downtime_ms: decision.forecast.map(|f| f.downtime.times(1e3)),
            forecast_total_ms: decision.forecast.map(|forecast| {
                let so_far = self.history.elapsed.as_secs_f64();
                forecast.total(so_far, self.goal.downtime_limit).times(1e3)
            }),
            throttle: self.history.throttle,
            decision: decision.verdict,
            reason: decision.reason.clone(),
        }
    }
}
