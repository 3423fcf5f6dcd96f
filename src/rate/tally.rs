//! What was written to one block.

use gleaner_bitmap::{BlockInfo, PAGE_SIZE, PageRange};

use super::heat::Heat;
use super::{HotRegion, Stats};

/// Pages of a region whose writes are counted together: 256 KiB.
const REGION: u64 = 64;

#[derive(Debug)]
pub(super) struct Tally {
    info: BlockInfo,
    /// The look that has seen the last write of each page; 0 where none has.
    last: Vec<u32>,
    /// Pages written at least once.
    unique: u64,
    /// Pages written at least once in the window under way.
    in_window: u64,
    /// Bytes a second by window.
    rate: Stats,
    /// Writes that looks have seen, by region.
    regions: Vec<u64>,
    heat: Heat,
}

impl Tally {
    #[allow(clippy::cast_possible_truncation)] // 64-bit hosts only, as KVM's dirty ring
    pub(super) fn new(info: &BlockInfo) -> Self {
        Self {
            info: info.clone(),
            // Zeroed by the allocator: memory is taken where something is written, and nowhere else.
            last: vec![0; info.pages as usize],
            unique: 0,
            in_window: 0,
            rate: Stats::default(),
            regions: vec![0; info.pages.div_ceil(REGION) as usize],
            heat: Heat::new(info.pages),
        }
    }

    /// Pages `range` were written in look `look`, of a window that began after look `window`. Tells `before` of each page
    /// which look had seen its last write.
    #[allow(clippy::cast_possible_truncation)] // the range lies in the block
    pub(super) fn written(
        &mut self,
        range: PageRange,
        (look, window, column): (u32, u32, u32),
        mut before: impl FnMut(u32),
    ) {
        for page in range.first..range.end() {
            let last = std::mem::replace(&mut self.last[page as usize], look);
            self.unique += u64::from(last == 0);
            self.in_window += u64::from(last <= window);
            self.regions[(page / REGION) as usize] += 1;
            self.heat.written(column, page);
            before(last);
        }
    }

    /// The window of so many seconds is over; how many pages were written in it.
    pub(super) fn end_window(&mut self, seconds: f64) -> u64 {
        let pages = std::mem::take(&mut self.in_window);
        self.rate.add((pages * PAGE_SIZE) as f64 / seconds);
        pages
    }

    pub(super) const fn info(&self) -> &BlockInfo {
        &self.info
    }

    pub(super) const fn unique(&self) -> u64 {
        self.unique
    }

    pub(super) const fn in_window(&self) -> u64 {
        self.in_window
    }

    pub(super) const fn rate(&self) -> &Stats {
        &self.rate
    }

    pub(super) const fn heat(&self) -> &Heat {
        &self.heat
    }

    pub(super) fn halve_heat(&mut self) {
        self.heat.halve();
    }

    /// Its regions that were written: writes that looks have seen, and the first page.
    pub(super) fn hot(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let regions = self.regions.iter().zip(0..);
        let written = regions.filter(|(writes, _)| **writes > 0);
        written.map(|(writes, at)| (*writes, at * REGION))
    }

    /// The region of a page.
    #[allow(clippy::cast_possible_truncation)] // inside the block
    pub(super) fn region(&self, first_page: u64) -> HotRegion {
        let pages = REGION.min(self.info.pages - first_page);
        let last = &self.last[first_page as usize..(first_page + pages) as usize];
        HotRegion {
            block: self.info.name.clone(),
            first_page,
            pages,
            unique_pages: last.iter().filter(|look| **look > 0).count() as u64,
            pages_seen: self.regions[(first_page / REGION) as usize],
        }
    }
}
