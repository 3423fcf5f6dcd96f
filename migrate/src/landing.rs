//! Where pages land: what all connections of a migration share at the destination.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use gleaner_bitmap::{Generation, PAGE_SIZE};

use crate::blocks::Blocks;
use crate::pack::Unpacker;
use crate::reception::answer;
use crate::wire::{Adopted, Header, LayoutBody, Message};
use crate::{Destination, Error, Peer, Result, digest};

/// The blocks of a migration, while their pages come.
///
/// Invariant: pages are written under the read lock, and only while the landing is open. Whoever changes the layout or
/// closes the landing holds the write lock, so afterwards nothing is being written under what was before.
#[derive(Default)]
pub(crate) struct Landing {
    blocks: RwLock<(Door, Blocks)>,
    pages: AtomicU64,
    zeros: AtomicU64,
}

/// Whether pages may come.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
enum Door {
    #[default]
    Open,
    Closed,
}

impl Landing {
    fn read(&self) -> RwLockReadGuard<'_, (Door, Blocks)> {
        self.blocks.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, (Door, Blocks)> {
        self.blocks.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a frame that any connection may carry; `unpacker` is that connection's own.
    pub(crate) fn frame(
        &self,
        header: &Header,
        message: &Message,
        peer: &mut dyn Peer,
        unpacker: &mut Unpacker,
    ) -> Result<()> {
        let guard = self.read();
        let (door, blocks) = &*guard;
        if *door == Door::Closed {
            return Err(out_of_state(header, "no more memory was to come"));
        }
        match message {
            Message::Pages(extents) => {
                let pages = blocks.check(extents)?;
                check_payload(header, pages.saturating_mul(PAGE_SIZE))?;
                blocks.write(extents, |pieces| peer.pages(pieces))?;
                self.pages.fetch_add(pages, Ordering::Relaxed);
            }
            Message::Packed(packed) => {
                let pages = blocks.check(&packed.pages)?;
                if pages != packed.encodings.len() as u64 {
                    return Err(Error::Packed {
                        problem: "it has not one encoding for each of its pages",
                    });
                }
                unpacker.prepare(packed)?;
                let payload = peer.bytes(header.payload)?;
                blocks.unpack(packed, unpacker.contents(packed, &payload)?)?;
                self.pages.fetch_add(pages, Ordering::Relaxed);
            }
            Message::Zeros(extents) => {
                let pages = blocks.check(extents)?;
                blocks.zero(extents)?;
                self.zeros.fetch_add(pages, Ordering::Relaxed);
            }
            Message::Digests(extents) => {
                let pages = blocks.check(extents)?;
                check_payload(header, pages.saturating_mul(digest::BYTES))?;
                blocks.compare(extents, &peer.bytes(header.payload)?)?;
            }
            Message::Sync => {
                drop(guard);
                answer(peer, &Message::Applied(header.sequence))?;
            }
            _ => return Err(out_of_state(header, "only pages were to come")),
        }
        Ok(())
    }

    /// Goes over to a new layout.
    pub(crate) fn change(
        &self,
        body: LayoutBody,
        destination: &mut dyn Destination,
    ) -> Result<Adopted> {
        self.write().1.change(body, destination)
    }

    /// No more pages come: the state belongs to the layout of `generation`, which must be the one in force.
    pub(crate) fn close(&self, generation: Generation) -> Result<()> {
        let (door, blocks) = &mut *self.write();
        blocks.check_generation("the state of the guest", generation)?;
        *door = Door::Closed;
        Ok(())
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.read().0 == Door::Closed
    }

    /// Blocks, pages that came with contents, pages that came as zeros.
    pub(crate) fn counts(&self) -> (u64, u64, u64) {
        let blocks = self.read().1.len();
        let [pages, zeros] = [&self.pages, &self.zeros].map(|n| n.load(Ordering::Relaxed));
        (blocks, pages, zeros)
    }
}

fn out_of_state(header: &Header, phase: &'static str) -> Error {
    Error::OutOfState {
        kind: header.kind.name(),
        phase,
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
