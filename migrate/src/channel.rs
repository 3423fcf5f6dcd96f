//! What a sender sends over: a stream, with a thread that hears the answers, or whatever else carries frames.

use std::net::Shutdown;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::patience::{LINGER, TICK};
use crate::wire::{Inlet, Message, Outlet, Patience, Payload};
use crate::{Error, Result, Stream};

/// Answers that may wait to be taken. More than are ever due, so only a peer that breaks the protocol is slowed by it.
const WAITING: usize = 64;

/// Frames to the destination and answers from it. It knows nothing of the protocol; the [`Sender`](crate::Sender) keeps
/// order, limits and pace.
pub trait Channel {
    /// Sends a frame and returns its number, from 0. While nothing moves it asks `patience` now and then, with the time
    /// since something did, and gives up with its error.
    ///
    /// # Errors
    /// [`Error::Closed`], [`Error::Io`], those of `patience`: the frame may be half sent. [`Error::TooLong`],
    /// [`Error::Metadata`]: nothing of it is.
    fn send(
        &mut self,
        message: &Message,
        payload: &Payload<'_>,
        patience: Patience<'_>,
    ) -> Result<u64>;

    /// The next answer, if one comes within `wait`.
    ///
    /// # Errors
    /// [`Error::Closed`] when none will come any more; what is wrong with one that came.
    fn answer(&mut self, wait: Duration) -> Result<Option<Message>>;

    /// Whether there is anybody to answer. With a file there is not.
    fn is_answered(&self) -> bool;

    /// Whether a descriptor can go along with a frame. Unless overridden, none can.
    fn takes_descriptors(&self) -> bool {
        false
    }

    /// No frame is half sent: another may follow.
    fn is_whole(&self) -> bool;

    /// Bytes sent.
    fn bytes(&self) -> u64;

    /// Makes what was sent durable where nobody answers.
    ///
    /// # Errors
    /// [`Error::Io`]: it may not be.
    fn sync(&self) -> Result<()>;

    /// Ends it, giving the destination a moment to read what was said last.
    fn close(&mut self);
}

impl<C: Channel + ?Sized> Channel for &mut C {
    fn send(
        &mut self,
        message: &Message,
        payload: &Payload<'_>,
        patience: Patience<'_>,
    ) -> Result<u64> {
        (**self).send(message, payload, patience)
    }

    fn answer(&mut self, wait: Duration) -> Result<Option<Message>> {
        (**self).answer(wait)
    }

    fn is_answered(&self) -> bool {
        (**self).is_answered()
    }

    fn takes_descriptors(&self) -> bool {
        (**self).takes_descriptors()
    }

    fn is_whole(&self) -> bool {
        (**self).is_whole()
    }

    fn bytes(&self) -> u64 {
        (**self).bytes()
    }

    fn sync(&self) -> Result<()> {
        (**self).sync()
    }

    fn close(&mut self) {
        (**self).close();
    }
}

/// A stream as a channel.
pub(crate) struct StreamChannel {
    outlet: Outlet,
    /// `None` for a file.
    answers: Option<Receiver<Result<Message>>>,
    reader: Option<JoinHandle<()>>,
}

impl StreamChannel {
    pub(crate) fn open(stream: Stream) -> Result<Self> {
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
        })
    }
}

impl Channel for StreamChannel {
    fn send(
        &mut self,
        message: &Message,
        payload: &Payload<'_>,
        patience: Patience<'_>,
    ) -> Result<u64> {
        self.outlet.send(message, payload, patience)
    }

    fn answer(&mut self, wait: Duration) -> Result<Option<Message>> {
        let Some(answers) = &self.answers else {
            return Ok(None);
        };
        match answers.recv_timeout(wait) {
            Ok(answer) => answer.map(Some),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(Error::Closed {
                during: "awaiting an answer",
            }),
        }
    }

    fn is_answered(&self) -> bool {
        self.answers.is_some()
    }

    fn takes_descriptors(&self) -> bool {
        self.outlet.stream().takes_descriptors()
    }

    fn is_whole(&self) -> bool {
        self.outlet.whole
    }

    fn bytes(&self) -> u64 {
        self.outlet.bytes
    }

    fn sync(&self) -> Result<()> {
        self.outlet.stream().sync()
    }

    fn close(&mut self) {
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
