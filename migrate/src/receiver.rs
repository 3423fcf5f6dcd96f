//! The destination's end of a migration.
//!
//! ```text
//!            Hello           Layout, Pages, Zeros, Sync (a row of them)
//! Greeting --------> Receiving --+
//!    |                 |    ^    |
//!    | Query           |    +----+
//!    v                 | State: all memory is here, ready() builds the guest
//!  Outcome, end        v
//!                    Built --READY-->  ... GO --> run() --RUNNING--> completed
//!                      |                            |
//!     any error, Cancel, silence, end of stream     | error: no vCPU has run
//!                      v                            v
//!                   abort(), Refused{reason}, failed or cancelled
//! ```
//!
//! The outcome is recorded before it is said: a source that has lost the connection reads it by a
//! [`query`](crate::query).

use std::time::{Duration, Instant};

use gleaner_bitmap::PAGE_SIZE;

use crate::blocks::Blocks;
use crate::patience::{LINGER, TICK};
use crate::report::Received;
use crate::wire::{Header, Inlet, Kind, Message, Outlet, Payload, VERSION};
use crate::{
    CancelToken, Destination, Error, Listener, MigrationId, Outcome, Outcomes, Result, Stream,
};

/// What a receiver shall be like.
#[derive(Clone, Debug)]
pub struct ReceiverOptions {
    /// How long the source may be silent. 30 s.
    pub io_timeout: Duration,
    /// Calls it off.
    pub cancel: CancelToken,
    /// Where outcomes are remembered; share it with what answers later connections.
    pub outcomes: Outcomes,
}

impl Default for ReceiverOptions {
    fn default() -> Self {
        Self {
            io_timeout: Duration::from_secs(30),
            cancel: CancelToken::new(),
            outcomes: Outcomes::default(),
        }
    }
}

/// What may come next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Greeting,
    Receiving,
    Built,
}

impl Phase {
    const fn name(self) -> &'static str {
        match self {
            Self::Greeting => "awaiting a migration",
            Self::Receiving => "receiving memory",
            Self::Built => "awaiting GO",
        }
    }

    const fn admits(self, kind: Kind) -> bool {
        match self {
            Self::Greeting => matches!(kind, Kind::Hello | Kind::Query),
            Self::Receiving => matches!(
                kind,
                Kind::Layout | Kind::Pages | Kind::Zeros | Kind::Sync | Kind::State | Kind::Cancel
            ),
            Self::Built => matches!(kind, Kind::Go | Kind::Cancel),
        }
    }
}

/// Receives a migration.
pub struct Receiver<'a> {
    destination: &'a mut dyn Destination,
    options: ReceiverOptions,
}

impl<'a> Receiver<'a> {
    /// Prepares to receive into `destination`.
    #[must_use]
    pub fn new(destination: &'a mut dyn Destination, options: ReceiverOptions) -> Self {
        Self {
            destination,
            options,
        }
    }

    /// Receives from the first connection that brings a migration; answers those that ask for an outcome, and goes on
    /// listening after those that bring neither (a probe of the port, another release).
    ///
    /// # Errors
    /// [`Error::Io`] of the listener: no migration has begun.
    pub fn listen(self, listener: &Listener) -> Result<Received> {
        loop {
            let stream = match listener.accept_until(&self.options.cancel, None) {
                Ok(Some(stream)) => stream,
                Ok(None) => continue,
                Err(error @ Error::Cancelled) => {
                    let mut report = Received::nothing();
                    report.fail(error);
                    return Ok(report);
                }
                Err(error) => return Err(error),
            };
            let again = Receiver::new(&mut *self.destination, self.options.clone());
            let received = again.run(stream);
            match &received.error {
                Some(Error::Cancelled) => return Ok(received),
                Some(error) if received.migration_id.is_none() && listener.is_socket() => {
                    tracing::info!(%error, "a connection without a migration");
                }
                _ => return Ok(received),
            }
        }
    }

    /// Receives from `stream`, which is closed afterwards. Errors are in the report.
    #[must_use]
    pub fn run(self, stream: Stream) -> Received {
        let start = Instant::now();
        let mut report = Received::nothing();
        let ended = Session::open(self.destination, self.options, stream, &mut report)
            .and_then(Session::receive);
        if let Err(error) = ended {
            report.fail(error);
        }
        report.total_ms = crate::sender::millis(start.elapsed());
        report
    }
}

struct Session<'a> {
    destination: &'a mut dyn Destination,
    options: ReceiverOptions,
    report: &'a mut Received,
    inlet: Inlet,
    outlet: Outlet,
    phase: Phase,
    blocks: Blocks,
    /// Set once the id is this session's to decide on.
    id: Option<MigrationId>,
}

impl<'a> Session<'a> {
    fn open(
        destination: &'a mut dyn Destination,
        options: ReceiverOptions,
        stream: Stream,
        report: &'a mut Received,
    ) -> Result<Self> {
        stream.set_timeouts(Some(TICK), Some(TICK))?;
        Ok(Self {
            destination,
            options,
            report,
            inlet: Inlet::new(stream.try_clone()?),
            outlet: Outlet::new(stream),
            phase: Phase::Greeting,
            blocks: Blocks::default(),
            id: None,
        })
    }

    fn receive(mut self) -> Result<()> {
        let ended = self.frames();
        self.report.blocks = self.blocks.len();
        match &ended {
            Ok(()) | Err(Error::OnlyQuery) => {}
            Err(error) => self.refuse(error),
        }
        self.outlet.stream().linger(LINGER);
        ended
    }

    /// Frames, until the guest runs.
    fn frames(&mut self) -> Result<()> {
        loop {
            // Here too: a source that never pauses leaves no wait in which to look.
            if self.options.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let (header, message) = {
                let patience = patience(&self.options, self.phase.name());
                self.inlet.receive(self.phase.name(), &patience)?
            };
            if !self.phase.admits(header.kind) {
                return Err(Error::OutOfState {
                    kind: header.kind.name(),
                    phase: self.phase.name(),
                });
            }
            if self.frame(header, message)? {
                return Ok(());
            }
        }
    }

    /// Takes one frame; whether it was the last one.
    fn frame(&mut self, header: Header, message: Message) -> Result<bool> {
        match message {
            Message::Hello(hello) => {
                if hello.version != VERSION {
                    return Err(Error::Version {
                        found: hello.version,
                    });
                }
                if hello.page_size != PAGE_SIZE {
                    return Err(Error::PageSize {
                        found: hello.page_size,
                    });
                }
                self.report.migration_id = Some(hello.id);
                self.report.source = hello.name;
                self.options.outcomes.begin(hello.id)?;
                self.id = Some(hello.id);
                self.phase = Phase::Receiving;
                self.answer(&Message::Welcome(VERSION))?;
            }
            Message::Query(id) => {
                let outcome = self.options.outcomes.get(id);
                self.answer(&Message::Outcome(outcome))?;
                return Err(Error::OnlyQuery);
            }
            Message::Layout(layout) => {
                self.blocks.change(layout, self.destination)?;
                self.report.layouts += 1;
            }
            Message::Pages(extents) => {
                let pages = self.blocks.check(&extents)?;
                check_payload(header, pages.saturating_mul(PAGE_SIZE))?;
                let patience = patience(&self.options, "receiving pages");
                self.blocks
                    .write(&extents, |pieces| self.inlet.pages(pieces, &patience))?;
                self.report.pages += pages;
            }
            Message::Zeros(extents) => {
                self.report.zero_pages += self.blocks.check(&extents)?;
                self.blocks.zero(&extents)?;
            }
            Message::Sync => self.answer(&Message::Applied(header.sequence))?,
            Message::State(described) => {
                self.blocks
                    .check_generation("the state of the guest", described.generation)?;
                let state = {
                    let patience = patience(&self.options, "receiving the state");
                    self.inlet.bytes(header.payload, &patience)?
                };
                if crc32fast::hash(&state) != described.crc {
                    return Err(Error::Checksum { what: "state" });
                }
                self.destination.ready(state)?;
                self.phase = Phase::Built;
                self.report.may_be_asked = !self.outlet.stream().is_file();
                self.answer(&Message::Ready)?;
            }
            Message::Go => {
                self.destination.run()?;
                // From here on nothing is an error: the guest runs, and whoever asks is told so.
                self.decided(Outcome::Running);
                match self.answer(&Message::Running) {
                    Ok(()) => self.report.may_be_asked = false,
                    Err(error) => {
                        tracing::warn!(%error, "the source could not be told that the guest runs");
                    }
                }
                return Ok(true);
            }
            Message::Cancel(reason) => {
                // It has not let go of its guest.
                self.report.may_be_asked = false;
                return Err(Error::CalledOff { reason });
            }
            // The phase admits no other kind.
            other => return Err(crate::sender::unexpected(&other, self.phase.name())),
        }
        Ok(false)
    }

    /// Says something to the source; to a file there is nobody to say it to.
    fn answer(&mut self, message: &Message) -> Result<()> {
        if self.outlet.stream().is_file() {
            return Ok(());
        }
        let patience = patience(&self.options, "answering the source");
        self.outlet.send(message, &Payload::None, &patience)?;
        Ok(())
    }

    fn decided(&self, outcome: Outcome) {
        if let Some(id) = self.id {
            self.options.outcomes.set(id, outcome);
        }
    }

    /// Ends a migration whose guest doesn't run here.
    fn refuse(&mut self, error: &Error) {
        self.destination.abort();
        self.decided(Outcome::Refused);
        tracing::info!(%error, "migration refused");
        let gone = matches!(error, Error::Closed { .. } | Error::CalledOff { .. });
        if !gone && self.outlet.whole && !self.outlet.stream().is_file() {
            let patience = crate::patience::silent_after("refusing", LINGER);
            // Best effort: it may have gone, and asks again if it needs to know.
            let _ = self.outlet.send(
                &Message::Refused(error.to_string()),
                &Payload::None,
                &patience,
            );
        }
    }
}

fn patience<'o>(
    options: &'o ReceiverOptions,
    during: &'static str,
) -> impl Fn(Duration) -> Result<()> + use<'o> {
    move |after| {
        if options.cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        if after >= options.io_timeout {
            return Err(Error::Silent { during, after });
        }
        Ok(())
    }
}

fn check_payload(header: Header, described: u64) -> Result<()> {
    let carried = u64::from(header.payload);
    if described == carried {
        Ok(())
    } else {
        Err(Error::PayloadLength {
            kind: header.kind.name(),
            described,
            carried,
        })
    }
}
