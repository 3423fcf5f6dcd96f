//! What waits for a client to read it.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};

use super::monitor::lock;

/// Bytes that may wait when one more line comes.
const MOST: usize = 1 << 20;
/// Bytes that may wait when a client's next command is done.
const SOME: usize = 64 << 10;
/// How long a client may take to read a line, and all that is left when it is hung up on.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);

/// Lines for a client, which one thread writes. Nobody waits for a client that does not read but its own two threads.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lines: VecDeque<Arc<[u8]>>,
    /// Of them, and of the one that is being written.
    bytes: usize,
    /// Nothing is written after that.
    end: Option<Instant>,
    /// No line comes any more.
    complete: bool,
    /// Nothing is written any more.
    closed: bool,
}

impl Outbox {
    /// Puts a line in; whether there was room for it.
    pub(super) fn push(&self, line: Arc<[u8]>) -> bool {
        let mut state = lock(&self.state);
        if state.bytes >= MOST {
            return false;
        }
        if !state.closed {
            state.bytes += line.len();
            state.lines.push_back(line);
            self.changed.notify_all();
        }
        true
    }

    /// Waits until so little waits that the client may go on; whether it may.
    pub(super) fn wait_read(&self) -> bool {
        let waits = |state: &mut State| state.bytes > SOME && !state.closed;
        let state = self.changed.wait_while(lock(&self.state), waits);
        !state.unwrap_or_else(PoisonError::into_inner).closed
    }

    /// What is in here goes out within [`PATIENCE`], or never.
    pub(super) fn hang_up(&self) {
        let mut state = lock(&self.state);
        state.end.get_or_insert_with(|| Instant::now() + PATIENCE);
    }

    /// No line comes any more.
    pub(super) fn complete(&self) {
        self.hang_up();
        lock(&self.state).complete = true;
        self.changed.notify_all();
    }

    /// Writes what is put in, until that is complete or can't be written.
    pub(super) fn write(&self, to: &UnixStream) {
        while let Some((line, end)) = self.next() {
            if write(to, &line, end).is_err() {
                break;
            }
            lock(&self.state).bytes -= line.len();
            self.changed.notify_all();
        }
        let mut state = lock(&self.state);
        state.closed = true;
        state.lines.clear();
        self.changed.notify_all();
        // What could not be written any more is for nobody to read.
        let _ = to.shutdown(Shutdown::Both);
    }

    /// The next line, and when it has to be out.
    fn next(&self) -> Option<(Arc<[u8]>, Instant)> {
        let waits = |state: &mut State| state.lines.is_empty() && !state.complete;
        let state = self.changed.wait_while(lock(&self.state), waits);
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        let line = state.lines.pop_front()?;
        let end = Instant::now() + PATIENCE;
        Some((line, state.end.map_or(end, |last| last.min(end))))
    }
}

/// Writes all of a line until `end`, however little at a time the client reads.
pub(super) fn write(to: &UnixStream, mut line: &[u8], end: Instant) -> io::Result<()> {
    while !line.is_empty() {
        match send(to, line, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(sent) => line = &line[sent..],
            Err(Errno::AGAIN) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() && !line.is_empty() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        if !line.is_empty() {
            match poll(&mut [PollFd::new(to, PollFlags::OUT)], Some(&left)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn line(bytes: usize) -> Arc<[u8]> {
        vec![b'x'; bytes].into()
    }

    #[test]
    fn what_waits_is_limited_in_bytes_whatever_the_lines() {
        for bytes in [16, SOME, MOST] {
            let outbox = Outbox::default();
            let took = (0..=MOST).take_while(|_| outbox.push(line(bytes)));
            assert_eq!(took.count(), MOST.div_ceil(bytes));
        }
    }

    #[test]
    fn a_client_that_reads_all_the_time_but_too_little_is_given_up() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let reads = std::thread::spawn(move || {
            let (mut theirs, mut bytes) = (theirs, [0; 1024]);
            while theirs.read(&mut bytes).is_ok_and(|got| got > 0) {
                // It could go on so for a minute.
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let end = Instant::now() + Duration::from_millis(100);
        let error = write(&ours, &line(64 << 20), end).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(ours);
        reads.join().unwrap();
    }

    #[test]
    fn all_that_was_put_in_goes_out_to_one_who_reads() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let outbox = Outbox::default();
        std::thread::scope(|scope| {
            scope.spawn(|| outbox.write(&ours));
            let reads = scope.spawn(move || {
                let mut all = Vec::new();
                theirs.read_to_end(&mut all).map(|_| all)
            });
            for _ in 0..1000 {
                assert!(outbox.wait_read() && outbox.push(line(SOME)));
            }
            outbox.complete();
            assert_eq!(reads.join().unwrap().unwrap().len(), 1000 * SOME);
        });
        assert!(!outbox.wait_read());
    }
}
