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
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::ram::Ram;
use crate::patience::TICK;
use crate::qemu::packet::{HELLO_LEN, Hello, PACKET_LEN, Packet, SYNC};
use crate::wire::{Patience, read, read_pieces, read_some};
use crate::{CancelToken, Error, Result, Stream};

/// How long a further connection may take to say what it is.
const HELLO: Duration = Duration::from_secs(5);
/// Connections that are taken at most: more than that QEMU does not make.
pub(super) const MAX_CONNECTIONS: usize = 255;
/// A connection that comes after so many meetings has missed pages that came before.
const LAST_JOIN: u64 = 1;

/// Where all connections meet.
///
/// Invariant: nothing of a connection is applied between its SYNC and the mark of the main one that belongs to it, and
/// nothing of the main one between its mark and the last SYNC that belongs to it.
#[derive(Default)]
pub(super) struct Meeting {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Marks of the main connection so far.
    marks: u64,
    connections: Vec<Connection>,
    /// All have the same.
    machine: Option<[u8; 16]>,
    failed: Option<Error>,
    /// The main connection has ended.
    over: bool,
}

struct Connection {
    channel: u8,
    stream: Stream,
    syncs: u64,
    /// Pages have come that no SYNC stands behind: they may be half here.
    unmet: bool,
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

    /// All has ended: fails if pages of a connection may be half here.
    pub(super) fn check_met(&self) -> Result<()> {
        let state = self.lock();
        match state.connections.iter().find(|each| each.unmet) {
            None => Ok(()),
            Some(each) => Err(Error::QemuStream {
                problem: format!(
                    "connection {} of multifd did not end with a SYNC",
                    each.channel
                ),
            }),
        }
    }

    /// Connections that came.
    pub(super) fn connections(&self) -> u64 {
        self.lock().connections.len() as u64
    }

    /// Takes a connection in, if it is one of the migration: its number.
    pub(super) fn admit(&self, stream: &Stream) -> Result<Option<usize>> {
        match hello(stream) {
            Ok(hello) => self.join(&hello, stream.try_clone()?).map(Some),
            Err(error) => {
                // Somebody else: a probe of the port, another source.
                tracing::warn!(%error, "hung up on a connection that is not of the migration");
                Ok(None)
            }
        }
    }

    fn join(&self, hello: &Hello, stream: Stream) -> Result<usize> {
        let mut state = self.lock();
        let bad = |problem: String| Err(Error::QemuStream { problem });
        if *state.machine.get_or_insert(hello.machine) != hello.machine {
            return bad("connections of two sources came at the same time".into());
        }
        if state.marks > LAST_JOIN {
            return bad("a connection of multifd came too late: pages of it are missing".into());
        }
        let number = state.connections.len();
        if state
            .connections
            .iter()
            .any(|other| other.channel == hello.channel)
        {
            return bad(format!(
                "connection {} of multifd came twice",
                hello.channel
            ));
        }
        if number == MAX_CONNECTIONS {
            return bad("there are too many connections of multifd".into());
        }
        state.connections.push(Connection {
            channel: hello.channel,
            stream,
            syncs: 0,
            unmet: false,
            open: true,
        });
        Ok(number)
    }

    /// The main connection is at a mark: waits until every connection has come to the SYNC that belongs to it.
    pub(super) fn main(&self, cancel: &CancelToken) -> Result<()> {
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
        state.connections[number].unmet = false;
        self.changed.notify_all();
        while state.marks < state.connections[number].syncs && !state.over {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        !state.over
    }

    /// Ends all connections: the main one has.
    pub(super) fn end(&self) {
        let mut state = self.lock();
        state.over = true;
        for connection in &state.connections {
            connection.stream.shutdown(Shutdown::Both);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// What becomes of a connection, to its end.
    pub(super) fn carry(&self, number: usize, stream: &Stream, ram: &Ram) {
        let ended = self.packets(number, stream, ram);
        let mut state = self.lock();
        state.connections[number].open = false;
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
        drop(state);
        self.changed.notify_all();
    }

    fn packets(&self, number: usize, stream: &Stream, ram: &Ram) -> Result<()> {
        const DURING: &str = "reading pages";
        // The main connection keeps the time.
        let patience: Patience<'_> = &|_| Ok(());
        let mut bytes = [0; PACKET_LEN];
        loop {
            // An end between two packets is one.
            if read_some(stream, &mut bytes[..1], DURING, patience)? == 0 {
                return Ok(());
            }
            read(stream, &mut bytes[1..], DURING, patience)?;
            let packet = Packet::parse(&bytes)?;
            if !packet.offsets.is_empty() {
                self.lock().connections[number].unmet = true;
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
                for place in zero {
                    ram.zero(*place)?;
                }
            }
            if packet.flags & SYNC != 0 && !self.sync(number) {
                return Ok(());
            }
        }
    }
}

/// What a connection says of itself.
fn hello(stream: &Stream) -> Result<Hello> {
    stream.set_timeouts(Some(TICK), Some(TICK))?;
    let mut bytes = [0; HELLO_LEN];
    let begun = Instant::now();
    let patience = |after| {
        if begun.elapsed() < HELLO {
            return Ok(());
        }
        Err(Error::Silent {
            during: "awaiting a greeting",
            after,
        })
    };
    read(stream, &mut bytes, "awaiting a greeting", &patience)?;
    Hello::parse(&bytes)
}
