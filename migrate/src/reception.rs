//! The destination's end of a migration, without I/O: frames go in, answers come out.
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

use std::time::Instant;

use gleaner_bitmap::PAGE_SIZE;
use vm_memory::VolatileSlice;

use crate::blocks::Blocks;
use crate::report::Received;
use crate::wire::{Header, Kind, Message, VERSION};
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
    blocks: Blocks,
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
            blocks: Blocks::default(),
            id: None,
        }
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
                answer(peer, &Message::Welcome(VERSION))?;
            }
            Message::Query(id) => {
                let outcome = self.options.outcomes.get(id);
                answer(peer, &Message::Outcome(outcome))?;
                return Err(Error::OnlyQuery);
            }
            Message::Layout(layout) => {
                self.blocks.change(layout, self.destination)?;
                self.report.layouts += 1;
            }
            Message::Pages(extents) => {
                let pages = self.blocks.check(&extents)?;
                check_payload(header, pages.saturating_mul(PAGE_SIZE))?;
                self.blocks.write(&extents, |pieces| peer.pages(pieces))?;
                self.report.pages += pages;
            }
            Message::Zeros(extents) => {
                self.report.zero_pages += self.blocks.check(&extents)?;
                self.blocks.zero(&extents)?;
            }
            Message::Sync => answer(peer, &Message::Applied(header.sequence))?,
            Message::State(described) => {
                self.blocks
                    .check_generation("the state of the guest", described.generation)?;
                let state = peer.bytes(header.payload)?;
                if crc32fast::hash(&state) != described.crc {
                    return Err(Error::Checksum { what: "state" });
                }
                self.destination.ready(state)?;
                self.phase = Phase::Built;
                self.report.may_be_asked = peer.listens();
                answer(peer, &Message::Ready)?;
            }
            Message::Go => {
                self.destination.run()?;
                // From here on nothing is an error: the guest runs, and whoever asks is told so.
                self.decided(Outcome::Running);
                match answer(peer, &Message::Running) {
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

    /// Ends it: with `Ok` after the last frame, with the error of a frame, or with what kept the next one from coming.
    /// Tells the source of a refusal, unless the error says that it has gone.
    #[must_use]
    pub fn end(mut self, ended: Result<()>, peer: &mut dyn Peer) -> Received {
        self.report.blocks = self.blocks.len();
        if let Err(error) = ended {
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
fn answer(peer: &mut dyn Peer, message: &Message) -> Result<()> {
    if peer.listens() {
        peer.answer(message)
    } else {
        Ok(())
    }
}

fn check_payload(header: &Header, described: u64) -> Result<()> {
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
