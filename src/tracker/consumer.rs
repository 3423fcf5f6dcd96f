//! Consumers of a tracker: dirty pages with their memory.

use std::sync::Arc;

use gleaner_bitmap::{Extent, Generation, Lease};

use super::Shared;
use crate::{Block, Result};

/// An independent reader of a tracker's dirty pages. Dropping it ends it; with the last one logging is switched off, which
/// takes KVM tens of milliseconds on large guests.
pub struct Consumer {
    shared: Arc<Shared>,
    /// Taken only when it is dropped.
    inner: Option<gleaner_bitmap::Consumer>,
}

impl std::fmt::Debug for Consumer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.inner.fmt(f)
    }
}

/// Pages on lease, with the memory they are in. They have been armed again, so their contents may be read.
///
/// A dropped lease falls back: its pages are dirty again.
#[derive(Debug)]
#[must_use = "a dropped lease makes its pages dirty again"]
pub struct Leased {
    lease: Lease,
    generation: Generation,
    parts: Vec<(Extent, Block)>,
}

impl Leased {
    /// The layout under which the pages were leased: every block named here is part of it.
    #[must_use]
    pub const fn generation(&self) -> Generation {
        self.generation
    }

    /// The pages and their blocks.
    #[must_use]
    pub fn parts(&self) -> &[(Extent, Block)] {
        &self.parts
    }

    /// Number of pages.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.lease.pages()
    }

    /// The destination has applied the pages.
    pub fn ack(self) {
        self.lease.ack();
    }
}

impl Consumer {
    pub(super) fn new(shared: Arc<Shared>, inner: gleaner_bitmap::Consumer) -> Self {
        Self {
            shared,
            inner: Some(inner),
        }
    }

    /// Dirty pages that are not on lease.
    #[must_use]
    pub fn dirty_pages(&self) -> u64 {
        self.inner
            .as_ref()
            .map_or(0, gleaner_bitmap::Consumer::dirty_pages)
    }

    /// Takes up to `max` dirty pages on lease; `None` when no page is free. See [`gleaner_bitmap::Consumer::lease`].
    ///
    /// # Errors
    /// [`Error::Kvm`](crate::Error::Kvm) when memory can't be armed that no lease had before: no page is on lease by this call
    /// then.
    pub fn lease(&self, max: u64) -> Result<Option<Leased>> {
        // Under the lock, so that the pages, the blocks and the generation belong together.
        let mut state = self.shared.lock();
        let lease = self.inner.as_ref().and_then(|inner| inner.lease(max));
        let Some(lease) = lease else {
            return Ok(None);
        };
        self.shared.arm(&mut state, lease.extents())?;
        let parts = lease
            .extents()
            .iter()
            .filter_map(|e| Some((*e, state.blocks.get(&e.block)?.clone())))
            .collect();
        Ok(Some(Leased {
            lease,
            generation: state.layout.generation(),
            parts,
        }))
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        drop(self.inner.take());
        let mut state = self.shared.lock();
        if state.logging && self.shared.store.consumers() == 0 {
            self.shared.stop_logging(&mut state);
        }
    }
}
