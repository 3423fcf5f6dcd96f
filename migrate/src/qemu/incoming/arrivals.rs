//! Connections that come, until it is known what each of them is.
//!
//! A connection tells by its first bytes, which may be slow to come: all that have not told yet are waited for side by side,
//! so none keeps another out, and calling it off is heard meanwhile. Those of multifd are kept until the main one asks for
//! them. In QEMU that is at its first mark, behind which it sends nothing before all of them have said what they are.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::patience::{TICK, within};
use crate::qemu::packet::{self, HELLO_LEN, Hello};
use crate::qemu::record::MAGIC;
use crate::wire::{self, Message, Outlet, Payload};
use crate::{CancelToken, Error, Listener, Result, Stream};

/// How long a connection may take to say what it is, and the main one to be joined by all others.
const GREETING: Duration = Duration::from_secs(5);
/// Connections at once that have not said what they are.
const MOST_WAITING: usize = 32;
/// Connections of multifd that are kept: there is one for each number, and as many may be left of a source that has gone.
const MOST_KEPT: usize = 512;

/// A connection of multifd.
pub(super) struct Arrival {
    pub(super) hello: Hello,
    pub(super) stream: Stream,
}

/// All who have come.
pub(super) struct Arrivals<'a> {
    listener: &'a Listener,
    cancel: &'a CancelToken,
    /// Who has not said what he is, and when he came.
    waiting: Vec<(Stream, Instant)>,
    kept: Vec<Arrival>,
}

/// What a connection says that it is.
enum Said {
    Nothing,
    Main,
    Multifd(Hello),
}

impl<'a> Arrivals<'a> {
    pub(super) fn new(listener: &'a Listener, cancel: &'a CancelToken) -> Self {
        Self {
            listener,
            cancel,
            waiting: Vec::new(),
            kept: Vec::new(),
        }
    }

    /// The connection that leads.
    pub(super) fn main(&mut self) -> Result<Stream> {
        loop {
            if let (_, Some(main)) = self.step(Instant::now() + TICK)? {
                return Ok(main);
            }
        }
    }

    /// The connections of multifd, which are `channels`, by their numbers. Each is there once when this returns.
    pub(super) fn multifd(&mut self, channels: u8) -> Result<Vec<Arrival>> {
        let begun = Instant::now();
        // All that have come by now, before any is taken for the right one.
        let mut more = true;
        while more || (self.numbers() < channels.into() && begun.elapsed() < GREETING) {
            let wait = if more { Duration::ZERO } else { TICK };
            let main;
            (more, main) = self.step(Instant::now() + wait)?;
            if main.is_some() {
                tracing::warn!("hung up on another source: one is received from already");
            }
        }
        let came = choose(std::mem::take(&mut self.kept), channels)?;
        if came.len() < channels.into() {
            return Err(Error::MultifdMissing {
                channels,
                came: came.len(),
                after: begun.elapsed(),
            });
        }
        Ok(came)
    }

    /// Different numbers among those kept.
    fn numbers(&self) -> usize {
        let all = self.kept.iter().map(|each| (each.hello.channel, ()));
        all.collect::<BTreeMap<_, _>>().len()
    }

    /// Takes in whoever comes by `end`, one at most, and hears what others have said meanwhile. Whether one came; the main
    /// connection, if one has said that it is.
    fn step(&mut self, end: Instant) -> Result<(bool, Option<Stream>)> {
        let came = if self.waiting.len() < MOST_WAITING {
            self.listener.accept_until(self.cancel, Some(end))?
        } else {
            thread::sleep(end.saturating_duration_since(Instant::now()));
            None
        };
        if self.cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let any = came.is_some();
        self.waiting
            .extend(came.map(|stream| (stream, Instant::now())));
        let mut main = None;
        for (stream, since) in std::mem::take(&mut self.waiting) {
            match said(&stream) {
                Ok(Said::Nothing) if since.elapsed() < GREETING => {
                    self.waiting.push((stream, since));
                }
                Ok(Said::Nothing) => hung_up(&Error::Silent {
                    during: "awaiting a greeting",
                    after: since.elapsed(),
                }),
                Ok(Said::Main) if main.is_none() => main = Some(stream),
                // It is heard the next time.
                Ok(Said::Main) => self.waiting.push((stream, since)),
                Ok(Said::Multifd(hello)) if self.kept.len() < MOST_KEPT => {
                    self.kept.push(Arrival { hello, stream });
                }
                Ok(Said::Multifd(_)) => tracing::warn!("hung up on one of too many connections"),
                Err(error) => hung_up(&error),
            }
        }
        Ok((any, main))
    }
}

/// Of all connections those of the source: one for each number, where one has come.
fn choose(kept: Vec<Arrival>, channels: u8) -> Result<Vec<Arrival>> {
    // The newest first, and those that have hung up behind the others: they may be left of a source that has gone, or be of
    // one that was quick.
    let newest = kept.into_iter().rev();
    let mut all: Vec<_> = newest.map(|each| (has_gone(&each.stream), each)).collect();
    all.sort_by_key(|(gone, _)| *gone);
    let mut chosen = BTreeMap::<u8, Arrival>::new();
    for (gone, arrival) in all {
        let number = arrival.hello.channel;
        let taken = chosen.contains_key(&number);
        if number < channels && !taken {
            chosen.insert(number, arrival);
        } else if gone {
            tracing::warn!("let go of connection {number} of multifd, whose source has gone");
        } else if channels == 0 {
            return Err(Error::MultifdUnasked);
        } else if taken {
            return bad(format!(
                "connection {number} of multifd came twice: let no other source come at the same time"
            ));
        } else {
            return bad(format!(
                "connection {number} of multifd came, and with --channels {channels} the last one is {}: name as many as \
                 the source's multifd-channels",
                channels - 1
            ));
        }
    }
    let mut machines = chosen.values().map(|each| each.hello.machine);
    let first = machines.next();
    if machines.any(|machine| Some(machine) != first) {
        return bad("connections of multifd came from two sources at the same time".into());
    }
    Ok(chosen.into_values().collect())
}

fn bad<T>(problem: String) -> Result<T> {
    Err(Error::QemuStream { problem })
}

fn hung_up(error: &Error) {
    tracing::warn!(%error, "hung up on a connection");
}

/// Tells a Gleaner what this end is.
fn refuse(stream: &Stream) -> Result<()> {
    let reason = "this destination reads QEMU's stream: add --format qemu, or leave it out there";
    stream.set_timeouts(Some(TICK), Some(TICK))?;
    let mut outlet = Outlet::new(stream.try_clone()?);
    let refused = Message::Refused(reason.into());
    outlet.send(&refused, &Payload::None, &within("refusing", TICK))?;
    stream.linger(2 * TICK);
    Ok(())
}

/// Whether the other end has hung up, whatever it has said before.
fn has_gone(stream: &Stream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&now)).is_ok() && !fds[0].revents().is_empty()
}

/// What a connection says that it is, without waiting. A hello is taken out of the stream, the begin of a main connection
/// can be read again.
fn said(stream: &Stream) -> Result<Said> {
    let mut bytes = [0; HELLO_LEN];
    let come = RecvFlags::DONTWAIT;
    let got = match rustix::net::recv(stream, &mut bytes[..], come | RecvFlags::PEEK) {
        Ok((_, 0)) => {
            return Err(Error::Closed {
                during: "awaiting a greeting",
            });
        }
        Ok((_, got)) => got,
        Err(Errno::AGAIN | Errno::INTR) => 0,
        Err(cause) => return Err(Error::io("read a greeting", cause.into())),
    };
    let [a, b, c, d, ..] = bytes;
    let found = [a, b, c, d];
    match u32::from_be_bytes(found) {
        _ if got < found.len() => Ok(Said::Nothing),
        MAGIC => {
            stream.set_timeouts(Some(TICK), Some(TICK))?;
            Ok(Said::Main)
        }
        packet::MAGIC if got < HELLO_LEN => Ok(Said::Nothing),
        packet::MAGIC => {
            stream.set_timeouts(Some(TICK), Some(TICK))?;
            // All of it is there.
            rustix::net::recv(stream, &mut bytes[..], come)
                .map_err(|cause| Error::io("read a greeting", cause.into()))?;
            Hello::parse(&bytes).map(Said::Multifd)
        }
        _ => {
            if found == wire::MAGIC {
                // Best effort: he has gone, or is told.
                let _ = refuse(stream);
            }
            Err(Error::NotQemuStream { found })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Address;
    use crate::qemu::packet::hello;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    /// What is seen of connections that say these things.
    fn seen(all: &[&[u8]], see: impl FnOnce(&mut Arrivals<'_>, &CancelToken, Vec<UnixStream>)) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("in");
        let listener = Listener::bind(&Address::Unix(path.clone())).unwrap();
        let cancel = CancelToken::new();
        let streams = all.iter().map(|said| {
            let mut stream = UnixStream::connect(&path).unwrap();
            stream.write_all(said).unwrap();
            stream
        });
        let streams = streams.collect();
        see(&mut Arrivals::new(&listener, &cancel), &cancel, streams);
    }

    #[test]
    fn one_that_is_slow_to_say_what_it_is_keeps_no_other_out() {
        let others = hello(1);
        let slow = &hello(0)[..40];
        seen(
            &[&b"QE"[..], slow, &others, b"QEVM"],
            |arrivals, _, _all| {
                arrivals.main().unwrap();
                // It is here before the others have had their time.
                assert_eq!(arrivals.waiting.len(), 2);
                assert_eq!(arrivals.kept.len(), 1);
            },
        );
    }

    #[test]
    fn what_is_slow_to_come_is_heard_in_the_end() {
        seen(&[&hello(0)[..40]], |arrivals, _, mut all| {
            arrivals.step(Instant::now()).unwrap();
            all[0].write_all(&hello(0)[40..]).unwrap();
            let came = arrivals.multifd(1).unwrap();
            assert_eq!(came[0].hello.channel, 0);
        });
    }

    #[test]
    fn it_can_be_called_off_while_some_have_said_half() {
        seen(&[&hello(0)[..40]], |arrivals, cancel, _all| {
            std::thread::scope(|scope| {
                let waiting = scope.spawn(|| arrivals.multifd(1).err());
                cancel.cancel();
                assert!(matches!(waiting.join().unwrap(), Some(Error::Cancelled)));
            });
        });
    }

    #[test]
    fn who_says_anything_else_is_hung_up_on() {
        seen(&[b"GET / HTTP", b"QEVM"], |arrivals, _, mut all| {
            arrivals.main().unwrap();
            assert!(arrivals.waiting.is_empty());
            let mut rest = Vec::new();
            // The end, or the reset of what it said.
            let _ = std::io::Read::read_to_end(&mut all[0], &mut rest);
            assert!(rest.is_empty());
        });
    }
}
