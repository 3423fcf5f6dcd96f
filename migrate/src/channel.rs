//! What a sender sends over: a stream, with a thread that hears the answers, or whatever else carries frames.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::net::Shutdown;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::lane::MAX_IN_FLIGHT;
use crate::patience::{LINGER, TICK};
use crate::wire::{Inlet, Message, Outlet, Patience, Payload};
use crate::{Error, Result, Stream};

/// Answers that may wait to be taken. More than are ever due, so only a peer that breaks the protocol is slowed by it.
pub(crate) const WAITING: usize = 64;

/// Frames to the destination and answers from it. It knows nothing of the protocol; the [`Sender`](crate::Sender) keeps
/// order, limits and pace.
pub trait Channel {
    /// Sends a frame and returns its number, from 0. While it takes long it asks `patience` now and then, with the time
    /// since something moved, and gives up with its error.
    ///
    /// # Errors
    /// [`Error::Closed`], [`Error::Io`], [`Error::Refused`] when that is heard meanwhile, those of `patience`: the frame
    /// may be half sent. [`Error::TooLong`], [`Error::Metadata`]: nothing of it is.
    fn send(
        &mut self,
        message: &Message,
        payload: &Payload<'_>,
        patience: Patience<'_>,
    ) -> Result<u64>;

    /// Sees to it that what was sent will be answered: called before somebody waits for an answer. A channel whose
    /// destination answers a frame at a time has nothing to do here; another may have put a question off.
    ///
    /// # Errors
    /// As [`Channel::send`].
    fn flush(&mut self, patience: Patience<'_>) -> Result<()> {
        let _ = patience;
        Ok(())
    }

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

    /// Syncs that may be unanswered at a time: enough to keep the line busy while answers travel. Unless overridden, 4.
    fn most_unanswered(&self) -> usize {
        MAX_IN_FLIGHT
    }

    /// What is likely, and what to do, when the destination is gone or silent now without a reason. `None` of one that
    /// gives reasons, and says later what became of a migration.
    fn advice(&self) -> Option<String> {
        None
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

/// Whoever holds a channel is one.
macro_rules! holders {
    ($($holder:ty),*) => {$(
        impl<C: Channel + ?Sized> Channel for $holder {
            fn send(
                &mut self,
                message: &Message,
                payload: &Payload<'_>,
                patience: Patience<'_>,
            ) -> Result<u64> {
                (**self).send(message, payload, patience)
            }

            fn flush(&mut self, patience: Patience<'_>) -> Result<()> {
                (**self).flush(patience)
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

            fn most_unanswered(&self) -> usize {
                (**self).most_unanswered()
            }

            fn advice(&self) -> Option<String> {
                (**self).advice()
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
    )*};
}

holders!(&mut C, Box<C>);

/// A stream as a channel.
pub(crate) struct StreamChannel {
    outlet: Outlet,
    /// `None` for a file.
    answers: Option<Receiver<Result<Message>>>,
    /// Those that came while a frame was written.
    heard: VecDeque<Result<Message>>,
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
            heard: VecDeque::new(),
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
        let (answers, heard) = (&self.answers, RefCell::new(&mut self.heard));
        let listening = |stalled| {
            listen(answers.as_ref(), &mut heard.borrow_mut())?;
            patience(stalled)
        };
        self.outlet.send(message, payload, &listening)
    }

    fn answer(&mut self, wait: Duration) -> Result<Option<Message>> {
        if let Some(answer) = self.heard.pop_front() {
            return answer.map(Some);
        }
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

impl Drop for StreamChannel {
    /// One that was not closed has nothing to say any more, but the other end must hear that, and no thread stay.
    fn drop(&mut self) {
        if let Some(reader) = self.reader.take() {
            self.outlet.stream().shutdown(Shutdown::Both);
            self.answers = None;
            let _ = reader.join();
        }
    }
}

/// Takes the answers that are there. A destination that has refused reads no more: who writes must know at once.
fn listen(
    answers: Option<&Receiver<Result<Message>>>,
    heard: &mut VecDeque<Result<Message>>,
) -> Result<()> {
    while heard.len() < WAITING
        && let Some(Ok(answer)) = answers.map(Receiver::try_recv)
    {
        match answer {
            Ok(Message::Refused(reason)) => return Err(Error::Refused { reason }),
            answer => heard.push_back(answer),
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_other_end_hears_of_a_channel_that_is_dropped() {
        let (near, mut far) = UnixStream::pair().unwrap();
        drop(StreamChannel::open(near.into()).unwrap());
        assert_eq!(far.read(&mut [0; 8]).unwrap(), 0);
    }
}
