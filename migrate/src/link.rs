//! The sender's end of the stream: frames out, answers in by a thread of their own.

use std::net::Shutdown;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::patience::{CancelToken, LINGER, TICK};
use crate::wire::{Inlet, Message, Outlet, Payload};
use crate::{Error, Result, Stream};

/// Answers that may wait to be taken. More than are ever due, so only a peer that breaks the protocol is slowed by it.
const WAITING: usize = 64;
/// How long a half-written frame may go on after a cancellation: only whole frames leave room for the reason.
const GRACE: Duration = Duration::from_secs(1);

/// What may end a wait early.
pub(crate) struct Limits {
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
            Some((end, limit)) if Instant::now() >= end => Err(Error::TimedOut { limit }),
            _ => Ok(()),
        }
    }
}

pub(crate) struct Link {
    outlet: Outlet,
    /// `None` for a file.
    answers: Option<Receiver<Result<Message>>>,
    reader: Option<JoinHandle<()>>,
    /// An answer that was taken while looking for a refusal.
    taken: Option<Message>,
    pub(crate) limits: Limits,
    bandwidth: Option<u64>,
    /// Not before then is the next frame due.
    due: Instant,
}

impl Link {
    pub(crate) fn open(stream: Stream, limits: Limits, bandwidth: Option<u64>) -> Result<Self> {
        stream.set_timeouts(None, Some(TICK))?;
        let (answers, reader) = if stream.is_file() {
            (None, None)
        } else {
            let (to, from) = sync_channel(WAITING);
            let inlet = Inlet::new(stream.try_clone()?);
            let reader = thread::Builder::new()
                .name("gleaner-answers".into())
                .spawn(move || read_answers(inlet, &to))
                .map_err(|cause| Error::io("start a thread", cause))?;
            (Some(from), Some(reader))
        };
        Ok(Self {
            outlet: Outlet::new(stream),
            answers,
            reader,
            taken: None,
            limits,
            bandwidth,
            due: Instant::now(),
        })
    }

    pub(crate) fn is_file(&self) -> bool {
        self.answers.is_none()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.outlet.bytes
    }

    /// Whether the last frame was written to its end.
    pub(crate) fn is_whole(&self) -> bool {
        self.outlet.whole
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
        let before = self.outlet.bytes;
        let (limits, start) = (&self.limits, Instant::now());
        let patience = |stalled: Duration| {
            if stalled >= limits.silence {
                return Err(Error::Silent {
                    during: "writing to the stream",
                    after: stalled,
                });
            }
            if start.elapsed() >= GRACE {
                limits.check()?;
            }
            Ok(())
        };
        let sent = match self.outlet.send(message, payload, &patience) {
            Err(error @ (Error::Closed { .. } | Error::Io { .. })) => {
                return Err(self.last_words().unwrap_or(error));
            }
            sent => sent?,
        };
        if let Some(limit) = self.bandwidth {
            let bytes = (self.outlet.bytes - before) as f64;
            let time = Duration::from_secs_f64(bytes / limit.max(1) as f64);
            self.due = self.due.max(start) + time;
        }
        Ok(sent)
    }

    /// Brings everything written to the disk, where the stream is a file.
    pub(crate) fn sync(&self) -> Result<()> {
        self.outlet.stream().sync()
    }

    /// Waits for the next answer.
    pub(crate) fn answer(&mut self, during: &'static str) -> Result<Message> {
        let start = Instant::now();
        loop {
            self.limits.check()?;
            if let Some(answer) = self.next(TICK)? {
                return Ok(answer);
            }
            let after = start.elapsed();
            if after >= self.limits.silence {
                return Err(Error::Silent { during, after });
            }
        }
    }

    /// Lets `time` pass, unless something ends the migration.
    pub(crate) fn pause(&mut self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        loop {
            self.limits.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            if self.is_file() || self.taken.is_some() {
                thread::sleep(left.min(TICK));
            } else {
                self.taken = self.next(left.min(TICK))?;
            }
        }
    }

    fn wait_until_due(&mut self) -> Result<()> {
        let left = self.due.saturating_duration_since(Instant::now());
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
        let Some(answers) = &self.answers else {
            return Ok(None);
        };
        match answers.recv_timeout(wait) {
            Ok(Ok(Message::Refused(reason))) => Err(Error::Refused { reason }),
            Ok(answer) => answer.map(Some),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(Error::Closed {
                during: "awaiting an answer",
            }),
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
        let end = Instant::now() + GRACE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.answers.as_ref()?.recv_timeout(left) {
                Ok(Ok(Message::Refused(reason))) => return Some(Error::Refused { reason }),
                Ok(Ok(_)) => {}
                Ok(Err(_)) | Err(_) => return None,
            }
        }
    }

    /// Tells the destination that it is over, if there is still a way to.
    pub(crate) fn cancel(&mut self, reason: &str) {
        if self.is_whole() {
            let patience = |stalled| {
                if stalled >= GRACE {
                    return Err(Error::Cancelled);
                }
                Ok(())
            };
            // It hears of the end of the stream in any case.
            let _ = self
                .outlet
                .send(&Message::Cancel(reason.into()), &Payload::None, &patience);
        }
    }

    /// Ends the stream, giving the peer a moment to read what was said last.
    pub(crate) fn close(mut self) {
        let stream = self.outlet.stream();
        stream.shutdown(Shutdown::Write);
        let end = Instant::now() + LINGER;
        while let Some(answers) = &self.answers {
            let left = end.saturating_duration_since(Instant::now());
            match answers.recv_timeout(left) {
                Ok(Ok(_)) => {}
                _ => break,
            }
        }
        stream.shutdown(Shutdown::Both);
        // A reader that waits for room in the queue must learn that nobody listens.
        self.answers = None;
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

fn read_answers(mut inlet: Inlet, to: &SyncSender<Result<Message>>) {
    loop {
        // No timeout is set for reading: whoever waits for an answer keeps the time, and `close` ends this.
        let answer = inlet
            .receive("awaiting an answer", &|_| Ok(()))
            .map(|(_, message)| message);
        let last = answer.is_err();
        if to.send(answer).is_err() || last {
            return;
        }
    }
}
