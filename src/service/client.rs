//! The agent's end: a [`Source`] in another process.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use gleaner_bitmap::{BlockId, Layout};
use gleaner_migrate::{
    CancelToken, Error as MigrateError, Harvested, LeaseId, LeasedPart, MappedMemory, Memory,
    MigrationId, PageLease, Result, Source, Throttle, Throttles,
};

use super::exchange::{Exchange, SocketExchange};
use super::message::{Request, Response, VERSION};
use crate::Error;

/// An agent's end of its connection to a service. Dropped, the service hears that the agent is gone.
#[derive(Debug)]
pub struct ServiceClient<E = SocketExchange> {
    exchange: E,
    /// Blocks mapped so far, with their lengths.
    blocks: BTreeMap<BlockId, Arc<MappedMemory>>,
    lengths: BTreeMap<BlockId, u64>,
    /// The guest is stopped, and can be told to go on.
    stopped: bool,
    /// The service has been asked to let go of the guest.
    relinquished: bool,
}

/// How the service took the agent.
#[derive(Debug)]
pub enum Attach<E = SocketExchange> {
    /// A new attempt has begun.
    Ready(ServiceClient<E>),
    /// An earlier attempt is in doubt. Ask its destination, then `complete` or `resume`.
    InDoubt(ServiceClient<E>, MigrationId),
}

impl ServiceClient {
    /// Attaches to the service at `path` for the attempt `migration`.
    ///
    /// # Errors
    /// [`Error::Socket`] when nobody serves there; [`Error::Service`] with what the service says.
    pub fn attach(path: &Path, migration: MigrationId) -> crate::Result<Attach> {
        Self::attach_until(path, migration, &CancelToken::new())
    }

    /// As [`ServiceClient::attach`], for a migration that `cancel` calls off: from then on no answer of the service, now
    /// or later, is waited for longer than 1 s.
    ///
    /// # Errors
    /// As there.
    pub fn attach_until(
        path: &Path,
        migration: MigrationId,
        cancel: &CancelToken,
    ) -> crate::Result<Attach> {
        Self::attach_over(SocketExchange::connect(path, cancel)?, migration)
    }
}

impl<E: Exchange> ServiceClient<E> {
    /// Attaches over a connection that is open already.
    ///
    /// # Errors
    /// [`Error::Socket`] when no answer comes; [`Error::Service`] with what the service says.
    pub fn attach_over(exchange: E, migration: MigrationId) -> crate::Result<Attach<E>> {
        let mut client = Self {
            exchange,
            blocks: BTreeMap::new(),
            lengths: BTreeMap::new(),
            stopped: false,
            relinquished: false,
        };
        let hello = Request::Hello {
            version: VERSION,
            migration: migration.0,
        };
        match client.ask(&hello)? {
            (Response::Welcome { .. }, _) => Ok(Attach::Ready(client)),
            (Response::InDoubt { migration }, _) => {
                client.relinquished = true;
                Ok(Attach::InDoubt(client, MigrationId(migration)))
            }
            (other, _) => Err(unexpected(&other)),
        }
    }

    fn ask(&mut self, request: &Request) -> crate::Result<(Response, Option<File>)> {
        match self.exchange.ask(request)? {
            (Response::Error(reason), _) => Err(Error::Service { reason }),
            answer => Ok(answer),
        }
    }

    fn call(&mut self, request: &Request) -> Result<Response> {
        let (response, _) = self.ask(request).map_err(MigrateError::source)?;
        Ok(response)
    }

    fn done(&mut self, request: &Request) -> Result<()> {
        match self.call(request)? {
            Response::Done => Ok(()),
            other => Err(MigrateError::source(unexpected(&other))),
        }
    }

    /// A block's memory, mapped once.
    fn mapped(&mut self, block: BlockId) -> Result<Memory> {
        if let Some(memory) = self.blocks.get(&block) {
            return Ok(Arc::clone(memory) as Memory);
        }
        if !self.lengths.contains_key(&block) {
            self.layout()?;
        }
        let (response, file) = self
            .ask(&Request::Block(block))
            .map_err(MigrateError::source)?;
        let (Response::Block { offset }, Some(file)) = (&response, file) else {
            return Err(MigrateError::source(unexpected(&response)));
        };
        // A block that went between lease and layout has no length there; its descriptor has.
        let pages = match self.lengths.get(&block) {
            Some(pages) => *pages,
            None => {
                file.metadata()
                    .map_err(MigrateError::source)?
                    .len()
                    .saturating_sub(*offset)
                    / gleaner_bitmap::PAGE_SIZE
            }
        };
        let memory = Arc::new(MappedMemory::of_file_read_only(file, *offset, pages)?);
        self.blocks.insert(block, Arc::clone(&memory));
        Ok(memory)
    }
}

pub(super) fn unexpected(response: &Response) -> Error {
    Error::Service {
        reason: format!("an answer that does not fit: {response:?}")
            .chars()
            .take(200)
            .collect(),
    }
}

impl<E: Exchange> Source for ServiceClient<E> {
    fn layout(&mut self) -> Result<Layout> {
        match self.call(&Request::Layout)? {
            Response::Layout {
                generation,
                blocks,
                slots,
            } => {
                let layout =
                    Layout::from_parts(generation, blocks, slots).map_err(MigrateError::source)?;
                self.lengths = layout.blocks().map(|b| (b.id, b.pages)).collect();
                self.blocks.retain(|id, _| layout.block(*id).is_some());
                Ok(layout)
            }
            other => Err(MigrateError::source(unexpected(&other))),
        }
    }

    fn harvest(&mut self) -> Result<Harvested> {
        match self.call(&Request::Harvest)? {
            Response::Harvested {
                generation,
                dirty_pages,
            } => Ok(Harvested {
                generation,
                dirty_pages,
            }),
            other => Err(MigrateError::source(unexpected(&other))),
        }
    }

    fn lease(&mut self, max_pages: u64) -> Result<Option<PageLease>> {
        let lease = match self.call(&Request::Lease(max_pages))? {
            Response::Leased(None) => return Ok(None),
            Response::Leased(Some(lease)) => lease,
            other => return Err(MigrateError::source(unexpected(&other))),
        };
        let parts = lease
            .extents
            .iter()
            .map(|extent| Ok(LeasedPart::new(*extent, self.mapped(extent.block)?)))
            .collect::<Result<Vec<_>>>()?;
        Ok(Some(PageLease {
            id: LeaseId(lease.id),
            generation: lease.generation,
            parts,
        }))
    }

    fn ack(&mut self, lease: LeaseId) -> Result<()> {
        self.done(&Request::Ack(lease.0))
    }

    fn release(&mut self, lease: LeaseId) -> Result<()> {
        self.done(&Request::Release(lease.0))
    }

    fn throttles(&mut self) -> Result<Throttles> {
        match self.call(&Request::Throttles)? {
            Response::Throttles(throttles) => Ok(throttles),
            other => Err(MigrateError::source(unexpected(&other))),
        }
    }

    fn throttle(&mut self, throttle: Throttle) -> Result<()> {
        self.done(&Request::Throttle(throttle))
    }

    fn stop(&mut self) -> Result<()> {
        self.done(&Request::Stop)?;
        self.stopped = true;
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<u8>> {
        match self.call(&Request::State)? {
            Response::State(state) => Ok(state),
            other => Err(MigrateError::source(unexpected(&other))),
        }
    }

    fn memory(&mut self, block: BlockId) -> Result<Memory> {
        if !self.stopped {
            return Err(MigrateError::source(Error::NotStopped));
        }
        self.mapped(block)
    }

    fn hand_over(&mut self, block: BlockId) -> Result<(OwnedFd, u64)> {
        let (response, file) = self
            .ask(&Request::HandOver(block))
            .map_err(MigrateError::source)?;
        match (response, file) {
            (Response::Block { offset }, Some(file)) => Ok((file.into(), offset)),
            (other, _) => Err(MigrateError::source(unexpected(&other))),
        }
    }

    fn relinquish(&mut self) -> Result<()> {
        self.stopped = false;
        // Whether the answer comes or not: the service may have heard it.
        self.relinquished = true;
        self.done(&Request::Relinquish)
    }

    fn complete(&mut self) -> Result<()> {
        self.done(&Request::Complete)
    }

    fn resume(&mut self) -> Result<()> {
        self.stopped = false;
        let resumed = self.ask(&Request::Resume);
        if let Err(Error::Socket { source, .. }) = &resumed
            && !self.relinquished
        {
            // The service lets the guest go on when its agent hangs up, and one that is gone has no guest.
            tracing::warn!(%source, "the service can't be told that the attempt is over; hanging up says so too");
            return Ok(());
        }
        match resumed.map_err(MigrateError::source)? {
            (Response::Done, _) => Ok(()),
            (other, _) => Err(MigrateError::source(unexpected(&other))),
        }
    }

    fn transactions(&mut self) -> Result<u64> {
        match self.call(&Request::Transactions)? {
            Response::Number(n) => Ok(n),
            other => Err(MigrateError::source(unexpected(&other))),
        }
    }
}
