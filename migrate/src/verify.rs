//! Before the guest may run at the destination: both ends compare all pages.
//!
//! ```text
//! source: stopped, all pages applied       destination
//!   digests of a chunk ---- Digests, Sync --> digests of its own, the first difference refuses
//!   digests of the next <------- Applied ----
//! ```
//!
//! Every connection takes the next chunk when it is free, and a few are under way on each: both ends work at the same
//! time, on as many cores as there are connections.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use gleaner_bitmap::{BlockInfo, Extent, Generation};

use crate::lane::{Lane, MAX_IN_FLIGHT};
use crate::sender::{Session, millis};
use crate::wire::{Extents, MAX_DIGESTS, Message, Payload};
use crate::{Channel, Memory, Result, digest};

/// Pages in a chunk.
const CHUNK: u64 = MAX_DIGESTS as u64;
/// Chunks after which the source is asked for something: a service takes an agent that is silent for long for dead.
const STRETCH: usize = 4096;

/// Pages that are digested and compared at one go.
struct Chunk {
    extent: Extent,
    memory: Memory,
}

/// All pages of a block.
fn chunks(block: &BlockInfo, memory: Memory) -> impl Iterator<Item = Chunk> + use<> {
    let (block, all) = (block.id, block.all());
    (0..all.pages.div_ceil(CHUNK)).map(move |n| {
        let first = n * CHUNK;
        let pages = CHUNK.min(all.pages - first);
        Chunk {
            extent: Extent::new(block, first, pages),
            memory: Memory::clone(&memory),
        }
    })
}

impl Session<'_> {
    /// Compares all pages of the layout that the destination has.
    pub(crate) fn compare_all(&mut self) -> Result<()> {
        let start = self.clock.now();
        let verified = AtomicU64::new(0);
        let compared = self.compare(&verified);
        self.report.verified_pages = verified.into_inner();
        self.report.verify_ms = millis(self.clock.since(start));
        compared
    }

    fn compare(&mut self, verified: &AtomicU64) -> Result<()> {
        let generation = self.supply.sent_generation();
        let layout = self.supply.sent();
        let mut all = Vec::new();
        for info in layout.iter().flat_map(|layout| layout.blocks()) {
            all.push(chunks(info, self.supply.source.memory(info.id)?));
        }
        let mut all = all.into_iter().flatten().peekable();
        while all.peek().is_some() {
            let stretch = Mutex::new(all.by_ref().take(STRETCH));
            let next = || lock(&stretch).next();
            self.lanes
                .at_once(|lane| lane.compare(generation, next, verified))?;
            self.supply.source.transactions()?;
        }
        Ok(())
    }
}

impl<C: Channel + ?Sized> Lane<C> {
    /// Lets the destination compare what `next` gives, until that is nothing.
    fn compare(
        &mut self,
        generation: Generation,
        next: impl Fn() -> Option<Chunk>,
        verified: &AtomicU64,
    ) -> Result<()> {
        let mut under_way = VecDeque::new();
        loop {
            let chunk = next();
            let most = chunk.as_ref().map_or(0, |_| MAX_IN_FLIGHT - 1);
            while under_way.len() > most
                && let Some((sync, pages)) = under_way.pop_front()
            {
                self.await_applied(sync)?;
                verified.fetch_add(pages, Ordering::Relaxed);
            }
            let Some(Chunk { extent, memory }) = chunk else {
                return Ok(());
            };
            let mut digests = Vec::new();
            digest::each(&*memory, extent.range, |_, digest| {
                digests.extend(digest);
                Ok(())
            })?;
            let message = Message::Digests(Extents {
                generation,
                extents: vec![extent],
            });
            self.link.send(&message, &Payload::Bytes(&digests))?;
            let sync = self.link.send(&Message::Sync, &Payload::None)?;
            under_way.push_back((sync, extent.range.pages));
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
