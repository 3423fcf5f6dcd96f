//! The connections that a service has open.

use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// All of them, so that whoever ends the service can hang up.
#[derive(Debug, Default)]
pub(super) struct Connections(Mutex<Open>);

#[derive(Debug, Default)]
struct Open {
    ended: bool,
    next: u64,
    streams: BTreeMap<u64, UnixStream>,
}

/// A connection that is open, until this is dropped.
#[derive(Debug)]
pub(super) struct Entry<'a> {
    all: &'a Connections,
    number: u64,
}

impl Connections {
    fn lock(&self) -> MutexGuard<'_, Open> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a connection in; `None` when the service has ended.
    pub(super) fn enter(&self, stream: &UnixStream) -> io::Result<Option<Entry<'_>>> {
        let stream = stream.try_clone()?;
        let mut open = self.lock();
        if open.ended {
            return Ok(None);
        }
        let number = open.next;
        open.next += 1;
        open.streams.insert(number, stream);
        Ok(Some(Entry { all: self, number }))
    }

    /// Hangs up on all, for good.
    pub(super) fn end(&self) {
        let mut open = self.lock();
        open.ended = true;
        for stream in open.streams.values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.all.lock().streams.remove(&self.number);
    }
}
