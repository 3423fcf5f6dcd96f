//! Connections that have come, and said nothing yet.
//!
//! They are waited for side by side, in the thread that accepts, so one that says nothing keeps nobody else waiting. It is
//! dropped after [`GREETING`]. Only so many of them as [`MOST`] are let in at once, so a crowd of them can keep others out
//! for that time, and no longer.

use std::os::fd::BorrowedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::patience::TICK;
use crate::{CancelToken, Error, Result, Stream};

/// How long a new connection may take to say what it wants.
pub(crate) const GREETING: Duration = Duration::from_secs(5);
/// Waited for at once.
const MOST: usize = 32;

#[derive(Debug, Default)]
pub(crate) struct Newcomers(Mutex<Vec<Newcomer>>);

#[derive(Debug)]
struct Newcomer {
    stream: Stream,
    /// Asked for at once: a socket whose peer has hung up has forgotten.
    peer: String,
    came: Instant,
}

impl Newcomers {
    fn lock(&self) -> MutexGuard<'_, Vec<Newcomer>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next connection that says something, or hangs up. `listening` is ready when `accept` has one.
    pub(crate) fn next(
        &self,
        listening: BorrowedFd<'_>,
        accept: &dyn Fn() -> Result<Stream>,
        cancel: &CancelToken,
        end: Option<Instant>,
    ) -> Result<Option<Stream>> {
        // Not held while waiting: another thread may accept too.
        let mut here = std::mem::take(&mut *self.lock());
        let next = next(&mut here, listening, accept, cancel, end);
        self.lock().append(&mut here);
        next
    }
}

/// Returns when `listening` has a connection.
pub(crate) fn wait(listening: BorrowedFd<'_>, cancel: &CancelToken) -> Result<()> {
    let tick = Timespec {
        tv_sec: 0,
        tv_nsec: TICK.subsec_nanos().into(),
    };
    loop {
        let mut fds = [PollFd::from_borrowed_fd(listening, PollFlags::IN)];
        match poll(&mut fds, Some(&tick)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(cause) => return Err(Error::io("await a connection", cause.into())),
        }
        if cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        if !fds[0].revents().is_empty() {
            return Ok(());
        }
    }
}

fn next(
    here: &mut Vec<Newcomer>,
    listening: BorrowedFd<'_>,
    accept: &dyn Fn() -> Result<Stream>,
    cancel: &CancelToken,
    end: Option<Instant>,
) -> Result<Option<Stream>> {
    loop {
        // Whoever wants no more than who has come by now is not kept.
        let left = end.map_or(TICK, |end| end.saturating_duration_since(Instant::now()));
        let tick = Timespec {
            tv_sec: 0,
            tv_nsec: left.min(TICK).subsec_nanos().into(),
        };
        let mut fds: Vec<_> = here
            .iter()
            .map(|newcomer| PollFd::new(&newcomer.stream, PollFlags::IN))
            .collect();
        if here.len() < MOST {
            fds.push(PollFd::from_borrowed_fd(listening, PollFlags::IN));
        }
        match poll(&mut fds, Some(&tick)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(cause) => return Err(Error::io("await a connection", cause.into())),
        }
        let ready = fds.iter().position(|fd| !fd.revents().is_empty());
        drop(fds);
        if cancel.is_cancelled() {
            // Who has come is left to whoever accepts next.
            return Err(Error::Cancelled);
        }
        match ready {
            Some(at) if at < here.len() => return Ok(Some(here.remove(at).stream)),
            Some(_) => here.push(Newcomer::of(accept()?)),
            None if end.is_some_and(|end| Instant::now() >= end) => return Ok(None),
            None => {}
        }
        here.retain(Newcomer::is_awaited);
    }
}

impl Newcomer {
    fn of(stream: Stream) -> Self {
        Self {
            peer: stream.peer(),
            stream,
            came: Instant::now(),
        }
    }

    fn is_awaited(&self) -> bool {
        let awaited = self.came.elapsed() < GREETING;
        if !awaited {
            let (peer, seconds) = (&self.peer, GREETING.as_secs());
            tracing::warn!("{peer} has connected and said nothing for {seconds} s: hung up on it");
        }
        awaited
    }
}
