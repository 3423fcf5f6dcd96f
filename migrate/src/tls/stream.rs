//! A TLS connection as a stream.
//!
//! A sender writes in one thread and hears answers in another, on the same connection, while the other end may be doing
//! the reverse. Ciphers of both directions are one state behind one lock, so the lock is never held while anything waits:
//!
//! ```text
//! writer                                   reader
//! copy guest memory into its own buffer    lock: take what the socket has, decipher, unlock
//! lock: encipher, give the socket what     nothing there: wait for the socket to have more
//!   it takes at once, unlock
//! it takes no more: wait for room
//! ```
//!
//! Were both sockets full, each writer waits without the lock, each reader finds ciphertext, makes room, and the other
//! end's writer goes on: as without TLS, only an end that does not read can hold its peer up. What the ciphers themselves
//! want to say (an alert, new keys) goes with whoever comes next, and is never waited for by a reader.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustls::Connection;
use rustls::pki_types::ServerName;
use vm_memory::VolatileSlice;

use super::TlsClient;
use super::session::{Session, Step};
use crate::patience::{LINGER, TICK};
use crate::{Error, Result, Stream};

/// The most that is enciphered at once, in bytes: eight records.
const CHUNK: usize = 128 << 10;
/// How long the destination may take for the handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// A TLS connection; clones are handles on the same one.
#[derive(Clone)]
pub struct TlsStream(Arc<Shared>);

struct Shared {
    socket: Stream,
    /// Never locked while anything waits.
    session: Mutex<Session>,
    /// Where guest memory is copied to, so that it is enciphered from bytes that nobody changes.
    plain: Mutex<Vec<u8>>,
    /// Of reads and of writes.
    timeouts: Mutex<[Option<Duration>; 2]>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl TlsStream {
    /// A connection whose handshake is to be done.
    pub(super) fn new(socket: Stream, tls: Connection) -> Result<Self> {
        // For what is done without TLS: draining a connection that came to nothing.
        socket.set_timeouts(Some(TICK), Some(TICK))?;
        Ok(Self(Arc::new(Shared {
            socket,
            session: Mutex::new(Session::new(tls)),
            plain: Mutex::default(),
            timeouts: Mutex::default(),
        })))
    }

    /// Connects as the source, to the destination that `socket` leads to, which is `to` for people.
    pub(crate) fn connect(
        socket: Stream,
        client: &TlsClient,
        host: ServerName<'static>,
        to: &dyn fmt::Display,
    ) -> Result<Stream> {
        let fail = |problem| Error::Handshake {
            with: format!("to {to}"),
            problem,
        };
        let tls = client.start(host).map_err(|e| fail(e.to_string()))?;
        let stream = Self::new(socket, tls)?;
        let end = Instant::now() + HANDSHAKE;
        loop {
            let awaited = match stream.step() {
                Ok(Step::Done) => return Ok(Stream::Tls(stream)),
                Ok(Step::Reads) => PollFlags::IN,
                Ok(Step::Writes) => PollFlags::OUT,
                Err(error) => {
                    // So that the other end learns why.
                    stream.0.socket.linger(LINGER);
                    return Err(fail(stream.session().problem(&error)));
                }
            };
            if stream.wait(awaited, Some(end)).is_err() {
                let silence = HANDSHAKE.as_secs();
                return Err(fail(format!(
                    "the other end was silent for {silence} s in the handshake: check it and the network"
                )));
            }
        }
    }

    /// Goes on with the handshake, without waiting.
    pub(super) fn step(&self) -> io::Result<Step> {
        self.session().shake(&self.0.socket)
    }

    pub(super) fn session(&self) -> MutexGuard<'_, Session> {
        lock(&self.0.session)
    }

    /// What is underneath.
    pub(super) fn socket(&self) -> &Stream {
        &self.0.socket
    }

    pub(crate) fn set_timeouts(
        &self,
        read: Option<Duration>,
        write: Option<Duration>,
    ) -> io::Result<()> {
        if [read, write].contains(&Some(Duration::ZERO)) {
            return Err(io::Error::new(
                ErrorKind::InvalidInput,
                "a timeout of zero would be none",
            ));
        }
        *lock(&self.0.timeouts) = [read, write];
        Ok(())
    }

    pub(crate) fn shutdown(&self, how: Shutdown) {
        if how != Shutdown::Read {
            self.session().say_goodbye(&self.0.socket);
        }
        self.0.socket.shutdown(how);
    }

    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        self.read_into(&mut |bytes| {
            let room = &mut buffer[filled..];
            let count = bytes.len().min(room.len());
            room[..count].copy_from_slice(&bytes[..count]);
            filled += count;
            count
        })
    }

    pub(crate) fn read_pages(&self, pieces: &[VolatileSlice<'_>]) -> io::Result<usize> {
        let mut pieces = Pieces::of(pieces);
        self.read_into(&mut |bytes| pieces.fill(bytes))
    }

    /// As much of `bytes` as has gone to the socket. After an error that is to be tried again, the same bytes come first.
    pub(crate) fn write(&self, bytes: &[u8], more: bool) -> io::Result<usize> {
        if !self.session().owes() {
            self.session().encipher(&bytes[..bytes.len().min(CHUNK)])?;
        }
        self.send(more)
    }

    /// As [`TlsStream::write`]. Of guest memory that changed before it was tried again, either contents are sent.
    pub(crate) fn write_pages(&self, pieces: &[VolatileSlice<'_>]) -> io::Result<usize> {
        if !self.session().owes() {
            let mut plain = lock(&self.0.plain);
            plain.resize(CHUNK, 0);
            // Without the session's lock, so that a reader gets on meanwhile.
            let count = Pieces::of(pieces).copy_to(&mut plain);
            self.session().encipher(&plain[..count])?;
        }
        self.send(false)
    }

    fn send(&self, more: bool) -> io::Result<usize> {
        let end = self.end(1);
        loop {
            let sent = self.session().write(&self.0.socket, more);
            match sent {
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.wait(PollFlags::OUT, end)?,
                sent => return sent,
            }
        }
    }

    fn read_into(&self, sink: &mut dyn FnMut(&[u8]) -> usize) -> io::Result<usize> {
        let end = self.end(0);
        loop {
            let read = self.session().read(&self.0.socket, sink);
            match read {
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.wait(PollFlags::IN, end)?,
                read => return read,
            }
        }
    }

    /// When a read or a write that moves nothing returns.
    fn end(&self, which: usize) -> Option<Instant> {
        lock(&self.0.timeouts)[which].map(|limit| Instant::now() + limit)
    }

    /// Waits for the socket; `WouldBlock` when `end` has come.
    fn wait(&self, event: PollFlags, end: Option<Instant>) -> io::Result<()> {
        let mut fds = [PollFd::new(&self.0.socket, event)];
        let left = match end.map(|end| end.saturating_duration_since(Instant::now())) {
            Some(Duration::ZERO) => return Err(ErrorKind::WouldBlock.into()),
            left => left.and_then(|left| left.try_into().ok()),
        };
        match poll(&mut fds, left.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(cause) => Err(cause.into()),
        }
    }
}

/// Guest memory, piece after piece.
struct Pieces<'a> {
    pieces: &'a [VolatileSlice<'a>],
    /// What is done of the first piece.
    done: usize,
}

impl<'a> Pieces<'a> {
    const fn of(pieces: &'a [VolatileSlice<'a>]) -> Self {
        Self { pieces, done: 0 }
    }

    /// Copies to as many bytes as there are, and goes on behind them.
    fn fill(&mut self, bytes: &[u8]) -> usize {
        self.each(bytes.len(), |piece, at| {
            piece.copy_from(&bytes[at..]);
        })
    }

    fn copy_to(&mut self, bytes: &mut [u8]) -> usize {
        self.each(bytes.len(), |piece, at| {
            piece.copy_to(&mut bytes[at..]);
        })
    }

    /// Calls `copy` with each part of the pieces and where it belongs, up to `most` bytes.
    fn each(&mut self, most: usize, mut copy: impl FnMut(VolatileSlice<'a>, usize)) -> usize {
        let mut at = 0;
        while let [piece, rest @ ..] = self.pieces {
            let count = (piece.len() - self.done).min(most - at);
            let Ok(part) = piece.subslice(self.done, count) else {
                break; // not reached: it is inside the piece
            };
            copy(part, at);
            at += count;
            self.done += count;
            if self.done < piece.len() {
                break;
            }
            (self.pieces, self.done) = (rest, 0);
        }
        at
    }
}

impl AsFd for TlsStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.socket.as_fd()
    }
}

impl fmt::Debug for TlsStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("TlsStream").field(&self.0.socket).finish()
    }
}
