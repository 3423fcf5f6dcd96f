//! A stock QEMU as the source: its memory, and the sections of its devices as they came.
//!
//! ```text
//! Arrivals -> Stream --Bytes--> MainStream --> Ram --> memory of the blocks
//!                                  | marks
//!                               Meeting
//!                                  | SYNCs
//!          -> Stream ---------> packets -----> Ram
//! ```
//!
//! No guest runs here: what comes is kept. It is whole, or it is an error: QEMU's stream has no checksums and no count of
//! its pages, so a page that never came is looked for in the end.

mod arrivals;
mod bytes;
mod device_state;
mod multifd;
mod ram;
mod stream;
mod xbzrle;

use std::cell::Cell;
use std::sync::OnceLock;
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde::Serialize;

use self::arrivals::Arrivals;
use self::bytes::Bytes;
use self::multifd::Meeting;
use self::ram::Ram;
use self::stream::{Around, MainStream, Read};
use super::record::SHUT;
use crate::patience::{LINGER, TICK};
use crate::report::Status;
use crate::threads::{self, Finally};
use crate::wire::{read_some, write};
use crate::{CancelToken, Error, Listener, NewMemory, Result, Stream};

/// How long connections may be behind the main one: it says nothing before all else has been said on the others.
const MEET: Duration = Duration::from_secs(60);

/// How long nothing must come behind what looks like the end, of a source that awaits an answer.
const QUIET: Duration = Duration::from_millis(500);

/// Where what comes from a QEMU is kept.
pub trait Images {
    /// Makes memory for a RAM block: writable, of exactly `pages` pages. Name and length are a peer's: the name may have
    /// any characters that are not control characters, a slash too, the length may be more than this host has.
    ///
    /// # Errors
    /// Why there is none, made with [`Error::destination`]; the migration ends.
    fn add_block(&mut self, name: &str, pages: u64) -> Result<NewMemory>;

    /// All memory has come. Keeps the sections of the devices with all that follows them in the stream.
    ///
    /// # Errors
    /// Why it can't be kept, made with [`Error::destination`]; the migration fails.
    fn complete(&mut self, device_state: &[u8]) -> Result<()>;
}

/// What came from a QEMU.
#[derive(Debug, Serialize)]
pub struct QemuReceived {
    /// How it ended.
    pub status: Status,
    /// Why, unless completed.
    pub reason: Option<String>,
    /// The error behind the reason.
    #[serde(skip)]
    pub error: Option<Error>,
    /// The source's machine.
    pub machine: String,
    /// RAM blocks.
    pub blocks: u64,
    /// Pages that came with their contents, those that came again included.
    pub pages: u64,
    /// Pages that came as zeros.
    pub zero_pages: u64,
    /// Pages of which what has changed came.
    pub delta_pages: u64,
    /// Sections of memory.
    pub sections: u64,
    /// Connections of multifd.
    pub channels: u64,
    /// Bytes of the sections of devices and of their description.
    pub device_state_bytes: u64,
    /// Bytes on all connections.
    pub bytes: u64,
    /// Time from the first byte to the end, in milliseconds.
    pub total_ms: f64,
}

impl QemuReceived {
    /// It ended before anything came.
    #[must_use]
    pub fn unbegun(error: Error) -> Self {
        report(
            Err(error),
            &Read::default(),
            None,
            &Meeting::default(),
            Duration::ZERO,
        )
    }
}

/// Receives the memory of a stock QEMU.
pub struct QemuReceiver<'a> {
    images: &'a mut dyn Images,
    cancel: CancelToken,
    channels: u8,
}

impl<'a> QemuReceiver<'a> {
    /// Prepares to receive into `images`, until `cancel` is used.
    ///
    /// A source has 5 s to begin. After that it may be silent for as long as it likes: QEMU is where its guest stops
    /// before the switchover, or its bandwidth is limited to next to nothing.
    #[must_use]
    pub fn new(images: &'a mut dyn Images, cancel: CancelToken) -> Self {
        Self {
            images,
            cancel,
            channels: 0,
        }
    }

    /// Expects `channels` connections of multifd, as many as the source's `multifd-channels`: no fewer are waited for, and
    /// no others taken. 0 unless told: a source that uses multifd is refused then.
    #[must_use]
    pub const fn channels(mut self, channels: u8) -> Self {
        self.channels = channels;
        self
    }

    /// Receives from the first connection that brings a stream of QEMU, and from those of multifd that join it.
    ///
    /// # Errors
    /// [`Error::Io`] of the listener, [`Error::Unable`] where multifd is expected of what is no socket that listens,
    /// [`Error::Cancelled`]: no migration has begun.
    pub fn listen(self, listener: &Listener) -> Result<QemuReceived> {
        if !listener.is_socket() {
            if self.channels > 0 {
                return Err(Error::Unable {
                    what: "take connections of multifd besides a file or a connected descriptor: leave out --channels",
                });
            }
            return Ok(self.run(listener.accept()?));
        }
        let cancel = self.cancel.clone();
        let mut arrivals = Arrivals::new(listener, &cancel);
        let stream = arrivals.main()?;
        Ok(self.receive(&stream, Some(arrivals)))
    }

    /// Receives from `stream` alone, without multifd; it is closed afterwards. Errors are in the report.
    #[must_use]
    pub fn run(self, stream: Stream) -> QemuReceived {
        // One that can't be told to look up now and then can't be read either.
        let _ = stream.set_timeouts(Some(TICK), Some(TICK));
        self.receive(&stream, None)
    }

    fn receive(self, stream: &Stream, arrivals: Option<Arrivals<'_>>) -> QemuReceived {
        let mut read = Read::default();
        let ram = OnceLock::new();
        let meeting = Meeting::default();
        let begun = Instant::now();
        let ended = thread::scope(|scope| {
            let beside = Beside {
                stream,
                arrivals,
                channels: self.channels,
                scope,
                meeting: &meeting,
                ram: &ram,
                cancel: &self.cancel,
            };
            let bytes = Bytes::new(|buffer: &mut [u8]| {
                read_some(stream, buffer, "reading QEMU's stream", &|_| {
                    meeting.check()?;
                    check(&self.cancel)
                })
            });
            let whole = Cell::new(false);
            // Whoever waits for the next mark is let go of, though the images panic.
            let _end = Finally(|| meeting.end(whole.get()));
            let ended = MainStream::new(bytes, beside, self.images, &ram, &mut read).run();
            whole.set(ended.is_ok());
            ended
        });
        // A file has no other end that could have gone.
        let ended = ended.map_err(|error| match error {
            Error::Closed { during } if stream.is_file() => Error::Truncated { during },
            error => error,
        });
        // Connections that failed because of another one have a lesser reason than the first.
        let ended = ended
            .map_err(|error| meeting.check().err().unwrap_or(error))
            .and_then(|()| meeting.check())
            .and_then(|()| ram.get().map_or(Ok(()), Ram::check_all_came))
            .and_then(|()| self.images.complete(&read.device_state));
        if read.answers && !stream.is_file() {
            // Best effort: a source that has gone is told nothing.
            let _ = answer(stream, SHUT, u32::from(ended.is_err()));
        }
        stream.linger(LINGER);
        report(ended, &read, ram.get(), &meeting, begun.elapsed())
    }
}

fn report(
    ended: Result<()>,
    read: &Read,
    ram: Option<&Ram>,
    meeting: &Meeting,
    took: Duration,
) -> QemuReceived {
    let error = ended.err();
    let [pages, zero_pages, delta_pages] = ram.map(Ram::counts).unwrap_or_default();
    QemuReceived {
        status: match error {
            None => Status::Completed,
            Some(Error::Cancelled) => Status::Cancelled,
            Some(_) => Status::Failed,
        },
        reason: error.as_ref().map(ToString::to_string),
        error,
        machine: read.machine.clone(),
        blocks: ram.map(Ram::blocks).unwrap_or_default(),
        pages,
        zero_pages,
        delta_pages,
        sections: read.sections,
        channels: meeting.connections(),
        device_state_bytes: read.device_state.len() as u64,
        bytes: read.bytes + meeting.bytes(),
        total_ms: crate::sender::millis(took),
    }
}

/// What the main connection needs besides its own bytes.
struct Beside<'scope, 'env, 'a> {
    stream: &'a Stream,
    /// Until all have come.
    arrivals: Option<Arrivals<'a>>,
    channels: u8,
    scope: &'scope Scope<'scope, 'env>,
    meeting: &'scope Meeting,
    ram: &'scope OnceLock<Ram>,
    cancel: &'a CancelToken,
}

impl Around for Beside<'_, '_, '_> {
    fn meet(&mut self) -> Result<()> {
        let (scope, meeting) = (self.scope, self.meeting);
        // Not before there are blocks: a connection may be pages ahead.
        if let Some(ram) = self.ram.get()
            && let Some(mut arrivals) = self.arrivals.take()
        {
            for arrival in arrivals.multifd(self.channels)? {
                let number = meeting.join(arrival.hello.channel, arrival.stream.try_clone()?);
                threads::start(scope, move || meeting.carry(number, &arrival.stream, ram))?;
            }
        }
        meeting.main(self.cancel, MEET)
    }

    fn more_comes(&mut self) -> Result<bool> {
        let end = Instant::now() + QUIET;
        while Instant::now() < end {
            check(self.cancel)?;
            if is_readable(self.stream, TICK)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn answer(&mut self, kind: u16, value: u32) -> Result<()> {
        if self.stream.is_file() {
            return Ok(());
        }
        answer(self.stream, kind, value)
    }
}

/// Waits until there are bytes, or the end of the stream, for `limit` at most, less than a second.
fn is_readable(stream: &Stream, limit: Duration) -> Result<bool> {
    let mut fds = [PollFd::new(stream, PollFlags::IN)];
    let limit = Timespec {
        tv_sec: 0,
        tv_nsec: limit.subsec_nanos().into(),
    };
    match poll(&mut fds, Some(&limit)) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::INTR) => Ok(false),
        Err(cause) => Err(Error::io("await the end of the stream", cause.into())),
    }
}

/// Says something on the return path.
fn answer(stream: &Stream, kind: u16, value: u32) -> Result<()> {
    let mut bytes = [0; 8];
    bytes[..2].copy_from_slice(&kind.to_be_bytes());
    bytes[2..4].copy_from_slice(&4u16.to_be_bytes());
    bytes[4..].copy_from_slice(&value.to_be_bytes());
    write(
        stream,
        &bytes,
        false,
        &crate::patience::silent_after("answering the source", LINGER),
    )
}

fn check(cancel: &CancelToken) -> Result<()> {
    if cancel.is_cancelled() {
        return Err(Error::Cancelled);
    }
    Ok(())
}
