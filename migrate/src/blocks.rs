//! The blocks at the destination, and what may be written to them.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use gleaner_bitmap::{BlockId, BlockInfo, Extent, Generation, PageRange};
use vm_memory::VolatileSlice;

use crate::memory::PAGE;
use crate::pack::delta;
use crate::wire::{Adopted, Encoding, Extents, LayoutBody, PackedBody};
use crate::written::Written;
use crate::{Destination, Error, Memory, NewMemory, Result, digest};

struct Block {
    info: BlockInfo,
    memory: Memory,
    /// The block held nothing but zeros when it was made.
    zero: bool,
    /// Where contents were written to since, and not zeros after that.
    written: Mutex<Written>,
}

impl Block {
    fn written(&self) -> MutexGuard<'_, Written> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pages of a range that may hold anything but zeros. They will be made zero.
    fn not_zero(&self, range: PageRange) -> Vec<PageRange> {
        let runs = self.written().take(range);
        if self.zero { runs } else { vec![range] }
    }
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
    ) -> Result<Adopted> {
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
        let mut zero = Vec::new();
        for info in added {
            let NewMemory { memory, is_zero } = destination.add_block(&info)?;
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
            if is_zero {
                zero.push(info.id);
            }
            self.blocks.insert(
                info.id,
                Block {
                    info,
                    memory,
                    zero: is_zero,
                    written: Mutex::default(),
                },
            );
        }
        self.generation = Some(layout.generation());
        destination.layout(&layout)?;
        self.remove(gone, destination)?;
        Ok(Adopted {
            generation: layout.generation(),
            zero,
        })
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

    fn block(&self, extent: &Extent) -> Result<&Block> {
        let block = self.blocks.get(&extent.block).ok_or(Error::UnknownBlock {
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
    pub(crate) fn check(&self, extents: &Extents) -> Result<u64> {
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
        &self,
        extents: &Extents,
        fill: impl FnOnce(&[VolatileSlice<'_>]) -> Result<()>,
    ) -> Result<()> {
        let mut pieces = Vec::with_capacity(extents.extents.len());
        for extent in &extents.extents {
            let block = self.block(extent)?;
            // Before the write: a fill that fails half way has written too.
            block.written().set(extent.range);
            pieces.push(block.memory.slice(extent.range)?);
        }
        fill(&pieces)
    }

    /// Compares pages that [`Blocks::check`] has passed with the digests of the source's.
    pub(crate) fn compare(&self, extents: &Extents, theirs: &[u8]) -> Result<()> {
        let mut theirs = theirs.as_chunks().0.iter();
        for extent in &extents.extents {
            let block = self.block(extent)?;
            digest::each(&*block.memory, extent.range, |page, digest| {
                if theirs.next() == Some(&digest) {
                    return Ok(());
                }
                Err(Error::Differs {
                    block: block.info.id,
                    name: block.info.name.clone(),
                    page,
                })
            })?;
        }
        Ok(())
    }

    /// Writes the contents that `packed` describes to pages that [`Blocks::check`] has passed, of which there is one for
    /// each of its encodings.
    pub(crate) fn unpack(&self, packed: &PackedBody, mut contents: &[u8]) -> Result<()> {
        let mut encodings = packed.encodings.iter();
        let mut page = [0; PAGE];
        for extent in &packed.pages.extents {
            let block = self.block(extent)?;
            for (number, encoding) in (extent.range.first..extent.range.end()).zip(&mut encodings) {
                let range = PageRange::new(number, 1);
                let memory = block.memory.slice(range)?;
                let (bytes, rest) = contents
                    .split_at_checked(encoding.bytes())
                    .unwrap_or_default();
                contents = rest;
                if *encoding == Encoding::Whole {
                    block.written().set(range);
                    memory.copy_from(bytes);
                    continue;
                }
                // Otherwise it would change what somebody else has left there.
                if !block.written().contains(number) {
                    return Err(Error::NoBase {
                        block: extent.block,
                        page: number,
                    });
                }
                memory.copy_to(&mut page);
                delta::apply(bytes, &mut page)?;
                memory.copy_from(&page);
            }
        }
        Ok(())
    }

    /// Writes zeros to pages that [`Blocks::check`] has passed, where there may be anything else: writing zeros to memory
    /// that nobody has touched would allocate it.
    pub(crate) fn zero(&self, extents: &Extents) -> Result<()> {
        const ZEROS: [u8; PAGE] = [0; PAGE];
        for extent in &extents.extents {
            let block = self.block(extent)?;
            for run in block.not_zero(extent.range) {
                for page in run.first..run.end() {
                    let page = PageRange::new(page, 1);
                    block.memory.slice(page)?.copy_from(&ZEROS);
                }
            }
        }
        Ok(())
    }
}
