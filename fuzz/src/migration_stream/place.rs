//! A destination with little memory, which holds the receiver to its word.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use gleaner_bitmap::{BlockId, BlockInfo, Layout, PageRange};
use gleaner_migrate::wire::{Encoding, Message};
use gleaner_migrate::{Destination, Error, MappedMemory, NewMemory, PageMemory, Result};

use super::{Frame, packed};

/// The calls that can fail.
pub const CALLS: [&str; 5] = ["add_block", "remove_block", "layout", "ready", "run"];

/// Pages that this host has, as hosts have fewer than a peer may ask for.
const PAGES: u64 = 64;
const PAGE: usize = 4096;

/// Where the guest goes.
#[derive(Debug, Default)]
pub struct Place {
    blocks: BTreeMap<BlockId, (BlockInfo, Arc<MappedMemory>)>,
    failing: Option<&'static str>,
    /// Memory is to be handed over, which no stream of bytes can.
    local: bool,
    ready: bool,
    /// The guest runs.
    pub running: bool,
    /// Everything was thrown away.
    pub aborted: bool,
}

impl Place {
    /// One of whose calls one may fail.
    #[must_use]
    pub fn failing(call: Option<&'static str>) -> Self {
        Self {
            failing: call,
            ..Self::default()
        }
    }

    fn call(&self, name: &str) -> Result<()> {
        assert!(!self.running && !self.aborted, "{name} after the end");
        assert!(!self.ready || name == "run", "{name} after ready");
        if self.failing == Some(name) {
            return Err(Error::destination(format!("no {name} here")));
        }
        Ok(())
    }

    /// Compares the memory with what the frames of a whole stream say.
    ///
    /// # Panics
    /// When they differ.
    pub fn compare(&self, frames: &[Frame<'_>]) {
        let mut contents: BTreeMap<(BlockId, u64), Vec<u8>> = BTreeMap::new();
        for frame in frames {
            match &frame.message {
                Message::Layout(layout) => {
                    let here: BTreeSet<_> = layout.blocks.iter().map(|block| block.id).collect();
                    contents.retain(|(block, _), _| here.contains(block));
                }
                Message::Pages(extents) => {
                    let pages = pages(&extents.extents);
                    contents.extend(pages.zip(frame.payload.chunks(PAGE).map(<[u8]>::to_vec)));
                }
                Message::Packed(packed) => {
                    let all = packed::expanded(packed, frame.payload);
                    let mut rest = &all[..];
                    for (page, encoding) in pages(&packed.pages.extents).zip(&packed.encodings) {
                        let (bytes, behind) = rest.split_at(encoding.bytes());
                        rest = behind;
                        if *encoding == Encoding::Whole {
                            contents.insert(page, bytes.to_vec());
                        } else {
                            let held = contents.get_mut(&page).expect("a page that came before");
                            packed::change(held, bytes);
                        }
                    }
                }
                Message::Zeros(extents) => pages(&extents.extents).for_each(|page| {
                    contents.remove(&page);
                }),
                Message::Go => break,
                _ => {}
            }
        }
        for (id, (info, memory)) in &self.blocks {
            for page in 0..info.pages {
                let mut found = [0u8; PAGE];
                let slice = memory.slice(PageRange::new(page, 1)).expect("its page");
                slice.copy_to(&mut found[..]);
                let expected = contents.get(&(*id, page));
                assert!(
                    found[..] == *expected.map_or(&[0; PAGE][..], Vec::as_slice),
                    "page {page} of {id} differs"
                );
            }
        }
    }
}

fn pages(extents: &[gleaner_bitmap::Extent]) -> impl Iterator<Item = (BlockId, u64)> {
    extents.iter().flat_map(|extent| {
        (extent.range.first..extent.range.end()).map(|page| (extent.block, page))
    })
}

impl Destination for Place {
    fn add_block(&mut self, block: &BlockInfo) -> Result<NewMemory> {
        self.call("add_block")?;
        block.check_name()?;
        let mut there = self.blocks.values();
        assert!(
            there.all(|(info, _)| info.name != block.name && info.id != block.id),
            "two blocks of one name or id"
        );
        let taken: u64 = self.blocks.values().map(|(info, _)| info.pages).sum();
        if block.pages > PAGES - taken {
            return Err(Error::destination("no such memory on this host"));
        }
        let memory = Arc::new(MappedMemory::anonymous(block.pages)?);
        let entry = (block.clone(), Arc::clone(&memory));
        self.blocks.insert(block.id, entry);
        Ok(NewMemory::zero(memory))
    }

    fn begin_local(&mut self) -> Result<()> {
        self.call("begin_local")?;
        self.local = true;
        Ok(())
    }

    fn remove_block(&mut self, block: &BlockInfo) -> Result<()> {
        self.call("remove_block")?;
        let (info, memory) = self.blocks.remove(&block.id).expect("a block that is here");
        assert_eq!(info, *block);
        assert_eq!(Arc::strong_count(&memory), 1, "the receiver still has it");
        Ok(())
    }

    fn layout(&mut self, layout: &Layout) -> Result<()> {
        self.call("layout")?;
        for block in layout.blocks().filter(|_| !self.local) {
            assert_eq!(
                self.blocks.get(&block.id).map(|(info, _)| info),
                Some(block)
            );
        }
        Ok(())
    }

    fn ready(&mut self, _state: Vec<u8>) -> Result<()> {
        self.call("ready")?;
        self.ready = true;
        Ok(())
    }

    fn run(&mut self) -> Result<()> {
        assert!(self.ready, "run before ready");
        self.call("run")?;
        self.running = true;
        Ok(())
    }

    fn abort(&mut self) {
        assert!(!self.running && !self.aborted, "abort after the end");
        self.aborted = true;
    }
}
