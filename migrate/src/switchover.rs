//! Switchover: the guest stops here and runs there, never at both ends.

use gleaner_bitmap::mutant::{self, Mutant};

use crate::policy::{Decision, Verdict};
use crate::sender::{Session, unexpected};
use crate::wire::{Message, Payload, StateBody};
use crate::{Error, Result};

impl Session<'_> {
    /// Stops the guest, sends what is left and its state, and hands it over.
    ///
    /// An error with `limits.committed` unset means that the destination was never told to run.
    pub(crate) fn switch_over(&mut self) -> Result<()> {
        let mark = self.mark();
        self.stopped = Some(self.clock().now());
        self.source.stop()?;
        // Saving state dirties memory, so the last harvest comes after it.
        let mut state = self.source.state()?;
        let dirty = self.harvest()?.dirty_pages;
        self.history.remaining_pages = dirty;
        let leased = self.send_pages(None)?;
        if leased < dirty {
            return Err(Error::HeldBack { leased, dirty });
        }
        if mutant::is_planted(Mutant::StateSavedLast) {
            state = self.source.state()?;
        }
        let generation = self
            .sent_layout
            .as_deref()
            .map(gleaner_bitmap::Layout::generation)
            .unwrap_or_default();
        let described = Message::State(StateBody {
            generation,
            crc: crc32fast::hash(&state),
        });
        self.link.send(&described, &Payload::Bytes(&state))?;
        if !self.link.is_answered() {
            self.link.sync()?;
        } else {
            match self.link.answer("awaiting that the destination is ready")? {
                Message::Ready => {}
                other => return Err(unexpected(&other, "the destination was to be ready")),
            }
        }
        self.link.limits.check()?;
        self.source.relinquish()?;
        self.link.limits.committed = true;
        self.link.send(&Message::Go, &Payload::None)?;
        if !self.link.is_answered() {
            self.link.sync()?;
        } else {
            match self.link.answer("awaiting that the guest runs")? {
                Message::Running => {}
                other => return Err(unexpected(&other, "the guest was to run")),
            }
        }
        self.completed(&mark);
        Ok(())
    }

    /// The guest runs there. Nothing that fails from here on changes that.
    fn completed(&mut self, mark: &crate::rounds::Mark) {
        if let Some(stopped) = self.stopped.take() {
            self.report.downtime_ms = crate::sender::millis(self.clock().since(stopped));
        }
        self.history.remaining_pages = 0;
        let done = Decision {
            verdict: Verdict::Done,
            forecast: None,
            reason: "the guest runs at the destination".into(),
        };
        let progress = self.progress(self.report.rounds + 1, mark, &done);
        self.tell(progress);
        if let Err(error) = self.source.complete() {
            let reason = format!("migrated, but the source could not be told so: {error}");
            tracing::error!(reason);
            self.report.reason = Some(reason);
            self.report.error = Some(Error::source(error));
        }
    }
}
