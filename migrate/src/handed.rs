//! The blocks of a migration whose memory is handed over, at the destination.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use gleaner_bitmap::{BlockId, BlockInfo, Generation, Layout, PAGE_SIZE};
use rustix::fs::{OFlags, SealFlags, fcntl_get_seals, fcntl_getfl};

use crate::holes::is_in_memory;
use crate::wire::{Adopted, LayoutBody, MemoryBody};
use crate::{Destination, Error, Result};

/// What was said, and what was handed over. Nobody here reads or writes a page.
#[derive(Default)]
pub(crate) struct Handed {
    layout: Option<Layout>,
    /// Blocks whose memory the destination has.
    taken: BTreeSet<BlockId>,
}

impl Handed {
    pub(crate) fn blocks(&self) -> u64 {
        self.layout.as_ref().map_or(0, |l| l.blocks().len() as u64)
    }

    /// Goes over to a new layout, whose blocks will be handed over.
    pub(crate) fn change(
        &mut self,
        body: LayoutBody,
        destination: &mut dyn Destination,
    ) -> Result<Adopted> {
        let layout = body.check()?;
        let found = layout.generation();
        if let Some(expected) = self.generation().filter(|now| found <= *now) {
            return Err(Error::Stale {
                what: "a layout that is not newer",
                expected,
                found,
            });
        }
        if !self.taken.is_empty() {
            return Err(Error::OutOfState {
                kind: "Layout",
                phase: "its memory was being handed over",
            });
        }
        destination.layout(&layout)?;
        self.layout = Some(layout);
        Ok(Adopted {
            generation: found,
            zero: Vec::new(),
        })
    }

    /// Takes over the memory of a block.
    pub(crate) fn take(
        &mut self,
        described: MemoryBody,
        descriptor: Option<OwnedFd>,
        destination: &mut dyn Destination,
    ) -> Result<()> {
        let MemoryBody {
            generation,
            block,
            offset,
        } = described;
        self.check_generation("the memory of a block", generation)?;
        let known = self.layout.as_ref().and_then(|layout| layout.block(block));
        let info = known.ok_or(Error::UnknownBlock { block })?;
        let refused = |why: &str| Error::NotShareable {
            name: info.name.clone(),
            why: why.into(),
        };
        if self.taken.contains(&block) {
            return Err(refused("it was handed over already"));
        }
        let file = File::from(descriptor.ok_or_else(|| refused("no descriptor came along"))?);
        check(info, &file, offset)?;
        destination.adopt_block(info, file, offset)?;
        self.taken.insert(block);
        Ok(())
    }

    /// Nothing more comes: the destination has the memory of every block of the layout of `generation`.
    pub(crate) fn close(&self, generation: Generation) -> Result<()> {
        self.check_generation("the state of the guest", generation)?;
        let blocks = self.layout.iter().flat_map(Layout::blocks);
        match blocks.into_iter().find(|b| !self.taken.contains(&b.id)) {
            Some(info) => Err(Error::NotShareable {
                name: info.name.clone(),
                why: "it was not handed over".into(),
            }),
            None => Ok(()),
        }
    }

    fn generation(&self) -> Option<Generation> {
        self.layout.as_ref().map(Layout::generation)
    }

    fn check_generation(&self, what: &'static str, found: Generation) -> Result<()> {
        match self.generation().unwrap_or_default() {
            expected if expected == found && self.layout.is_some() => Ok(()),
            expected => Err(Error::Stale {
                what,
                expected,
                found,
            }),
        }
    }
}

/// Whether memory is fit to be mapped and run on: touching pages that a file has no longer kills the process, so whoever
/// else has a descriptor of it must not be able to shorten it, and no file system may be behind it that can fail.
fn check(info: &BlockInfo, file: &File, offset: u64) -> Result<()> {
    let refused = |why: String| Error::NotShareable {
        name: info.name.clone(),
        why,
    };
    // A file of huge pages isn't either: one that the system has no page for kills as well.
    if !is_in_memory(file.as_fd()) {
        let why = "it is no memfd of ordinary pages; send it page by page";
        return Err(refused(why.into()));
    }
    let seals = fcntl_get_seals(file).unwrap_or(SealFlags::empty());
    if !seals.contains(SealFlags::SHRINK) {
        let why = "it is no memfd that is sealed against shrinking; send it page by page";
        return Err(refused(why.into()));
    }
    let flags = fcntl_getfl(file).map_err(|e| refused(e.to_string()))?;
    if flags & OFlags::RWMODE != OFlags::RDWR || flags.contains(OFlags::PATH) {
        return Err(refused("its descriptor is not for writing".into()));
    }
    if !offset.is_multiple_of(PAGE_SIZE) {
        return Err(refused(format!(
            "its offset of {offset} bytes is not whole pages"
        )));
    }
    let length = file.metadata().map_err(|e| refused(e.to_string()))?.len();
    // The layout's check has made sure that pages in bytes are a number.
    let end = offset.checked_add(info.pages * PAGE_SIZE);
    if end.is_none_or(|end| end > length) {
        let why = format!(
            "{} pages from byte {offset} on are more than its {length} bytes",
            info.pages
        );
        return Err(refused(why));
    }
    Ok(())
}
