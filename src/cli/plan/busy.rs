//! What is computed, on a terminal, where it takes a while.

use std::io::{self, Read, Write};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use gleaner_migrate::CancelToken;
use gleaner_migrate::units::Seconds;

use crate::cli::progress::Line;

/// What is over by then needs no line.
const SOON: Duration = Duration::from_secs(1);
/// Between two lines.
const PERIOD: Duration = Duration::from_millis(250);

/// A line on standard error, if that is a terminal, until it is dropped.
pub struct Busy {
    /// Says what is being done. None once it is over.
    doing: Option<Sender<String>>,
    thread: Option<JoinHandle<()>>,
}

impl Busy {
    pub fn new() -> Self {
        let mut line = Line::new();
        if !line.in_place() {
            return Self::over();
        }
        let (doing, told) = channel();
        let show = move || {
            let began = Instant::now();
            let (mut what, mut wait) = (String::new(), SOON);
            loop {
                match told.recv_timeout(wait) {
                    Ok(next) => what = next,
                    Err(RecvTimeoutError::Timeout) => wait = PERIOD,
                    Err(RecvTimeoutError::Disconnected) => return line.erase(),
                }
                let passed = began.elapsed();
                if passed >= SOON {
                    line.show(&shown(&what, passed));
                } else {
                    wait = SOON - passed;
                }
            }
        };
        // Without a thread there is no line, and no harm.
        let thread = std::thread::Builder::new().spawn(show).ok();
        Self {
            doing: Some(doing),
            thread,
        }
    }

    const fn over() -> Self {
        Self {
            doing: None,
            thread: None,
        }
    }

    /// This is done from now on.
    pub fn with(&self, what: impl Into<String>) {
        if let Some(doing) = &self.doing {
            // The thread may not have come into being.
            let _ = doing.send(what.into());
        }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.doing = None;
        if let Some(thread) = self.thread.take() {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}

fn shown(what: &str, passed: Duration) -> String {
    format!(
        "{what}, {} so far; Ctrl-C ends it",
        Seconds(passed.as_secs_f64())
    )
}

/// Bytes that come, or go, until somebody calls it off.
pub struct Stoppable<'a, T>(pub T, pub &'a CancelToken);

impl<T> Stoppable<'_, T> {
    fn go_on(&self) -> io::Result<()> {
        if self.1.is_cancelled() {
            return Err(io::Error::other("cancelled"));
        }
        Ok(())
    }
}

impl<T: Read> Read for Stoppable<'_, T> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.go_on()?;
        self.0.read(bytes)
    }
}

impl<T: Write> Write for Stoppable<'_, T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.go_on()?;
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_is_done_and_for_how_long() {
        let line = shown("rule 7 of 9, QEMU's", Duration::from_millis(12_400));
        assert_eq!(line, "rule 7 of 9, QEMU's, 12 s so far; Ctrl-C ends it");
    }

    #[test]
    fn what_is_called_off_neither_reads_nor_writes_on() {
        let cancel = CancelToken::new();
        let (mut from, mut to) = (
            Stoppable(&[7u8; 9][..], &cancel),
            Stoppable(vec![], &cancel),
        );
        let mut bytes = [0; 4];
        assert!(from.read_exact(&mut bytes).is_ok() && to.write_all(&bytes).is_ok());
        cancel.cancel();
        assert!(from.read_exact(&mut bytes).is_err() && to.write_all(&bytes).is_err());
        assert_eq!((from.0.len(), to.0.len()), (5, 4));
    }
}
