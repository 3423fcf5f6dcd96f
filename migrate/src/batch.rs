//! Pages gathered for the next frames of a connection.

use std::ops::AddAssign;

use gleaner_bitmap::{Extent, Generation, PAGE_SIZE};
use vm_memory::VolatileSlice;

use crate::link::Link;
use crate::pack::{Applied, Form, MOST_PAGES, Packer};
use crate::there::There;
use crate::wire::{Extents, MAX_EXTENTS, Message, PackedBody, Payload};
use crate::{Channel, Result};

/// What a connection has sent.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Tally {
    /// Pages with their contents.
    pub(crate) pages: u64,
    /// Pages of zeros, those that the destination needn't be told of included.
    pub(crate) zeros: u64,
    /// Pages, of those with contents, that went as what has changed of them.
    pub(crate) deltas: u64,
    /// Bytes of page contents that packing has left out.
    pub(crate) saved: u64,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, more: Self) {
        self.pages += more.pages;
        self.zeros += more.zeros;
        self.deltas += more.deltas;
        self.saved += more.saved;
    }
}

/// Nothing is copied unless it is packed: pieces point into guest memory.
pub(crate) struct Batch<'m> {
    generation: Generation,
    there: &'m There,
    packer: Option<&'m mut Packer>,
    /// Whether the job that the pages are of has been applied.
    applied: Applied,
    /// Most pages in a frame.
    most: u64,
    extents: Vec<Extent>,
    pieces: Vec<VolatileSlice<'m>>,
    count: u64,
    zeros: Vec<Extent>,
    pub(crate) tally: Tally,
}

impl<'m> Batch<'m> {
    pub(crate) fn new(
        generation: Generation,
        there: &'m There,
        packer: Option<&'m mut Packer>,
        applied: Applied,
        frame_bytes: u64,
    ) -> Self {
        let most = packer.as_ref().map_or(u64::MAX, |_| MOST_PAGES);
        Self {
            generation,
            there,
            packer,
            applied,
            most: (frame_bytes / PAGE_SIZE).clamp(1, most),
            extents: Vec::new(),
            pieces: Vec::new(),
            count: 0,
            zeros: Vec::new(),
            tally: Tally::default(),
        }
    }

    /// Pages that the next frame still takes, at least one.
    pub(crate) const fn room(&self) -> u64 {
        self.most - self.count
    }

    /// No more of them than there is [`room`](Self::room) for. A frame that is full is sent at once: what was searched for
    /// zeros a moment ago is in the cache then.
    pub(crate) fn pages<C: Channel + ?Sized>(
        &mut self,
        link: &mut Link<C>,
        extent: Extent,
        piece: VolatileSlice<'m>,
    ) -> Result<()> {
        self.count += extent.range.pages;
        self.extents.push(extent);
        self.pieces.push(piece);
        if self.count >= self.most || self.extents.len() >= MAX_EXTENTS {
            self.flush_pages(link)?;
        }
        Ok(())
    }

    pub(crate) fn zeros<C: Channel + ?Sized>(
        &mut self,
        link: &mut Link<C>,
        extent: Extent,
    ) -> Result<()> {
        self.tally.zeros += extent.range.pages;
        for told in self.there.zeros(extent) {
            self.zeros.push(told);
            if self.zeros.len() >= MAX_EXTENTS {
                self.flush_zeros(link)?;
            }
        }
        Ok(())
    }

    pub(crate) fn flush<C: Channel + ?Sized>(&mut self, link: &mut Link<C>) -> Result<()> {
        self.flush_pages(link)?;
        self.flush_zeros(link)
    }

    fn flush_pages<C: Channel + ?Sized>(&mut self, link: &mut Link<C>) -> Result<()> {
        if self.extents.is_empty() {
            return Ok(());
        }
        let mut deltas = 0;
        let form = match &mut self.packer {
            Some(packer) => packer.pack(&self.extents, &self.pieces, self.there, &self.applied)?,
            None => {
                self.there.contents(&self.extents);
                Form::Memory
            }
        };
        let pages = Extents {
            generation: self.generation,
            extents: std::mem::take(&mut self.extents),
        };
        let (message, payload) = match form {
            Form::Memory => (Message::Pages(pages), Payload::Pages(&self.pieces)),
            Form::Copy(copy) => (Message::Pages(pages), Payload::Bytes(copy)),
            Form::Packed {
                codec,
                encodings,
                deltas: found,
                payload,
            } => {
                deltas = found;
                let packed = PackedBody {
                    pages,
                    codec,
                    encodings,
                };
                (Message::Packed(packed), Payload::Bytes(payload))
            }
        };
        link.send(&message, &payload)?;
        self.tally.pages += self.count;
        self.tally.deltas += deltas;
        self.tally.saved += (self.count * PAGE_SIZE).saturating_sub(payload.bytes());
        self.pieces.clear();
        self.count = 0;
        Ok(())
    }

    fn flush_zeros<C: Channel + ?Sized>(&mut self, link: &mut Link<C>) -> Result<()> {
        if self.zeros.is_empty() {
            return Ok(());
        }
        let message = Message::Zeros(Extents {
            generation: self.generation,
            extents: std::mem::take(&mut self.zeros),
        });
        link.send(&message, &Payload::None)?;
        Ok(())
    }
}
