//! The session of service and agent, without I/O.

use std::fs::File;
use std::os::fd::OwnedFd;

use gleaner_bitmap::BlockId;
use gleaner_migrate::{LeaseId, Source};
use rustix::fs::{Mode, OFlags};

use super::message::{LeaseMessage, Request, Response, VERSION};
use crate::{Error, LocalSource};

/// What a session migrates from: a [`Source`] that can hand over its blocks.
pub trait SessionSource: Source {
    /// A read-only descriptor of a block's memory and the block's offset in it.
    ///
    /// # Errors
    /// Why there is none.
    fn share(&self, block: BlockId) -> crate::Result<(OwnedFd, u64)>;
}

impl SessionSource for LocalSource {
    fn share(&self, block: BlockId) -> crate::Result<(OwnedFd, u64)> {
        let block = self
            .block(block)
            .ok_or(gleaner_bitmap::Error::UnknownBlock { block })?;
        let (file, offset) = block.shared_backing()?;
        Ok((read_only(file)?, offset))
    }
}

/// The same file, opened for reading: what is handed over can't be used to write guest memory.
fn read_only(file: &File) -> crate::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(|e| {
        Error::Memory {
            block: "shared".into(),
            source: e.into(),
        }
    })
}

/// Where an attempt is. The guest runs in `Idle` and `Migrating`; it may run elsewhere from `Committing` on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Idle,
    Migrating,
    Stopped,
    Committing,
    Complete,
}

/// An answer, with the descriptor that goes along.
#[derive(Debug)]
pub struct Reply {
    /// The answer.
    pub response: Response,
    /// A block's memory.
    pub fd: Option<OwnedFd>,
}

impl From<Response> for Reply {
    fn from(response: Response) -> Self {
        Self { response, fd: None }
    }
}

/// Somebody speaks another version.
pub(super) fn refused_version(who: &str, version: u32) -> Response {
    Response::Error(format!(
        "this service speaks version {VERSION}, the {who} version {version}: use the same gleaner for both"
    ))
}

/// All attempts on one guest, one agent after the other.
///
/// Invariants: the guest goes on whenever an agent is gone in `Migrating` or `Stopped`; from `Committing` on only
/// [`Request::Resume`], which stands for a proven refusal, lets it go on here.
///
/// # Stale agents
///
/// The fence is the connection: whoever serves a session hears one connection from its first request until
/// [`Session::hang_up`], no other one meanwhile, and nothing of it afterwards (the service's socket holds the session's
/// lock for as long as a connection lasts). So no request of an agent that was replaced gets here, and requests need no
/// epoch. One thing is left to such an agent: to say GO, if it had heard that the guest is let go of. It does no harm.
/// The guest goes on here only after the destination has refused, which is final, and a destination that has refused
/// reads no GO.
pub struct Session<S, F> {
    begin: F,
    source: Option<S>,
    phase: Phase,
    migration: [u8; 16],
    /// An agent has said hello.
    attached: bool,
}

impl<S, F> std::fmt::Debug for Session<S, F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("phase", &self.phase)
            .field("attached", &self.attached)
            .finish_non_exhaustive()
    }
}

impl<S: SessionSource, F: FnMut() -> crate::Result<S>> Session<S, F> {
    /// A session whose attempts begin with `begin`.
    #[must_use]
    pub const fn new(begin: F) -> Self {
        Self {
            begin,
            source: None,
            phase: Phase::Idle,
            migration: [0; 16],
            attached: false,
        }
    }

    /// Answers a request.
    pub fn handle(&mut self, request: Request) -> Reply {
        let refused = |what: &str| Reply::from(Response::Error(what.into()));
        match (&request, self.attached) {
            (Request::Hello { version, migration }, false) => {
                return self.hello(*version, *migration);
            }
            (Request::Hello { .. }, true) => return refused("hello was said already"),
            (_, false) => return refused("say hello first"),
            (_, true) => {}
        }
        if !self.allows(&request) {
            return refused(&format!(
                "{request:?} is out of order: the migration is {:?}",
                self.phase
            ));
        }
        let answer = self.act(request);
        answer.unwrap_or_else(|error| Response::Error(error.to_string()).into())
    }

    /// The agent is gone.
    pub fn hang_up(&mut self) {
        self.attached = false;
        if let Phase::Migrating | Phase::Stopped = self.phase {
            // Leases fall back and the guest goes on, at full speed, as the source is dropped.
            self.source = None;
            self.phase = Phase::Idle;
        }
    }

    /// Whether the guest stands still for an agent that can still let it go on.
    #[must_use]
    pub const fn is_stopped(&self) -> bool {
        matches!(self.phase, Phase::Stopped)
    }

    fn hello(&mut self, version: u32, migration: [u8; 16]) -> Reply {
        if version != VERSION {
            return refused_version("agent", version).into();
        }
        match self.phase {
            Phase::Committing => {
                self.attached = true;
                Response::InDoubt {
                    migration: self.migration,
                }
                .into()
            }
            Phase::Complete => Response::Error("the guest has migrated away".into()).into(),
            Phase::Idle | Phase::Migrating | Phase::Stopped => match (self.begin)() {
                Ok(source) => {
                    self.source = Some(source);
                    self.phase = Phase::Migrating;
                    self.migration = migration;
                    self.attached = true;
                    Response::Welcome { version: VERSION }.into()
                }
                Err(error) => Response::Error(error.to_string()).into(),
            },
        }
    }

    fn allows(&self, request: &Request) -> bool {
        use Phase::{Committing, Idle, Migrating, Stopped};
        match request {
            Request::Hello { .. } | Request::Metered | Request::Look | Request::Rest => false,
            Request::Layout
            | Request::Block(_)
            | Request::Throttles
            | Request::Harvest
            | Request::Lease(_)
            | Request::Ack(_)
            | Request::Release(_) => matches!(self.phase, Migrating | Stopped),
            Request::Transactions => self.phase != Idle,
            Request::Throttle(_) | Request::Stop => self.phase == Migrating,
            Request::State | Request::HandOver(_) | Request::Relinquish => self.phase == Stopped,
            Request::Complete => self.phase == Committing,
            Request::Resume => !matches!(self.phase, Idle | Phase::Complete),
        }
    }

    fn act(&mut self, request: Request) -> gleaner_migrate::Result<Reply> {
        let Some(source) = &mut self.source else {
            return Ok(Response::Error("no migration is under way".into()).into());
        };
        let response = match request {
            Request::Hello { .. } => Response::Error("hello was said already".into()),
            Request::Metered | Request::Look | Request::Rest => {
                Response::Error("an agent is no meter".into())
            }
            Request::Layout => {
                let layout = source.layout()?;
                Response::Layout {
                    generation: layout.generation(),
                    blocks: layout.blocks().cloned().collect(),
                    slots: layout.slots().copied().collect(),
                }
            }
            Request::Block(block) => {
                let (fd, offset) = source
                    .share(block)
                    .map_err(gleaner_migrate::Error::source)?;
                return Ok(Reply {
                    response: Response::Block { offset },
                    fd: Some(fd),
                });
            }
            Request::HandOver(block) => {
                let (fd, offset) = source.hand_over(block)?;
                return Ok(Reply {
                    response: Response::Block { offset },
                    fd: Some(fd),
                });
            }
            Request::Harvest => {
                let harvested = source.harvest()?;
                Response::Harvested {
                    generation: harvested.generation,
                    dirty_pages: harvested.dirty_pages,
                }
            }
            Request::Lease(max) => Response::Leased(source.lease(max)?.map(|lease| {
                LeaseMessage {
                    id: lease.id.0,
                    generation: lease.generation,
                    extents: lease
                        .parts
                        .iter()
                        .map(gleaner_migrate::LeasedPart::extent)
                        .collect(),
                }
            })),
            Request::Ack(id) => {
                source.ack(LeaseId(id))?;
                Response::Done
            }
            Request::Release(id) => {
                source.release(LeaseId(id))?;
                Response::Done
            }
            Request::Throttles => Response::Throttles(source.throttles()?),
            Request::Throttle(throttle) => {
                source.throttle(throttle)?;
                Response::Done
            }
            Request::Stop => {
                source.stop()?;
                self.phase = Phase::Stopped;
                Response::Done
            }
            Request::State => Response::State(source.state()?),
            Request::Relinquish => {
                source.relinquish()?;
                self.phase = Phase::Committing;
                Response::Done
            }
            Request::Complete => {
                source.complete()?;
                self.phase = Phase::Complete;
                Response::Done
            }
            Request::Resume => {
                source.resume()?;
                // The attempt is over: its consumer goes with it, and the next one starts all-dirty.
                self.source = None;
                self.phase = Phase::Idle;
                self.attached = false;
                Response::Done
            }
            Request::Transactions => Response::Number(source.transactions()?),
        };
        Ok(response.into())
    }
}
