//! What a QEMU answers on the return path, as a thread hears it.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::record::{ANSWER_MAX, PONG, SHUT};
use crate::wire::read;
use crate::{Error, Result, Stream};

const DURING: &str = "awaiting an answer of QEMU";

/// The answers so far. Shared by all lanes of a migration.
#[derive(Default)]
pub(crate) struct Answers {
    heard: Mutex<Heard>,
    changed: Condvar,
}

#[derive(Default)]
struct Heard {
    /// PINGs that were answered. They are numbered from 1 on, and answered in order.
    pongs: u32,
    /// The return path was shut, with this value: 0 says that all was loaded.
    shut: Option<u32>,
    /// Nothing comes any more.
    over: bool,
    /// Why, until it is told.
    cause: Option<Error>,
}

/// What somebody waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Awaited {
    /// The answer to this PING, or a later one.
    Pong(u32),
    /// The end of the load.
    Shut,
    /// Nothing: only time is to pass.
    Nothing,
}

impl Heard {
    fn has(&self, what: Awaited) -> bool {
        match what {
            Awaited::Pong(number) => self.pongs >= number,
            Awaited::Shut => self.shut.is_some(),
            Awaited::Nothing => false,
        }
    }

    fn note(&mut self, kind: u16, data: &[u8]) -> Result<()> {
        let value = data.try_into().ok().map(u32::from_be_bytes);
        match (kind, value) {
            (PONG, Some(found)) if found == self.pongs.wrapping_add(1) => self.pongs = found,
            (PONG, Some(found)) => {
                return Err(Error::Sequence {
                    expected: u64::from(self.pongs) + 1,
                    found: found.into(),
                });
            }
            (SHUT, Some(value)) => self.shut = Some(value),
            (PONG | SHUT, None) => return Err(Error::NotQemu),
            // Of no interest to a source that does precopy alone.
            _ => {}
        }
        Ok(())
    }
}

impl Answers {
    /// Listens to `stream`, until it ends.
    pub(crate) fn follow(self: &Arc<Self>, stream: Stream) -> Result<JoinHandle<()>> {
        let answers = Arc::clone(self);
        thread::Builder::new()
            .name("gleaner-qemu".into())
            .spawn(move || {
                let cause = answers.hear(&stream).err();
                let mut heard = answers.lock();
                heard.over = true;
                heard.cause = cause;
                answers.changed.notify_all();
            })
            .map_err(|cause| Error::io("start a thread", cause))
    }

    fn hear(&self, stream: &Stream) -> Result<()> {
        loop {
            let mut head = [0; 4];
            // No timeout is set for reading: whoever waits keeps the time.
            read(stream, &mut head, DURING, &|_| Ok(()))?;
            let kind = u16::from_be_bytes([head[0], head[1]]);
            let length = u16::from_be_bytes([head[2], head[3]]);
            if length > ANSWER_MAX {
                return Err(Error::NotQemu);
            }
            let mut data = vec![0; length.into()];
            read(stream, &mut data, DURING, &|_| Ok(()))?;
            self.lock().note(kind, &data)?;
            self.changed.notify_all();
        }
    }

    /// Whether `what` has come; waits for it up to `wait`.
    ///
    /// # Errors
    /// [`Error::Closed`] when it has not and will not; what was wrong with an answer, which is told once.
    pub(crate) fn wait(&self, what: Awaited, wait: Duration) -> Result<bool> {
        let heard = self.lock();
        let more = |heard: &mut Heard| !heard.has(what) && !heard.over;
        let (mut heard, _) = self
            .changed
            .wait_timeout_while(heard, wait, more)
            .unwrap_or_else(PoisonError::into_inner);
        if heard.has(what) {
            return match (what, heard.shut) {
                (Awaited::Shut, Some(value @ 1..)) => Err(Error::NotLoaded { value }),
                _ => Ok(true),
            };
        }
        if heard.over {
            let closed = Error::Closed { during: DURING };
            return Err(heard.cause.take().unwrap_or(closed));
        }
        Ok(false)
    }

    fn lock(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    const LONG: Duration = Duration::from_secs(30);

    /// What is heard when the other end says `bytes`.
    fn hear(bytes: &[u8]) -> Arc<Answers> {
        let (near, mut far) = UnixStream::pair().unwrap();
        let answers = Arc::<Answers>::default();
        let thread = answers.follow(near.into()).unwrap();
        far.write_all(bytes).unwrap();
        drop(far);
        thread.join().unwrap();
        answers
    }

    #[test]
    fn pongs_come_in_order_and_shut_ends_the_load() {
        let answers = hear(
            b"\x00\x02\x00\x04\x00\x00\x00\x01\x00\x07\x00\x00\
              \x00\x02\x00\x04\x00\x00\x00\x02\x00\x01\x00\x04\x00\x00\x00\x00",
        );
        assert!(answers.wait(Awaited::Pong(2), LONG).unwrap());
        assert!(answers.wait(Awaited::Shut, LONG).unwrap());
        let error = answers.wait(Awaited::Pong(3), LONG).unwrap_err();
        assert!(matches!(error, Error::Closed { .. }), "{error}");
    }

    #[test]
    fn what_no_qemu_says_is_an_error() {
        let failing = |bytes: &[u8]| hear(bytes).wait(Awaited::Shut, LONG).unwrap_err();
        // A Gleaner's frame, a PONG without its number, one out of order, a load that failed.
        for other in [b"GLNR\x01\x00\x00\x00", b"\x00\x02\x00\x02\x00\x01\x00\x00"] {
            assert!(matches!(failing(other), Error::NotQemu));
        }
        let error = failing(b"\x00\x02\x00\x04\x00\x00\x00\x02");
        assert!(matches!(
            error,
            Error::Sequence {
                expected: 1,
                found: 2
            }
        ));
        let error = failing(b"\x00\x01\x00\x04\x00\x00\x00\x01");
        assert!(matches!(error, Error::NotLoaded { value: 1 }));
    }

    #[test]
    fn time_passes_where_nothing_is_awaited() {
        let (near, _far) = UnixStream::pair().unwrap();
        let answers = Arc::<Answers>::default();
        answers.follow(near.into()).unwrap();
        assert!(!answers.wait(Awaited::Nothing, Duration::ZERO).unwrap());
        assert!(!answers.wait(Awaited::Pong(1), Duration::ZERO).unwrap());
    }
}
