//! What a sender migrates from.

use std::os::fd::OwnedFd;

use gleaner_bitmap::{BlockId, Extent, Generation, Layout, PageRange};
use vm_memory::VolatileSlice;

use crate::{Error, Memory, Result, Throttle, Throttles};

/// The running guest, as the sender sees it. The sender calls the methods from one thread, in this order:
///
/// ```text
/// layout, harvest, lease/ack ...  stop  state  harvest  lease/ack ...  memory ...  relinquish  complete
///        (any error) release ...  resume               |                               | refused
///        (any error) release ...  resume <-------------+-------------- resume <--------+
/// ```
///
/// [`Source::throttle`] comes anywhere before `stop`, as often as the sender likes. Full speed needs no call: the end of an
/// attempt brings it back, by `complete` or `resume`, by dropping the source, or by the death of an agent in another
/// process.
///
/// Where memory is handed over, [`Source::hand_over`] stands in the place of harvests and leases, of which there are none.
///
/// Errors are made with [`Error::source`]. After an error of any method before [`Source::relinquish`] the sender
/// releases its leases and calls [`Source::resume`].
pub trait Source: Send {
    /// The layout in force. Asked for whenever a harvest or a lease shows a generation that was not sent yet.
    ///
    /// # Errors
    /// Why it can't be told; nothing has changed.
    fn layout(&mut self) -> Result<Layout>;

    /// Harvests all dirty sources: afterwards everything dirtied before the call can be leased.
    ///
    /// # Errors
    /// Why it failed; no dirty page is lost.
    fn harvest(&mut self) -> Result<Harvested>;

    /// As [`Source::harvest`], while a round goes on and some of its pages are on lease: what was written before it is leased
    /// goes as it is then, and not once more in the next round. `None` of a source that would rather not. It is
    /// [`Source::harvest`] unless it is overridden.
    ///
    /// # Errors
    /// As [`Source::harvest`].
    fn harvest_early(&mut self) -> Result<Option<Harvested>> {
        self.harvest().map(Some)
    }

    /// Takes up to `max_pages` dirty pages on lease; `None` when none is free. A page of an unfinished lease is never
    /// in another one. A lease goes on where the last one ended, and from the end of memory to its start: else pages that
    /// are written all the time would go instead of those that wait.
    ///
    /// # Errors
    /// Why it failed; nothing was leased.
    fn lease(&mut self, max_pages: u64) -> Result<Option<PageLease>>;

    /// The pages of a lease have been applied at the destination.
    ///
    /// # Errors
    /// Why it failed; the lease is as it was.
    fn ack(&mut self, lease: LeaseId) -> Result<()>;

    /// The pages of a lease have not been applied: they become dirty again.
    ///
    /// # Errors
    /// Why it failed; the lease is as it was.
    fn release(&mut self, lease: LeaseId) -> Result<()>;

    /// What [`Source::throttle`] can do.
    ///
    /// # Errors
    /// Why it can't be told; nothing has changed.
    fn throttles(&mut self) -> Result<Throttles>;

    /// Slows the guest, instead of what slowed it before. It never delays [`Source::stop`], nor a slot transaction.
    ///
    /// # Errors
    /// Why not: it is more than [`Source::throttles`] says, or out of range. What slowed the guest before still does.
    fn throttle(&mut self, throttle: Throttle) -> Result<()>;

    /// Stops the guest: vCPUs parked, writers drained, devices paused. Nothing but [`Source::state`] writes guest
    /// memory afterwards.
    ///
    /// # Errors
    /// Why it failed; [`Source::resume`] is called next.
    fn stop(&mut self) -> Result<()>;

    /// State of devices and vCPUs, in a form that the destination understands. Called after [`Source::stop`]; it may
    /// dirty memory.
    ///
    /// # Errors
    /// Why it failed; the guest stays stopped.
    fn state(&mut self) -> Result<Vec<u8>>;

    /// All memory of a block of the layout, which nobody writes now. Called after [`Source::stop`] alone, and used before
    /// [`Source::relinquish`] or [`Source::resume`].
    ///
    /// # Errors
    /// [`Error::Unable`] of a source that shows leased pages only, which is what this does unless it is overridden; why
    /// it failed, because the guest is not stopped for one. The guest stays as it is.
    fn memory(&mut self, block: BlockId) -> Result<Memory> {
        let _ = block;
        Err(Error::Unable {
            what: "show memory that is not on lease",
        })
    }

    /// A writable descriptor of a block's memory, and where the block starts in it, for a destination on this host that
    /// goes on with this very memory. Called after [`Source::stop`] alone. From [`Source::relinquish`] on nothing at this
    /// end writes there, whatever becomes of its process; before GO nothing at the other end does, so that a source that
    /// resumes finds its memory as it left it.
    ///
    /// # Errors
    /// [`Error::Unable`] of a source whose memory can't be handed over, which is what this does unless it is overridden;
    /// why there is none. The guest stays stopped.
    fn hand_over(&mut self, block: BlockId) -> Result<(OwnedFd, u64)> {
        let _ = block;
        Err(Error::Unable {
            what: "hand its memory over",
        })
    }

    /// From here on the source runs again only on a proven refusal. Must be durable before it returns: the destination
    /// is told to run next.
    ///
    /// # Errors
    /// Why it failed. The destination was not told to run and never will be, so [`Source::resume`] is called next.
    fn relinquish(&mut self) -> Result<()>;

    /// The destination runs the guest: the source is done.
    ///
    /// # Errors
    /// Why it failed; the guest must stay stopped.
    fn complete(&mut self) -> Result<()>;

    /// The attempt has ended: the guest runs on here. Called before [`Source::relinquish`], stopped or not, or after a
    /// proven refusal.
    ///
    /// # Errors
    /// Why it failed; the migration is reported in doubt then, because the guest may run nowhere.
    fn resume(&mut self) -> Result<()>;

    /// Slot transactions since the migration began.
    ///
    /// # Errors
    /// Why it can't be told; nothing has changed.
    fn transactions(&mut self) -> Result<u64>;
}

/// What a harvest left to lease.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Harvested {
    /// The layout under which it took place.
    pub generation: Generation,
    /// Pages that can be leased now.
    pub dirty_pages: u64,
}

/// Names a lease, within one source.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LeaseId(pub u64);

/// Pages that are the sender's to send.
pub struct PageLease {
    /// Its name.
    pub id: LeaseId,
    /// The layout under which it was taken; every block of it is in that layout.
    pub generation: Generation,
    /// The pages, as extents that do not overlap.
    pub parts: Vec<LeasedPart>,
}

/// Leased pages of one block. Page contents can be read through it alone, because a lease is taken after the source
/// was re-armed for its pages.
pub struct LeasedPart {
    extent: Extent,
    memory: Memory,
}

impl LeasedPart {
    /// The pages `extent` of the block whose memory is `memory`.
    #[must_use]
    pub fn new(extent: Extent, memory: Memory) -> Self {
        Self { extent, memory }
    }

    /// Some of its pages, to be sent by themselves.
    pub(crate) fn share(&self, range: PageRange) -> Self {
        Self {
            extent: Extent {
                range,
                ..self.extent
            },
            memory: Memory::clone(&self.memory),
        }
    }

    /// The pages.
    #[must_use]
    pub const fn extent(&self) -> Extent {
        self.extent
    }

    /// Contents of all its pages.
    ///
    /// # Errors
    /// [`Error::Memory`] when the memory is shorter than the extent says.
    pub fn slice(&self) -> Result<VolatileSlice<'_>> {
        self.memory.slice(self.extent.range)
    }

    /// The first of these pages that may hold anything but zeros; see [`PageMemory::data`](crate::PageMemory::data).
    /// Of a few pages all may: they are sooner read than asked for.
    #[must_use]
    pub fn data(&self, range: PageRange) -> Option<PageRange> {
        const WORTH_ASKING: u64 = 8;
        if range.pages < WORTH_ASKING {
            return Some(range);
        }
        self.memory.data(range)
    }

    /// Contents of some of its pages, counted from the block's start.
    ///
    /// # Errors
    /// [`Error::OutsideBlock`] when they are not all leased; [`Error::Memory`] as [`LeasedPart::slice`].
    pub fn slice_of(&self, range: PageRange) -> Result<VolatileSlice<'_>> {
        if !self.extent.range.contains(&range) {
            return Err(Error::OutsideBlock {
                block: self.extent.block,
                range,
                pages: self.extent.range.pages,
            });
        }
        self.memory.slice(range)
    }
}
