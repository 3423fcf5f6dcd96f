//! The destination's end of a migration, without I/O: frames go in, answers come out.
//!
//! ```text
//!            Hello           Layout, Pages, Packed, Zeros, Digests, Sync (a row of them)
//! Greeting --------> Receiving --+
//!    |                 |    ^    |
//!    | Query           |    +----+
//!    v                 | State: all memory is here, ready() builds the guest
//!  Outcome, end        v
//!                    Built --READY-->  ... GO --> run() --RUNNING--> Running --Heard, or nothing--> completed
//!                      |                            |
//!     any error, Cancel, silence, end of stream     | error: no vCPU has run
//!                      v                            v
//!                   abort(), Refused{reason}, failed or cancelled
//! ```
//!
//! Where the source hands its memory over, Layout and Memory come in the place of pages.
//!
//! The outcome is recorded before it is said: a source that has lost the connection reads it by a
//! [`query`](crate::query).
//!
//! Pages may come over further connections at the same time; the driver opens them and hands their frames to
//! the `Landing` that they share with this one.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use gleaner_bitmap::PAGE_SIZE;
use vm_memory::VolatileSlice;

use crate::handed::Handed;
use crate::landing::Landing;
use crate::pack::Unpacker;
use crate::report::Received;
use crate::sender::DESCRIPTORS;
use crate::wire::{Header, Hello, Kind, Message, StateBody, VERSION};
use crate::{Destination, Error, MigrationId, Outcome, ReceiverOptions, Result};

/// The source, as a [`Reception`] hears and answers it.
pub trait Peer {
    /// Fills `pieces` with the payload of the frame that is being taken, which is exactly as long.
    ///
    /// # Errors
    /// Why it didn't come; some of the pieces may have been written to.
    fn pages(&mut self, pieces: &[VolatileSlice<'_>]) -> Result<()>;

    /// The payload of the frame that is being taken, `length` bytes. They have not come yet: memory should grow with
    /// what does.
    ///
    /// # Errors
    /// Why it didn't come.
    fn bytes(&mut self, length: u32) -> Result<Vec<u8>>;

    /// Whether a descriptor can come along with a frame. Unless overridden, none can.
    fn takes_descriptors(&self) -> bool {
        false
    }

    /// The descriptor that came along with the frame that is being taken. Unless overridden, none does.
    fn descriptor(&mut self) -> Option<OwnedFd> {
        None
    }

    /// Says something to the source.
    ///
    /// # Errors
    /// Why it could not be said.
    fn answer(&mut self, message: &Message) -> Result<()>;

    /// Whether there is anybody to answer. With a file there is not.
    fn listens(&self) -> bool;
}

/// What may come next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Greeting,
    Receiving,
    TakingOver,
    Built,
    Running,
}

impl Phase {
    const fn name(self) -> &'static str {
        match self {
            Self::Greeting => "awaiting a migration",
            Self::Receiving => "receiving memory",
            Self::TakingOver => "taking memory over",
            Self::Built => "awaiting GO",
            Self::Running => "awaiting that the source has heard",
        }
    }

    const fn admits(self, kind: Kind) -> bool {
        match self {
            Self::Greeting => matches!(kind, Kind::Hello | Kind::Query),
            Self::Receiving => matches!(
                kind,
                Kind::Layout
                    | Kind::Pages
                    | Kind::Packed
                    | Kind::Zeros
                    | Kind::Digests
                    | Kind::Sync
                    | Kind::State
                    | Kind::Cancel
            ),
            Self::TakingOver => matches!(
                kind,
                Kind::Layout | Kind::Memory | Kind::Sync | Kind::State | Kind::Cancel
            ),
            Self::Built => matches!(kind, Kind::Go | Kind::Cancel),
            Self::Running => matches!(kind, Kind::Heard),
        }
    }
}

/// A migration that is being received. [`Receiver`](crate::Receiver) drives it from a stream, and
/// [`MemoryWire`](crate::MemoryWire) from a sender in the same thread:
///
/// ```text
/// frame ... frame (true, or an error, or no more frames come)  end
/// ```
pub struct Reception<'a> {
    destination: &'a mut dyn Destination,
    options: ReceiverOptions,
    start: Instant,
    report: Received,
    phase: Phase,
    landing: Arc<Landing>,
    unpacker: Unpacker,
    /// In the place of the landing, where memory is handed over.
    handed: Handed,
    /// Most connections that the driver can open.
    most_channels: u16,
    /// Set once the id is this session's to decide on.
    id: Option<MigrationId>,
}

impl<'a> Reception<'a> {
    /// Awaits a migration into `destination`. Of the options, waiting is the driver's.
    #[must_use]
    pub fn new(destination: &'a mut dyn Destination, options: ReceiverOptions) -> Self {
        Self {
            destination,
            start: options.clock.now(),
            options,
            report: Received::nothing(),
            phase: Phase::Greeting,
            landing: Arc::default(),
            unpacker: Unpacker::default(),
            handed: Handed::default(),
            most_channels: 1,
            id: None,
        }
    }

    /// The driver opens up to so many connections.
    pub(crate) fn up_to(mut self, channels: u16) -> Self {
        self.most_channels = channels;
        self
    }

    /// Where the frames of further connections land.
    pub(crate) fn landing(&self) -> Arc<Landing> {
        Arc::clone(&self.landing)
    }

    /// The migration, once it has begun.
    pub(crate) const fn id(&self) -> Option<MigrationId> {
        self.id
    }

    /// Whether the guest runs here: nothing is an error any more.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.phase == Phase::Running
    }

    /// What this end is doing, for errors of waiting.
    #[must_use]
    pub const fn doing(&self) -> &'static str {
        self.phase.name()
    }

    /// Takes one frame, with its checksum and number checked; whether it was the last one. After an error there is
    /// only [`Reception::end`].
    ///
    /// # Errors
    /// Why the migration can't go on; [`Error::OnlyQuery`] for a question, which has been answered.
    pub fn frame(
        &mut self,
        header: &Header,
        message: Message,
        peer: &mut dyn Peer,
    ) -> Result<bool> {
        // Here too: a source that never pauses leaves no wait in which to look.
        if self.options.cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        if !self.phase.admits(header.kind) {
            return Err(Error::OutOfState {
                kind: header.kind.name(),
                phase: self.phase.name(),
            });
        }
        match message {
            Message::Hello(hello) => self.greet(hello, peer)?,
            Message::Query(id) => {
                let outcome = self.options.outcomes.get(id);
                answer(peer, &Message::Outcome(outcome))?;
                self.report.asked = Some(id);
                return Err(Error::OnlyQuery);
            }
            Message::Layout(layout) => {
                let adopted = match self.phase {
                    Phase::TakingOver => self.handed.change(layout, self.destination)?,
                    _ => self.landing.change(layout, self.destination)?,
                };
                self.report.layouts += 1;
                answer(peer, &Message::Adopted(adopted))?;
            }
            Message::Pages(_)
            | Message::Packed(_)
            | Message::Zeros(_)
            | Message::Digests(_)
            | Message::Sync => {
                self.landing
                    .frame(header, &message, peer, &mut self.unpacker)?;
            }
            Message::Memory(described) => {
                let descriptor = peer.descriptor();
                self.handed.take(described, descriptor, self.destination)?;
            }
            Message::State(described) => self.build(header, described, peer)?,
            Message::Go => {
                self.destination.run()?;
                // From here on nothing is an error: the guest runs, and whoever asks is told so.
                self.decided(Outcome::Running);
                self.phase = Phase::Running;
                if let Err(error) = answer(peer, &Message::Running) {
                    tracing::warn!(%error, "the source could not be told that the guest runs");
                    return Ok(true);
                }
                return Ok(!peer.listens());
            }
            Message::Heard => {
                self.report.may_be_asked = false;
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

    fn greet(&mut self, hello: Hello, peer: &mut dyn Peer) -> Result<()> {
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
        let most = if hello.local { 1 } else { self.most_channels };
        if !(1..=most).contains(&hello.channels) {
            return Err(Error::Channels {
                asked: hello.channels,
                to: "this destination".into(),
                most,
            });
        }
        self.report.migration_id = Some(hello.id);
        self.report.source = hello.name;
        self.options.outcomes.begin(hello.id)?;
        self.id = Some(hello.id);
        self.phase = Phase::Receiving;
        if hello.local {
            self.report.local = true;
            if !peer.takes_descriptors() {
                return Err(Error::NotLocal { why: DESCRIPTORS });
            }
            self.destination.begin_local()?;
            self.phase = Phase::TakingOver;
        }
        answer(peer, &Message::Welcome(VERSION))
    }

    fn build(&mut self, header: &Header, described: StateBody, peer: &mut dyn Peer) -> Result<()> {
        match self.phase {
            Phase::TakingOver => self.handed.close(described.generation)?,
            _ => self.landing.close(described.generation)?,
        }
        let state = peer.bytes(header.payload)?;
        if crc32fast::hash(&state) != described.crc {
            return Err(Error::Checksum { what: "state" });
        }
        self.destination.ready(state)?;
        self.phase = Phase::Built;
        self.report.may_be_asked = peer.listens();
        if let Some(id) = self.id {
            self.options.outcomes.may_be_asked(id);
        }
        answer(peer, &Message::Ready)
    }

    /// Ends it: with `Ok` after the last frame, with the error of a frame, or with what kept the next one from coming.
    /// Tells the source of a refusal, unless the error says that it has gone.
    #[must_use]
    pub fn end(mut self, ended: Result<()>, peer: &mut dyn Peer) -> Received {
        let (blocks, pages, zeros) = self.landing.counts();
        self.report.blocks = blocks + self.handed.blocks();
        self.report.pages = pages;
        self.report.zero_pages = zeros;
        if let Err(error) = ended
            && self.phase != Phase::Running
        {
            if !matches!(error, Error::OnlyQuery) {
                self.refuse(&error, peer);
            }
            self.report.fail(error);
        }
        self.report.total_ms = crate::sender::millis(self.options.clock.since(self.start));
        self.report
    }

    fn decided(&self, outcome: Outcome) {
        if let Some(id) = self.id {
            self.options.outcomes.set(id, outcome);
        }
    }

    /// Ends a migration whose guest doesn't run here.
    fn refuse(&mut self, error: &Error, peer: &mut dyn Peer) {
        self.destination.abort();
        self.decided(Outcome::Refused);
        tracing::info!(%error, "migration refused");
        if !matches!(error, Error::Closed { .. } | Error::CalledOff { .. }) {
            // Best effort: it may have gone, and asks again if it needs to know.
            let _ = answer(peer, &Message::Refused(error.to_string()));
        }
    }
}

/// Says something to the source, if anybody listens.
pub(crate) fn answer(peer: &mut dyn Peer, message: &Message) -> Result<()> {
    if peer.listens() {
        peer.answer(message)
    } else {
        Ok(())
    }
}
