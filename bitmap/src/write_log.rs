//! The VMM's own writes: no log of KVM's has them.

use std::fmt;
use std::sync::{Arc, OnceLock};

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use crate::atomic_bitmap::AtomicBitmap;
use crate::mutant::{self, Mutant};
use crate::{
    BlockId, Collected, DirtySource, Error, Layout, PAGE_SIZE, PageRange, Rearm, Result, Scope,
};

/// Records what the VMM itself writes into a RAM block, as the bitmap of its `vm-memory` region.
///
/// The log belongs to the block. A region is a window on it, so replacing a region drops nothing, and a clone shares
/// the bits.
///
/// Marks come *after* the write they speak of: who takes the bit sees the write. A mark outside its window is an error that
/// stays, and fails the next harvest.
#[derive(Clone)]
pub struct WriteLog {
    log: Arc<Log>,
    window: Window,
}

#[derive(Clone, Copy, Debug)]
struct Window {
    /// First byte, from the block's start.
    start: u64,
    /// Bytes.
    len: u64,
}

struct Log {
    block: BlockId,
    marks: AtomicBitmap,
    outside: OnceLock<(u64, u64)>,
}

impl Log {
    #[inline]
    fn mark(&self, window: Window, offset: u64, len: u64) {
        if let Some(range) = self.touched(window, offset, len) {
            self.marks.set_range(range);
        }
    }

    /// The block's pages that `len` bytes of a window touch.
    #[inline]
    fn touched(&self, window: Window, offset: u64, len: u64) -> Option<PageRange> {
        if len == 0 || mutant::is_planted(Mutant::WritesUnmarked) {
            return None;
        }
        if offset.checked_add(len).is_none_or(|end| end > window.len) {
            self.outside(offset, len);
            return None;
        }
        let first = (window.start + offset) / PAGE_SIZE;
        let last = (window.start + offset + len - 1) / PAGE_SIZE;
        Some(PageRange::new(first, last - first + 1))
    }

    /// The first one is kept; one is enough to fail every harvest.
    #[cold]
    fn outside(&self, offset: u64, len: u64) {
        if !mutant::is_planted(Mutant::OutsideIgnored) {
            let _ = self.outside.set((offset, len));
        }
    }

    fn dirty_at(&self, window: Window, offset: u64) -> bool {
        offset < window.len && self.marks.get((window.start + offset) / PAGE_SIZE)
    }
}

impl WriteLog {
    /// The log of a whole block.
    #[must_use]
    pub fn new(block: BlockId, pages: u64) -> Self {
        Self {
            log: Arc::new(Log {
                block,
                marks: AtomicBitmap::new(pages),
                outside: OnceLock::new(),
            }),
            window: Window {
                start: 0,
                len: pages * PAGE_SIZE,
            },
        }
    }

    /// The block it records.
    #[must_use]
    pub fn block(&self) -> BlockId {
        self.log.block
    }

    /// Bytes that its window covers.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.window.len
    }

    /// Whether its window is empty.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.window.len == 0
    }

    /// Drops all marks: whoever takes the block takes all of its pages anyway.
    pub fn forget(&self) {
        // Nothing refuses, so nothing fails.
        let _ = self.log.marks.take(|_, _| Ok(()));
    }

    /// A window on some pages of this window, for a region that maps only those.
    ///
    /// # Errors
    /// [`Error::OutsideBlock`] when the window is shorter.
    pub fn window(&self, range: PageRange) -> Result<Self> {
        let inside = PageRange::new(0, self.window.len / PAGE_SIZE);
        if !inside.contains(&range) {
            return Err(Error::OutsideBlock {
                block: self.log.block,
                pages: inside.pages,
                range,
            });
        }
        Ok(Self {
            log: Arc::clone(&self.log),
            window: Window {
                start: self.window.start + range.first * PAGE_SIZE,
                len: range.pages * PAGE_SIZE,
            },
        })
    }
}

#[cfg(loom)]
impl WriteLog {
    /// Plants a bug, for the loom test: marks only what is not marked yet.
    pub fn mark_dirty_load_first(&self, offset: u64, len: u64) {
        if let Some(range) = self.log.touched(self.window, offset, len) {
            self.log.marks.set_range_load_first(range);
        }
    }
}

impl fmt::Debug for WriteLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WriteLog")
            .field("block", &self.log.block)
            .field("window", &self.window)
            .finish_non_exhaustive()
    }
}

impl<'a> WithBitmapSlice<'a> for WriteLog {
    type S = WriteLogSlice<'a>;
}

impl Bitmap for WriteLog {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.log.mark(self.window, offset as u64, len as u64);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.log.dirty_at(self.window, offset as u64)
    }

    fn slice_at(&self, offset: usize) -> WriteLogSlice<'_> {
        WriteLogSlice {
            log: &self.log,
            window: self.window,
        }
        .slice_at(offset)
    }
}

/// A borrowed part of a [`WriteLog`], as `vm-memory` passes it around.
#[derive(Clone, Copy)]
pub struct WriteLogSlice<'a> {
    log: &'a Log,
    window: Window,
}

impl fmt::Debug for WriteLogSlice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("WriteLogSlice").field(&self.window).finish()
    }
}

impl<'a> WithBitmapSlice<'_> for WriteLogSlice<'a> {
    type S = WriteLogSlice<'a>;
}

impl BitmapSlice for WriteLogSlice<'_> {}

impl<'a> Bitmap for WriteLogSlice<'a> {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.log.mark(self.window, offset as u64, len as u64);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.log.dirty_at(self.window, offset as u64)
    }

    fn slice_at(&self, offset: usize) -> WriteLogSlice<'a> {
        let skip = (offset as u64).min(self.window.len);
        WriteLogSlice {
            log: self.log,
            window: Window {
                start: self.window.start + skip,
                len: self.window.len - skip,
            },
        }
    }
}

impl DirtySource for WriteLog {
    fn name(&self) -> String {
        format!("write log of block {}", self.log.block)
    }

    fn collect(&mut self, _layout: &Layout, _scope: Scope<'_>, into: &mut Collected) -> Result<()> {
        if let Some(&(offset, len)) = self.log.outside.get() {
            return Err(Error::MarkOutside {
                block: self.log.block,
                offset,
                len,
            });
        }
        self.log
            .marks
            .take(|range, bits| into.or_block(self.log.block, range, &[bits]))
    }

    /// Nothing to do: taking a bit is what arms it, and a later write marks it again.
    fn rearm(&mut self) -> Result<Rearm> {
        Ok(Rearm::Complete)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DirtyStore, Extent, Harvester, Start};

    fn harvest(log: &WriteLog) -> Result<Vec<Extent>> {
        let store = Arc::new(DirtyStore::default());
        let mut harvester = Harvester::default();
        store.add_block(log.block(), log.len() / PAGE_SIZE);
        harvester.add_block(log.block(), log.len() / PAGE_SIZE);
        let consumer = store.consumer(Start::Empty);
        let mut source = log.clone();
        let layout = Layout::empty(10);
        harvester.harvest(
            [&mut source as &mut dyn DirtySource],
            &layout,
            Scope::All,
            &store,
        )?;
        Ok(consumer
            .lease(u64::MAX)
            .map(|l| l.extents().to_vec())
            .unwrap_or_default())
    }

    #[test]
    fn a_mark_covers_every_page_it_touches_through_any_window() {
        let log = WriteLog::new(BlockId(7), 200);
        log.window(PageRange::new(60, 100))
            .unwrap()
            .mark_dirty(4095, 2);
        log.slice_at(4096 * 3 + 1).mark_dirty(4094, 2);
        log.mark_dirty(4096 * 199, 4096);
        log.mark_dirty(10, 0);
        let e = |p, n| Extent::new(BlockId(7), p, n);
        assert_eq!(harvest(&log).unwrap(), [e(3, 2), e(60, 2), e(199, 1)]);
        assert_eq!(harvest(&log).unwrap(), []);
    }

    #[test]
    fn a_mark_outside_its_window_fails_every_harvest() {
        let log = WriteLog::new(BlockId(7), 200);
        log.window(PageRange::new(0, 10))
            .unwrap()
            .mark_dirty(4096 * 10 - 1, 2);
        for _ in 0..2 {
            assert!(matches!(harvest(&log), Err(Error::MarkOutside { .. })));
        }
        assert!(log.window(PageRange::new(199, 2)).is_err());
    }

    #[test]
    fn marks_of_many_threads_are_all_harvested() {
        let log = WriteLog::new(BlockId(7), 640);
        std::thread::scope(|s| {
            for t in 0..4usize {
                let log = &log;
                s.spawn(move || {
                    (t..640)
                        .step_by(4)
                        .for_each(|p| log.mark_dirty(p * 4096, 1))
                });
            }
        });
        assert_eq!(harvest(&log).unwrap(), [Extent::new(BlockId(7), 0, 640)]);
    }
}
