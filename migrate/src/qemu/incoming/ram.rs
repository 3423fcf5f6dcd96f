//! The RAM blocks that arrive, and their pages.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use gleaner_bitmap::{PAGE_SIZE, PageRange, pages_of};
use vm_memory::VolatileSlice;

use super::xbzrle;
use crate::memory::PAGE;
use crate::written::Written;
use crate::{Error, Images, Memory, NewMemory, Result};

/// Blocks that are taken at most: a machine has some dozens.
const MAX_BLOCKS: usize = 1024;

struct Block {
    name: String,
    pages: u64,
    memory: Memory,
    /// It held nothing but zeros when it was made.
    zero: bool,
    /// Pages that have come.
    came: Mutex<Written>,
}

impl Block {
    fn came(&self) -> MutexGuard<'_, Written> {
        self.came.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A page of a block.
#[derive(Clone, Copy)]
pub(super) struct Place {
    block: usize,
    page: u64,
}

/// The blocks, which several connections write to.
///
/// Invariant: a page is in `came` before anything is written to it.
#[derive(Default)]
pub(super) struct Ram {
    blocks: Vec<Block>,
    by_name: BTreeMap<String, usize>,
    contents: AtomicU64,
    zeros: AtomicU64,
    deltas: AtomicU64,
}

impl Ram {
    /// Adds a block of `bytes` bytes. Names and lengths are the peer's.
    pub(super) fn add(&mut self, name: &str, bytes: u64, images: &mut dyn Images) -> Result<()> {
        if self.blocks.len() == MAX_BLOCKS {
            return Err(Error::TooLong {
                what: "list of RAM blocks",
                length: self.blocks.len() as u64 + 1,
                cap: MAX_BLOCKS as u64,
            });
        }
        let pages = pages_of("length of a RAM block", bytes)?;
        if self.by_name.contains_key(name) {
            return Err(bad(format!("there are two RAM blocks named {name}")));
        }
        let NewMemory { memory, is_zero } = images.add_block(name, pages)?;
        if memory.pages() != pages {
            return Err(Error::Memory {
                what: "of a block has another length",
                detail: format!("block {name} of {pages} pages got {}", memory.pages()),
            });
        }
        self.by_name.insert(name.to_owned(), self.blocks.len());
        self.blocks.push(Block {
            name: name.to_owned(),
            pages,
            memory,
            zero: is_zero,
            came: Mutex::default(),
        });
        Ok(())
    }

    /// The number of a block.
    pub(super) fn block(&self, name: &str) -> Result<usize> {
        let found = self.by_name.get(name).copied();
        found.ok_or_else(|| {
            bad(format!(
                "pages of a RAM block {name:?} came, which there is not"
            ))
        })
    }

    /// The page at byte `offset` of a block.
    pub(super) fn place(&self, block: usize, offset: u64) -> Result<Place> {
        let Block { name, pages, .. } = &self.blocks[block];
        let page = offset / PAGE_SIZE;
        if offset.is_multiple_of(PAGE_SIZE) && page < *pages {
            return Ok(Place { block, page });
        }
        Err(bad(format!(
            "a page at byte {offset:#x} of RAM block {name} came, which has {:#x}",
            pages * PAGE_SIZE
        )))
    }

    /// Where the contents of a page are to be written.
    pub(super) fn contents(&self, place: Place) -> Result<VolatileSlice<'_>> {
        self.contents.fetch_add(1, Ordering::Relaxed);
        let block = &self.blocks[place.block];
        let range = PageRange::new(place.page, 1);
        block.came().set(range);
        block.memory.slice(range)
    }

    /// A page is zero.
    pub(super) fn zero(&self, place: Place) -> Result<()> {
        self.zeros.fetch_add(1, Ordering::Relaxed);
        let block = &self.blocks[place.block];
        let range = PageRange::new(place.page, 1);
        let mut came = block.came();
        // Writing zeros to memory that nobody has touched would allocate it.
        let is_so = block.zero && !came.contains(place.page);
        came.set(range);
        if !is_so {
            block.memory.slice(range)?.copy_from(&[0u8; PAGE]);
        }
        Ok(())
    }

    /// What has changed of a page.
    pub(super) fn delta(&self, place: Place, delta: &[u8]) -> Result<()> {
        self.deltas.fetch_add(1, Ordering::Relaxed);
        let block = &self.blocks[place.block];
        if !block.came().contains(place.page) {
            return Err(bad(format!(
                "what has changed of page {} of RAM block {} came, but the page itself has not",
                place.page, block.name
            )));
        }
        let memory = block.memory.slice(PageRange::new(place.page, 1))?;
        let mut page = [0; PAGE];
        memory.copy_to(&mut page);
        xbzrle::apply(delta, &mut page).map_err(|problem| bad(problem.into()))?;
        memory.copy_from(&page);
        Ok(())
    }

    /// Fails if there is a page that never came: QEMU sends each of them once at least.
    pub(super) fn check_all_came(&self) -> Result<()> {
        for block in &self.blocks {
            let came = block.came();
            if let Some(page) = (0..block.pages).find(|page| !came.contains(*page)) {
                return Err(Error::NeverCame {
                    block: block.name.clone(),
                    page,
                });
            }
        }
        Ok(())
    }

    pub(super) fn blocks(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// Pages that came with their contents, as zeros, as deltas.
    pub(super) fn counts(&self) -> [u64; 3] {
        [&self.contents, &self.zeros, &self.deltas].map(|count| count.load(Ordering::Relaxed))
    }
}

fn bad(problem: String) -> Error {
    Error::QemuStream { problem }
}
