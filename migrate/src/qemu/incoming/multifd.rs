//! Further connections, which carry pages, and where they meet the main one.
//!
//! ```text
//! connection 1   pages  pages  SYNC |wait|  pages ...
//! connection 2   pages  SYNC   |wait     |  pages ...
//! main           ...  mark     |wait|       ...
//! ```
//!
//! Between two connections nothing is in order: a page that comes again on another one is later only because both have
//! met in between.

use std::net::Shutdown;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::ram::Ram;
use crate::memory::PAGE;
use crate::patience::TICK;
use crate::qemu::packet::{HELLO_LEN, PACKET_LEN, Packet, SYNC};
use crate::threads::Finally;
use crate::wire::{Patience, read, read_pieces, read_some};
use crate::{CancelToken, Error, Result, Stream};

/// Where all connections meet.
///
/// Invariant: nothing of a connection is applied between its SYNC and the mark of the main one that belongs to it, and
/// nothing of the main one between its mark and the last SYNC that belongs to it.
#[derive(Default)]
pub(super) struct Meeting {
    state: Mutex<State>,
    changed: Condvar,
    /// That have come on all connections.
    bytes: AtomicU64,
}

#[derive(Default)]
struct State {
    /// Marks of the main connection so far.
    marks: u64,
    connections: Vec<Connection>,
    failed: Option<Error>,
    /// The main connection has ended: there will be no mark any more.
    ended: bool,
    /// It has failed: what becomes of the others does not matter.
    over: bool,
}

struct Connection {
    channel: u8,
    stream: Stream,
    syncs: u64,
    open: bool,
}

impl Meeting {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails if a connection has.
    pub(super) fn check(&self) -> Result<()> {
        self.lock().failed.take().map_or(Ok(()), Err)
    }

    /// Connections that came.
    pub(super) fn connections(&self) -> u64 {
        self.lock().connections.len() as u64
    }

    /// Bytes that came on all of them.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Takes a connection in that has said hello: its number here.
    pub(super) fn join(&self, channel: u8, stream: Stream) -> usize {
        self.count(HELLO_LEN);
        let mut state = self.lock();
        state.connections.push(Connection {
            channel,
            stream,
            syncs: 0,
            open: true,
        });
        state.connections.len() - 1
    }

    fn count(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// The main connection is at a mark: waits until every connection has come to the SYNC that belongs to it, for `limit`
    /// at most.
    pub(super) fn main(&self, cancel: &CancelToken, limit: Duration) -> Result<()> {
        let begun = Instant::now();
        let mut state = self.lock();
        let due = state.marks + 1;
        loop {
            if let Some(error) = state.failed.take() {
                return Err(error);
            }
            let late = state.connections.iter().find(|each| each.syncs < due);
            match late {
                None => break,
                Some(each) if !each.open => {
                    return Err(Error::Connection {
                        number: usize::from(each.channel) + 1,
                        cause: Box::new(Error::Closed {
                            during: "reading pages",
                        }),
                    });
                }
                Some(_) if cancel.is_cancelled() => return Err(Error::Cancelled),
                Some(each) if begun.elapsed() >= limit => {
                    return Err(bad(format!(
                        "connection {} of multifd has not come to its SYNC in {} s, where the main one is already",
                        each.channel,
                        limit.as_secs()
                    )));
                }
                Some(_) => {
                    let waited = self.changed.wait_timeout(state, TICK);
                    state = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
        state.marks = due;
        self.changed.notify_all();
        Ok(())
    }

    /// A connection is at a SYNC: waits for the mark. False when there will be none.
    fn sync(&self, number: usize) -> bool {
        let mut state = self.lock();
        state.connections[number].syncs += 1;
        let syncs = state.connections[number].syncs;
        self.changed.notify_all();
        while state.marks < syncs && !state.ended {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.marks >= syncs
    }

    /// Ends all connections: the main one has. Where it is `whole`, what others have said after the last mark is still
    /// looked at.
    pub(super) fn end(&self, whole: bool) {
        let how = if whole {
            Shutdown::Read
        } else {
            Shutdown::Both
        };
        let mut state = self.lock();
        state.ended = true;
        state.over = !whole;
        for connection in &state.connections {
            // What has come before can still be read.
            connection.stream.shutdown(how);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// What becomes of a connection, to its end.
    pub(super) fn carry(&self, number: usize, stream: &Stream, ram: &Ram) {
        // By a panic of the memory too: it is missed at the next mark.
        let _closed = Finally(|| {
            self.lock().connections[number].open = false;
            self.changed.notify_all();
        });
        let ended = self.packets(number, stream, ram);
        let mut state = self.lock();
        // One that ends after its last SYNC has done all that it had to; one that ended before is missed at the next mark.
        if let Err(error) = ended
            && !state.over
        {
            let channel = state.connections[number].channel;
            state.failed.get_or_insert(Error::Connection {
                number: usize::from(channel) + 1,
                cause: Box::new(error),
            });
        }
    }

    fn packets(&self, number: usize, stream: &Stream, ram: &Ram) -> Result<()> {
        const DURING: &str = "reading pages";
        // The main connection keeps the time.
        let patience: Patience<'_> = &|_| Ok(());
        let mut bytes = [0; PACKET_LEN];
        // Pages have come that no mark stands behind.
        let mut unmet = false;
        loop {
            if read_some(stream, &mut bytes[..1], DURING, patience)? == 0 {
                // An end between two packets is one, if nothing is missing.
                return if unmet { Err(left_over()) } else { Ok(()) };
            }
            read(stream, &mut bytes[1..], DURING, patience)?;
            self.count(PACKET_LEN);
            let packet = Packet::parse(&bytes)?;
            if !packet.offsets.is_empty() {
                unmet = true;
                let block = ram.block(&packet.block)?;
                let places = packet
                    .offsets
                    .iter()
                    .map(|offset| ram.place(block, *offset));
                let places = places.collect::<Result<Vec<_>>>()?;
                let (whole, zero) = places.split_at(packet.normal);
                let pieces = whole.iter().map(|place| ram.contents(*place));
                let pieces = pieces.collect::<Result<Vec<_>>>()?;
                read_pieces(stream, &pieces, DURING, patience)?;
                self.count(PAGE * pieces.len());
                for place in zero {
                    ram.zero(*place)?;
                }
            }
            if packet.flags & SYNC != 0 {
                if self.sync(number) {
                    unmet = false;
                } else if unmet {
                    return Err(left_over());
                }
                // Some versions say a last SYNC that no mark belongs to, and no page.
            }
        }
    }
}

/// What came last on a connection can't be told from what is older.
fn left_over() -> Error {
    bad("pages came last that no mark of the main one stands behind".into())
}

fn bad(problem: String) -> Error {
    Error::QemuStream { problem }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_connection_that_never_comes_to_its_sync_is_named() {
        let (_here, there) = UnixStream::pair().unwrap();
        let meeting = Meeting::default();
        meeting.join(3, there.into());
        let cancel = CancelToken::new();
        let error = meeting.main(&cancel, Duration::ZERO).unwrap_err();
        assert!(error.to_string().contains("connection 3"), "{error}");
    }
}
