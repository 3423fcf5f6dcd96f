//! What a receiver migrates to.

use std::fs::File;

use gleaner_bitmap::{BlockInfo, Layout};

use crate::{NewMemory, Result};

/// The guest to be, as the receiver sees it. The receiver calls the methods from one thread:
///
/// ```text
/// ( remove_block (name taken over) ...  add_block ...  layout  remove_block ... )*  ready  run
/// begin_local  ( layout )*  adopt_block ...  ready  run
///   any failure before `run` returned Ok -> abort
/// ```
///
/// Errors are made with [`Error::destination`](crate::Error::destination); their text travels to the source and is what
/// its user reads.
pub trait Destination: Send {
    /// Makes memory for a new block: writable, of exactly `block.pages` pages. Name and length are a peer's: the name is
    /// fit for a file, the length may be more than this host has.
    ///
    /// # Errors
    /// Why there is none; the migration ends.
    fn add_block(&mut self, block: &BlockInfo) -> Result<NewMemory>;

    /// A migration begins that will hand over the source's own memory: whether this destination takes it over.
    ///
    /// # Errors
    /// [`Error::Unable`](crate::Error::Unable) unless overridden; why it doesn't. The migration ends, before the source
    /// has stopped its guest.
    fn begin_local(&mut self) -> Result<()> {
        Err(crate::Error::Unable {
            what: "take memory over",
        })
    }

    /// Takes over the memory of a block, in the place of [`Destination::add_block`]: `block.pages` pages from byte
    /// `offset` of `file` on, a memfd that is long enough and can't shrink, to be mapped shared. It is the source's until
    /// [`Destination::run`]: nothing is written to it before, nor if that never comes.
    ///
    /// # Errors
    /// [`Error::Unable`](crate::Error::Unable) unless overridden; why it can't be had. The migration ends.
    fn adopt_block(&mut self, block: &BlockInfo, file: File, offset: u64) -> Result<()> {
        let _ = (block, file, offset);
        Err(crate::Error::Unable {
            what: "take memory over",
        })
    }

    /// The source removed the block. Called after the layout without it is in force, except when a new block takes its
    /// name: then it goes before the new one is added.
    ///
    /// # Errors
    /// Why it can't be removed; the migration ends.
    fn remove_block(&mut self, block: &BlockInfo) -> Result<()>;

    /// A new layout is in force. Each of its blocks has been added, or will be adopted.
    ///
    /// # Errors
    /// Why it can't be had; the migration ends.
    fn layout(&mut self, layout: &Layout) -> Result<()>;

    /// All memory is here. Builds everything that is needed to run, from the last layout and `state`, without running:
    /// the source may still take the guest back.
    ///
    /// # Errors
    /// Why the guest can't be built; the source resumes.
    fn ready(&mut self, state: Vec<u8>) -> Result<()>;

    /// Runs the guest: the source has let go of it.
    ///
    /// # Errors
    /// Why it doesn't run. An error is a promise that no vCPU has run and none will: the source resumes on it.
    fn run(&mut self) -> Result<()>;

    /// The migration ended before the guest ran. Everything may be thrown away.
    fn abort(&mut self);
}
