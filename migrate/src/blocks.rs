//! The blocks at the destination, and what may be written to them.

use std::collections::BTreeMap;

use gleaner_bitmap::{BlockId, BlockInfo, Extent, Generation, PageBitmap, PageRange};
use vm_memory::VolatileSlice;

use crate::memory::PAGE;
use crate::wire::{Extents, LayoutBody};
use crate::{Destination, Error, Memory, Result};

/// Pages of a chunk of [`Written`].
const CHUNK: u64 = 1 << 15;

/// Which pages contents were written to. In chunks that exist once something was written there, so that a peer can't
/// make this end allocate for pages it merely claims to have.
#[derive(Default)]
struct Written(BTreeMap<u64, PageBitmap>);

impl Written {
    fn set(&mut self, range: PageRange) {
        for (chunk, part) in chunks(range) {
            self.0
                .entry(chunk)
                .or_insert_with(|| PageBitmap::new(CHUNK))
                .set_range(part);
        }
    }

    /// Takes the runs of written pages out of a range.
    fn take(&mut self, range: PageRange) -> Vec<PageRange> {
        let mut runs = Vec::new();
        // Only chunks that exist: the range may be as long as a peer likes.
        let last = range.end().div_ceil(CHUNK);
        for (chunk, bits) in self.0.range_mut(range.first / CHUNK..last) {
            let start = chunk * CHUNK;
            if let Some(part) = range.intersect(&PageRange::new(start, CHUNK)) {
                let part = PageRange::new(part.first - start, part.pages);
                runs.extend(
                    bits.runs_in(part)
                        .map(|run| PageRange::new(start + run.first, run.pages)),
                );
                bits.clear_range(part);
            }
        }
        runs
    }
}

fn chunks(range: PageRange) -> impl Iterator<Item = (u64, PageRange)> {
    (range.first / CHUNK..range.end().div_ceil(CHUNK)).filter_map(move |chunk| {
        let start = chunk * CHUNK;
        range
            .intersect(&PageRange::new(start, CHUNK))
            .map(|part| (chunk, PageRange::new(part.first - start, part.pages)))
    })
}

struct Block {
    info: BlockInfo,
    memory: Memory,
    written: Written,
}

/// The blocks of the layout in force.
#[derive(Default)]
pub(crate) struct Blocks {
    generation: Option<Generation>,
    blocks: BTreeMap<BlockId, Block>,
}

impl Blocks {
    pub(crate) fn len(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// Goes over to a new layout.
    pub(crate) fn change(
        &mut self,
        body: LayoutBody,
        destination: &mut dyn Destination,
    ) -> Result<()> {
        let layout = body.check()?;
        if let Some(expected) = self.generation.filter(|now| layout.generation() <= *now) {
            return Err(Error::Stale {
                what: "a layout that is not newer",
                expected,
                found: layout.generation(),
            });
        }
        let mut added = Vec::new();
        for info in layout.blocks() {
            match self.blocks.get(&info.id) {
                None => added.push(info.clone()),
                Some(block) if block.info == *info => {}
                Some(block) => {
                    return Err(Error::BlockChanged {
                        block: info.id,
                        name: info.name.clone(),
                        expected: block.info.pages,
                        found: info.pages,
                    });
                }
            }
        }
        let gone = |info: &BlockInfo| layout.block(info.id).is_none();
        // A new block may bear the name of one that goes: two of one name can't be had at the same time.
        let taken = |info: &BlockInfo| gone(info) && layout.block_named(&info.name).is_some();
        self.remove(taken, destination)?;
        for info in added {
            let memory = destination.add_block(&info)?;
            if memory.pages() != info.pages {
                return Err(Error::Memory {
                    what: "of a block has another length",
                    detail: format!(
                        "block {} (\"{}\") of {} pages got {}",
                        info.id,
                        info.name,
                        info.pages,
                        memory.pages()
                    ),
                });
            }
            self.blocks.insert(
                info.id,
                Block {
                    info,
                    memory,
                    written: Written::default(),
                },
            );
        }
        self.generation = Some(layout.generation());
        destination.layout(&layout)?;
        self.remove(gone, destination)
    }

    fn remove(
        &mut self,
        which: impl Fn(&BlockInfo) -> bool,
        destination: &mut dyn Destination,
    ) -> Result<()> {
        let ids: Vec<_> = self
            .blocks
            .values()
            .filter(|block| which(&block.info))
            .map(|block| block.info.id)
            .collect();
        for id in ids {
            if let Some(block) = self.blocks.remove(&id) {
                drop(block.memory);
                destination.remove_block(&block.info)?;
            }
        }
        Ok(())
    }

    /// Checks that something belongs to the layout in force.
    pub(crate) fn check_generation(&self, what: &'static str, found: Generation) -> Result<()> {
        match self.generation {
            Some(expected) if expected == found => Ok(()),
            expected => Err(Error::Stale {
                what,
                expected: expected.unwrap_or_default(),
                found,
            }),
        }
    }

    fn block(&mut self, extent: &Extent) -> Result<&mut Block> {
        let block = self
            .blocks
            .get_mut(&extent.block)
            .ok_or(Error::UnknownBlock {
                block: extent.block,
            })?;
        let inside = extent
            .range
            .first
            .checked_add(extent.range.pages)
            .is_some_and(|end| end <= block.info.pages);
        if extent.range.pages == 0 || !inside {
            return Err(Error::OutsideBlock {
                block: extent.block,
                range: extent.range,
                pages: block.info.pages,
            });
        }
        Ok(block)
    }

    /// Checks extents, all of them, before anything is written; their pages in total.
    pub(crate) fn check(&mut self, extents: &Extents) -> Result<u64> {
        self.check_generation("a frame of pages", extents.generation)?;
        let mut pages = 0u64;
        for extent in &extents.extents {
            self.block(extent)?;
            pages = pages.saturating_add(extent.range.pages);
        }
        Ok(pages)
    }

    /// Lets `fill` write contents to pages that [`Blocks::check`] has passed.
    pub(crate) fn write(
        &mut self,
        extents: &Extents,
        fill: impl FnOnce(&[VolatileSlice<'_>]) -> Result<()>,
    ) -> Result<()> {
        for extent in &extents.extents {
            // Before the write: a fill that fails half way has written too.
            self.block(extent)?.written.set(extent.range);
        }
        let mut pieces = Vec::with_capacity(extents.extents.len());
        for extent in &extents.extents {
            if let Some(block) = self.blocks.get(&extent.block) {
                pieces.push(block.memory.slice(extent.range)?);
            }
        }
        fill(&pieces)
    }

    /// Writes zeros to pages that [`Blocks::check`] has passed, where there may be anything else: a block is zero when
    /// it is added, and writing zeros to it would allocate its memory.
    pub(crate) fn zero(&mut self, extents: &Extents) -> Result<()> {
        const ZEROS: [u8; PAGE] = [0; PAGE];
        for extent in &extents.extents {
            let block = self.block(extent)?;
            for run in block.written.take(extent.range) {
                for page in run.first..run.end() {
                    let page = PageRange::new(page, 1);
                    block.memory.slice(page)?.copy_from(&ZEROS);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_pages_are_taken_once_and_across_chunks() {
        let mut written = Written::default();
        written.set(PageRange::new(CHUNK - 2, 4));
        written.set(PageRange::new(5 * CHUNK, 1));
        let all = PageRange::new(1, u64::MAX - 1);
        let taken = written.take(PageRange::new(CHUNK - 1, 2));
        assert_eq!(
            taken,
            [PageRange::new(CHUNK - 1, 1), PageRange::new(CHUNK, 1)]
        );
        let rest: u64 = written.take(all).iter().map(|run| run.pages).sum();
        assert_eq!(rest, 3);
        assert!(written.take(all).is_empty());
    }
}
