//! The control page: what the VMM and a vCPU tell each other.

use std::fmt;
use std::sync::atomic::Ordering;

use gleaner_bitmap::PAGE_SIZE;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{Bytes, VolatileSlice};

use super::memory_map::MemoryMap;
use super::{GuestError, Result};

/// The words of a control page. Those up to `State` are read once, when the program starts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Word {
    /// Address of the table.
    Table = 0x00,
    /// Address of the data pages.
    Data = 0x08,
    /// Number of data pages.
    Pages = 0x10,
    /// Pages to pick from at random; 0 to sweep.
    Span = 0x18,
    /// Writes in a batch; 0 to idle.
    Batch = 0x20,
    /// Turns of an idle batch.
    IdleTurns = 0x28,
    /// Where the workload starts: page of the sweep, or seed.
    State = 0x30,
    /// [`CHECK`] when the VMM wants a check.
    Mailbox = 0x100,
    /// The count of writes at the end of the last batch.
    Count = 0x140,
}

impl Word {
    pub(super) const fn offset(self) -> usize {
        self as usize
    }
}

/// How many words are read once, from the start of the page on.
pub(super) const PARAMETERS: usize = Word::State.offset() / 8 + 1;

/// The mailbox's request for a check.
pub(super) const CHECK: u64 = 0x4b43;

/// What a vCPU's check of its pages found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CheckResult {
    /// Everything is as it must be.
    Ok,
    /// A data page does not hold its stamp: it was lost, or its page of the table was.
    Page {
        /// Which one, counted from the vCPU's first data page.
        index: u64,
    },
    /// The sum of the table is not the count in the registers: pages of both kinds were lost, or the registers.
    Sum,
    /// The count in the control page is not that in the registers.
    ControlPage,
    /// The count in `xmm0` is not that in the registers.
    Fpu,
}

impl CheckResult {
    /// Whether nothing was lost.
    #[must_use]
    pub const fn is_ok(self) -> bool {
        matches!(self, Self::Ok)
    }
}

impl fmt::Display for CheckResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ok => f.pad("intact"),
            Self::Page { index } => {
                write!(f, "data page {index} is lost, or its word of the table")
            }
            Self::Sum => f.pad("the table's sum differs from the count of writes"),
            Self::ControlPage => f.pad("the control page is lost"),
            Self::Fpu => f.pad("the FPU state is lost"),
        }
    }
}

/// The VMM's side of one vCPU's control page. What it writes is marked in the RAM's bitmap.
#[derive(Debug)]
pub struct Mailbox<'a, B> {
    page: VolatileSlice<'a, B>,
}

impl<'a, B: BitmapSlice> Mailbox<'a, B> {
    /// The mailbox of vCPU `index` in `ram`, the RAM block or its low region.
    ///
    /// # Errors
    /// [`GuestError::NoSuchVcpu`], [`GuestError::Memory`].
    pub fn new(ram: &VolatileSlice<'a, B>, map: &MemoryMap, index: usize) -> Result<Self> {
        let control = map.vcpu(index)?.control;
        let page = ram
            .offset(byte_offset(control, 0)?)?
            .subslice(0, byte_offset(1, 0)?)?;
        Ok(Self { page })
    }

    /// Asks for a check. The vCPU answers by [`GuestEvent::Check`](super::GuestEvent::Check): at once if it is at the
    /// end of a batch, else after this batch. Only one request is kept.
    ///
    /// # Errors
    /// [`GuestError::Memory`].
    pub fn request_check(&self) -> Result<()> {
        self.store(Word::Mailbox, CHECK)
    }

    /// Whether a request for a check was not taken yet.
    ///
    /// # Errors
    /// [`GuestError::Memory`].
    pub fn check_pending(&self) -> Result<bool> {
        Ok(self.load(Word::Mailbox)? == CHECK)
    }

    /// Writes so far, as of the end of the last batch.
    ///
    /// # Errors
    /// [`GuestError::Memory`].
    pub fn count(&self) -> Result<u64> {
        self.load(Word::Count)
    }

    pub(super) fn store(&self, word: Word, value: u64) -> Result<()> {
        Ok(self.page.store(value, word.offset(), Ordering::Release)?)
    }

    fn load(&self, word: Word) -> Result<u64> {
        Ok(self.page.load(word.offset(), Ordering::Acquire)?)
    }
}

/// Where byte `at` of a page is in the RAM block.
pub(super) fn byte_offset(page: u64, at: u64) -> Result<usize> {
    usize::try_from(page * PAGE_SIZE + at).map_err(|_| GuestError::RamSize {
        bytes: page * PAGE_SIZE,
    })
}
