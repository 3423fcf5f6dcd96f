//! Switchover: the guest stops here and runs there, never at both ends.

use std::sync::atomic::Ordering;

use gleaner_bitmap::mutant::{self, Mutant};

use crate::policy::{Decision, Verdict};
use crate::sender::{Session, millis, unexpected};
use crate::wire::{Message, Payload, StateBody};
use crate::{DowntimeParts, Error, Format, Result};

impl Session<'_> {
    /// Stops the guest, sends what is left and its state, and hands it over.
    ///
    /// An error with `committed` unset means that the destination was never told to run.
    pub(crate) fn switch_over(&mut self) -> Result<()> {
        let mark = self.mark();
        let start = self.clock.now();
        self.stopped = Some(start);
        let mut parts = DowntimeParts::default();
        let mut since = start;
        let mut lap = |session: &Self| {
            let before = std::mem::replace(&mut since, session.clock.now());
            millis(since - before)
        };
        self.supply.source.stop()?;
        parts.stop = lap(self);
        let mut state = self.supply.source.state()?;
        parts.state = lap(self);
        if self.report.local {
            self.hand_over()?;
            parts.send = lap(self);
        } else {
            // Saving state dirties memory, so the last harvest comes after it.
            let dirty = self.last_harvest()?;
            parts.harvest = lap(self);
            self.send_rest(dirty)?;
            parts.send = lap(self);
            if self.verify {
                self.compare_all()?;
            }
            parts.verify = lap(self);
        }
        if mutant::is_planted(Mutant::StateSavedLast) {
            state = self.supply.source.state()?;
        }
        let described = Message::State(StateBody {
            generation: self.supply.sent_generation(),
            crc: crc32fast::hash(&state),
        });
        let link = &mut self.lanes.lead().link;
        link.send(&described, &Payload::Bytes(&state))?;
        if !link.is_answered() {
            link.sync()?;
        } else {
            match link.answer("awaiting that the destination is ready")? {
                Message::Ready => {}
                other => return Err(unexpected(&other, "the destination was to be ready")),
            }
        }
        parts.ready = lap(self);
        let link = &mut self.lanes.lead().link;
        link.limits.check()?;
        self.supply.source.relinquish()?;
        link.limits.committed.store(true, Ordering::Relaxed);
        link.send(&Message::Go, &Payload::None)?;
        if !link.is_answered() {
            link.sync()?;
        } else {
            match link.answer("awaiting that the guest runs")? {
                Message::Running => {}
                other => return Err(unexpected(&other, "the guest was to run")),
            }
        }
        parts.go = lap(self);
        self.report.downtime_parts_ms = Some(parts);
        self.completed(&mark);
        Ok(())
    }

    /// The pages that are left, and the layout that they are sent under.
    fn last_harvest(&mut self) -> Result<u64> {
        let dirty = self.harvest()?.dirty_pages;
        self.supply.last_layout()?;
        self.send_layout()?;
        self.history.remaining_pages = dirty;
        Ok(dirty)
    }

    /// Sends all that was dirty at the last harvest.
    fn send_rest(&mut self, dirty: u64) -> Result<()> {
        let leased = self.send_pages(None)?;
        if leased < dirty {
            return Err(Error::HeldBack { leased, dirty });
        }
        Ok(())
    }

    /// What has become of the guest.
    fn arrived(&mut self) -> &'static str {
        let file = !self.lanes.lead().link.is_answered();
        match self.format {
            Format::Native if file => "the guest is in the file",
            Format::Native => "the guest runs at the destination",
            Format::Qemu(_) if file => "the guest's memory is in the file, for a QEMU",
            Format::Qemu(_) => "the guest's memory is at the QEMU",
        }
    }

    /// The guest runs there. Nothing that fails from here on changes that.
    fn completed(&mut self, mark: &crate::rounds::Mark) {
        if let Some(stopped) = self.stopped.take() {
            self.report.became(millis(self.clock.since(stopped)));
        }
        self.history.remaining_pages = 0;
        let done = Decision {
            verdict: Verdict::Done,
            forecast: None,
            reason: self.arrived().into(),
        };
        let progress = self.progress(self.report.rounds + 1, mark, &done);
        self.tell(progress);
        if let Err(error) = self.supply.source.complete() {
            // Not told that it was heard: whoever attaches to the source next has to ask.
            let reason = format!("migrated, but the source could not be told so: {error}");
            tracing::error!(reason);
            self.report.reason = Some(reason);
            self.report.error = Some(Error::source(error));
        } else if self.lanes.lead().link.is_answered() {
            self.lanes.lead().link.say_last(&Message::Heard);
        }
    }
}
