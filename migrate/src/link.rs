//! The sender's end of a channel: limits, pace, and refusals that come when nobody awaits an answer.

use std::time::{Duration, Instant};

use crate::patience::{CancelToken, TICK};
use crate::wire::{Message, Payload};
use crate::{Channel, Clock, Error, Result};

/// How long a half-written frame may go on after a cancellation: only whole frames leave room for the reason.
const GRACE: Duration = Duration::from_secs(1);

/// What may end a wait early.
pub(crate) struct Limits {
    pub(crate) clock: Clock,
    pub(crate) cancel: CancelToken,
    /// When the migration must be over, and the time that it was allowed.
    pub(crate) deadline: Option<(Instant, Duration)>,
    pub(crate) silence: Duration,
    /// The source has let go of its guest: there is no way back, so nothing but silence ends a wait.
    pub(crate) committed: bool,
}

impl Limits {
    /// Fails when the migration was called off.
    pub(crate) fn check(&self) -> Result<()> {
        match self.deadline {
            _ if self.committed => Ok(()),
            _ if self.cancel.is_cancelled() => Err(Error::Cancelled),
            Some((end, limit)) if self.clock.now() >= end => Err(Error::TimedOut { limit }),
            _ => Ok(()),
        }
    }
}

pub(crate) struct Link<'a> {
    channel: &'a mut dyn Channel,
    /// An answer that was taken while looking for a refusal.
    taken: Option<Message>,
    pub(crate) limits: Limits,
    bandwidth: Option<u64>,
    /// Not before then is the next frame due.
    due: Instant,
}

impl<'a> Link<'a> {
    pub(crate) fn new(
        channel: &'a mut dyn Channel,
        limits: Limits,
        bandwidth: Option<u64>,
    ) -> Self {
        Self {
            channel,
            taken: None,
            due: limits.clock.now(),
            limits,
            bandwidth,
        }
    }

    pub(crate) fn is_answered(&self) -> bool {
        self.channel.is_answered()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.channel.bytes()
    }

    /// Bytes of page contents that a frame may have, so that a bandwidth limit is kept smoothly.
    pub(crate) fn frame_bytes(&self) -> u64 {
        const MOST: u64 = 4 << 20;
        self.bandwidth
            .map_or(MOST, |limit| (limit / 20).clamp(4096, MOST))
    }

    /// Writes a frame when the bandwidth limit lets it, and returns its number.
    pub(crate) fn send(&mut self, message: &Message, payload: &Payload<'_>) -> Result<u64> {
        self.limits.check()?;
        self.look_for_refusal()?;
        self.wait_until_due()?;
        let before = self.channel.bytes();
        let (limits, start) = (&self.limits, self.limits.clock.now());
        let patience = |stalled: Duration| {
            if stalled >= limits.silence {
                return Err(Error::Silent {
                    during: "writing to the stream",
                    after: stalled,
                });
            }
            if limits.clock.since(start) >= GRACE {
                limits.check()?;
            }
            Ok(())
        };
        let sent = match self.channel.send(message, payload, &patience) {
            Err(error @ (Error::Closed { .. } | Error::Io { .. })) => {
                return Err(self.last_words().unwrap_or(error));
            }
            sent => sent?,
        };
        if let Some(limit) = self.bandwidth {
            let bytes = (self.channel.bytes() - before) as f64;
            let time = Duration::from_secs_f64(bytes / limit.max(1) as f64);
            self.due = self.due.max(start) + time;
        }
        Ok(sent)
    }

    /// Brings everything written to the disk, where the stream is a file.
    pub(crate) fn sync(&self) -> Result<()> {
        self.channel.sync()
    }

    /// Waits for the next answer.
    pub(crate) fn answer(&mut self, during: &'static str) -> Result<Message> {
        let start = self.limits.clock.now();
        loop {
            self.limits.check()?;
            if let Some(answer) = self.next(TICK)? {
                return Ok(answer);
            }
            let after = self.limits.clock.since(start);
            if after >= self.limits.silence {
                return Err(Error::Silent { during, after });
            }
        }
    }

    /// Lets `time` pass, unless something ends the migration.
    pub(crate) fn pause(&mut self, time: Duration) -> Result<()> {
        let end = self.limits.clock.now() + time;
        loop {
            self.limits.check()?;
            let left = self.limits.clock.until(end);
            if left.is_zero() {
                return Ok(());
            }
            if !self.is_answered() || self.taken.is_some() {
                self.limits.clock.sleep(left.min(TICK));
            } else {
                self.taken = self.next(left.min(TICK))?;
            }
        }
    }

    fn wait_until_due(&mut self) -> Result<()> {
        let left = self.limits.clock.until(self.due);
        if left.is_zero() || self.limits.committed {
            return Ok(());
        }
        self.pause(left)
    }

    /// The next answer, if one comes within `wait`. A refusal is an error.
    fn next(&mut self, wait: Duration) -> Result<Option<Message>> {
        if let Some(answer) = self.taken.take() {
            return Ok(Some(answer));
        }
        match self.channel.answer(wait)? {
            Some(Message::Refused(reason)) => Err(Error::Refused { reason }),
            answer => Ok(answer),
        }
    }

    /// A destination that has refused reads no more: better heard before the next frame than after a timeout.
    fn look_for_refusal(&mut self) -> Result<()> {
        if self.taken.is_none() {
            self.taken = self.next(Duration::ZERO)?;
        }
        Ok(())
    }

    /// After a failed write: the refusal that explains it, if there is one.
    fn last_words(&mut self) -> Option<Error> {
        let end = self.limits.clock.now() + GRACE;
        loop {
            let left = self.limits.clock.until(end);
            match self.channel.answer(left) {
                Ok(Some(Message::Refused(reason))) => return Some(Error::Refused { reason }),
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return None,
            }
        }
    }

    /// Tells the destination that it is over, if there is still a way to.
    pub(crate) fn cancel(&mut self, reason: &str) {
        if self.channel.is_whole() {
            let patience = |stalled| {
                if stalled >= GRACE {
                    return Err(Error::Cancelled);
                }
                Ok(())
            };
            // It hears of the end of the stream in any case.
            let _ = self
                .channel
                .send(&Message::Cancel(reason.into()), &Payload::None, &patience);
        }
    }

    pub(crate) fn close(self) {
        self.channel.close();
    }
}
