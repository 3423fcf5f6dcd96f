//! The handshakes under way at a listener.
//!
//! They go on side by side, in the thread that accepts: a client that says nothing, or says it slowly, keeps nobody else
//! waiting and is dropped after [`LIMIT`]. Only as many of them as [`MOST`] are let in at once, so a crowd of such
//! clients can keep others out for that time, and no longer.

use std::os::fd::BorrowedFd;
use std::sync::{Mutex, TryLockError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, recv};

use super::session::Step;
use super::{TlsServer, TlsStream};
use crate::patience::{LINGER, TICK, silent_after};
use crate::wire::{Message, Outlet, Payload};
use crate::{CancelToken, Error, Result, Stream};

/// How long a handshake may take.
const LIMIT: Duration = Duration::from_secs(5);
/// Handshakes under way at once.
const MOST: usize = 32;
/// What a source without TLS is told.
const TLS_ONLY: &str =
    "this destination takes connections with TLS only: use it at both ends or at neither";

#[derive(Debug)]
pub(crate) struct Handshakes {
    server: TlsServer,
    under_way: Mutex<UnderWay>,
}

#[derive(Debug)]
struct UnderWay {
    handshakes: Vec<Handshake>,
    /// When somebody accepted last.
    left: Instant,
}

#[derive(Debug)]
struct Handshake {
    /// Asked for at once: a socket whose peer has hung up has forgotten.
    peer: String,
    stream: TlsStream,
    awaited: PollFlags,
    /// It came to nothing, and the other end is given time to read why.
    failed: bool,
    end: Instant,
}

/// What became of a handshake when its socket was ready, or its time over.
enum Fate {
    GoesOn,
    Done,
    Failed(String),
    /// Nobody has said anything, or all is said.
    Over,
}

impl Handshakes {
    pub(crate) fn new(server: TlsServer) -> Self {
        Self {
            server,
            under_way: Mutex::new(UnderWay {
                handshakes: Vec::new(),
                left: Instant::now(),
            }),
        }
    }

    /// The next connection whose handshake is done. `listening` is ready when `accept` has one that begins; where there
    /// is only the one that `accept` gives, it is `None`, and that one's failure is the error.
    pub(crate) fn next(
        &self,
        listening: Option<BorrowedFd<'_>>,
        accept: &dyn Fn() -> Result<Stream>,
        cancel: &CancelToken,
        end: Option<Instant>,
    ) -> Result<Option<Stream>> {
        let over = || end.is_some_and(|end| Instant::now() >= end);
        let mut under_way = loop {
            match self.under_way.try_lock() {
                Ok(under_way) => break under_way,
                Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
                // Another thread accepts.
                Err(TryLockError::WouldBlock) if cancel.is_cancelled() => {
                    return Err(Error::Cancelled);
                }
                Err(TryLockError::WouldBlock) if over() => return Ok(None),
                Err(TryLockError::WouldBlock) => std::thread::sleep(TICK),
            }
        };
        // While nobody accepted they could not get on.
        let unheard = under_way.left.elapsed();
        for handshake in &mut under_way.handshakes {
            handshake.end += unheard;
        }
        let next = self.accept(&mut under_way.handshakes, listening, accept, cancel, &over);
        under_way.left = Instant::now();
        next
    }

    fn accept(
        &self,
        under_way: &mut Vec<Handshake>,
        listening: Option<BorrowedFd<'_>>,
        accept: &dyn Fn() -> Result<Stream>,
        cancel: &CancelToken,
        over: &dyn Fn() -> bool,
    ) -> Result<Option<Stream>> {
        let tick = Timespec {
            tv_sec: 0,
            tv_nsec: TICK.subsec_nanos().into(),
        };
        if listening.is_none() && under_way.is_empty() {
            under_way.push(self.begin(accept()?)?);
        }
        while !cancel.is_cancelled() {
            let (news, ready) = {
                let mut fds: Vec<_> = under_way
                    .iter()
                    .map(|h| PollFd::new(h.stream.socket(), h.awaited))
                    .collect();
                if let Some(fd) = listening.filter(|_| fds.len() < MOST) {
                    fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
                }
                match poll(&mut fds, Some(&tick)) {
                    Ok(_) => {}
                    Err(rustix::io::Errno::INTR) => continue,
                    Err(cause) => return Err(Error::io("await a connection", cause.into())),
                }
                let mut ready: Vec<_> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
                let news = ready.len() > under_way.len() && ready.pop() == Some(true);
                (news, ready)
            };
            // From the last, so that removing one moves none that is still to come.
            for at in (0..under_way.len()).rev() {
                match under_way[at].go_on(ready[at], listening.is_some()) {
                    Fate::GoesOn => {}
                    Fate::Done => {
                        let done = under_way.swap_remove(at);
                        return Ok(Some(Stream::Tls(done.stream)));
                    }
                    Fate::Over => drop(under_way.swap_remove(at)),
                    Fate::Failed(problem) => {
                        let handshake = &under_way[at];
                        let error = Error::Handshake {
                            with: format!("from {}", handshake.peer),
                            problem,
                        };
                        if listening.is_none() {
                            handshake.stream.socket().linger(LINGER);
                            under_way.clear();
                            return Err(error);
                        }
                        tracing::warn!("{error}");
                    }
                }
            }
            if news {
                under_way.push(self.begin(accept()?)?);
            } else if over() {
                return Ok(None);
            }
        }
        Err(Error::Cancelled)
    }

    fn begin(&self, socket: Stream) -> Result<Handshake> {
        let tls = self.server.start().map_err(|error| Error::Handshake {
            with: "with anybody".into(),
            problem: error.to_string(),
        })?;
        Ok(Handshake {
            peer: socket.peer(),
            stream: TlsStream::new(socket, tls)?,
            awaited: PollFlags::IN,
            failed: false,
            end: Instant::now() + LIMIT,
        })
    }
}

impl Handshake {
    /// `others`: there is somebody else to wait for, so this one has only its time.
    fn go_on(&mut self, ready: bool, others: bool) -> Fate {
        if self.failed {
            return match self.drain(ready) {
                true => Fate::Over,
                false => Fate::GoesOn,
            };
        }
        if ready {
            match self.stream.step() {
                Ok(Step::Done) => return Fate::Done,
                Ok(Step::Reads) => self.awaited = PollFlags::IN,
                Ok(Step::Writes) => self.awaited = PollFlags::OUT,
                Err(error) => {
                    let session = self.stream.session();
                    // A probe of the port. Where nobody else can come, it is the end.
                    if others && session.is_unopened() {
                        tracing::info!("a connection without a word");
                        return Fate::Over;
                    }
                    let (problem, plain) = (session.problem(&error), session.is_plain());
                    drop(session);
                    if plain {
                        self.refuse_plainly();
                    }
                    self.stream.socket().shutdown(std::net::Shutdown::Write);
                    (self.failed, self.awaited) = (true, PollFlags::IN);
                    self.end = Instant::now() + LINGER;
                    return Fate::Failed(problem);
                }
            }
        }
        if others && Instant::now() >= self.end {
            (self.failed, self.end) = (true, Instant::now());
            return Fate::Failed(format!(
                "the other end was silent for {} s in the handshake",
                LIMIT.as_secs()
            ));
        }
        Fate::GoesOn
    }

    /// Reads and drops what still comes; whether that is over. Closed with unread bytes, the socket would take back what
    /// was said last.
    fn drain(&self, ready: bool) -> bool {
        let mut scrap = [0; 4096];
        let ended = ready
            && !matches!(
                recv(self.stream.socket(), &mut scrap, RecvFlags::DONTWAIT),
                Ok((1.., _)) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR)
            );
        ended || Instant::now() >= self.end
    }

    /// A source that speaks without TLS understands a refusal without TLS, and nothing else.
    fn refuse_plainly(&self) {
        if let Ok(socket) = self.stream.socket().try_clone() {
            let refusal = Message::Refused(TLS_ONLY.into());
            let patience = silent_after("refusing", TICK);
            let _ = Outlet::new(socket).send(&refusal, &Payload::None, &patience);
        }
    }
}
