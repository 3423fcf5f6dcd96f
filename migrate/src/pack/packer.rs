//! Packs the pages of one connection.

use gleaner_bitmap::Extent;
use vm_memory::VolatileSlice;

use super::delta::Page;
use super::trials::{Trial, Trials};
use super::{Applied, Compress, Compressor};
use crate::memory::PAGE;
use crate::there::There;
use crate::wire::Encoding;
use crate::{Error, Result};

/// Most pages that are packed at a time: what is copied stays in a core's cache until it is compressed.
pub(crate) const MOST_PAGES: u64 = 128;
/// Of so many pages, one is in a sample.
const SAMPLE: usize = 16;

/// How pages travel.
pub(crate) enum Form<'p> {
    /// As they are, out of guest memory.
    Memory,
    /// As they are, out of a copy that is kept of some of them.
    Copy(&'p [u8]),
    /// Packed.
    Packed {
        codec: Compress,
        encodings: Vec<Encoding>,
        /// Pages that are deltas.
        deltas: u64,
        payload: &'p [u8],
    },
}

/// What one connection packs with: nothing of it is shared.
pub(crate) struct Packer {
    compressor: Compressor,
    trials: Trials,
    /// A private copy of the pages, encoded.
    contents: Vec<u8>,
    encodings: Vec<Encoding>,
    /// The same contents, compressed.
    packed: Vec<u8>,
    /// A private copy of one page.
    page: Box<Page>,
}

impl Packer {
    /// One that packs with `codec`, unless that is nothing.
    pub(crate) fn new(codec: Compress) -> Result<Option<Box<Self>>> {
        if codec == Compress::None {
            return Ok(None);
        }
        Ok(Some(Box::new(Self {
            compressor: Compressor::new(codec)?,
            trials: Trials::default(),
            contents: Vec::new(),
            encodings: Vec::new(),
            packed: Vec::new(),
            page: Box::new([0; PAGE]),
        })))
    }

    /// Decides how the pages `extents`, whose contents are `pieces`, travel with a job.
    pub(crate) fn pack(
        &mut self,
        extents: &[Extent],
        pieces: &[VolatileSlice<'_>],
        there: &There,
        applied: &Applied,
    ) -> Result<Form<'_>> {
        let again = there.again(extents);
        let hot = again.contains(&true);
        let compress = match self.trials.next() {
            Trial::Whole => true,
            Trial::Sample => self.sample_shrinks(pieces)?,
            Trial::None => false,
        };
        if !hot && !compress {
            // None of them was sent before, so nothing is kept of any.
            return Ok(Form::Memory);
        }
        let deltas = self.encode(extents, pieces, &again, there, applied)?;
        let compressed = if compress { self.compress() } else { None };
        let (codec, payload) = match compressed {
            Some(length) => (self.compressor.codec(), &self.packed[..length]),
            None if deltas > 0 => (Compress::None, &self.contents[..]),
            // What is kept of a page must be what was sent, so not out of guest memory.
            None if hot => return Ok(Form::Copy(&self.contents)),
            None => return Ok(Form::Memory),
        };
        Ok(Form::Packed {
            codec,
            encodings: std::mem::take(&mut self.encodings),
            deltas,
            payload,
        })
    }

    /// Copies the pages, each as a delta if that is less; how many are. Pages that are sent `again` are kept.
    fn encode(
        &mut self,
        extents: &[Extent],
        pieces: &[VolatileSlice<'_>],
        again: &[bool],
        there: &There,
        applied: &Applied,
    ) -> Result<u64> {
        self.contents.clear();
        self.encodings.clear();
        let mut deltas = 0;
        let numbers = extents.iter().flat_map(|extent| {
            let range = extent.range;
            (range.first..range.end()).map(|page| (extent.block, page))
        });
        for ((page, key), again) in pages(pieces).zip(numbers).zip(again) {
            let page = page?;
            let Some(bases) = there.bases().filter(|_| *again) else {
                self.append(&page);
                self.encodings.push(Encoding::Whole);
                continue;
            };
            page.copy_to(&mut self.page[..]);
            let start = self.contents.len();
            if bases.delta(key, &self.page, applied, &mut self.contents) {
                // No longer than MAX_DELTA.
                let length = u16::try_from(self.contents.len() - start).unwrap_or(u16::MAX);
                self.encodings.push(Encoding::Delta(length));
                deltas += 1;
            } else {
                self.contents.extend_from_slice(&self.page[..]);
                self.encodings.push(Encoding::Whole);
            }
        }
        Ok(deltas)
    }

    fn append(&mut self, page: &VolatileSlice<'_>) {
        let start = self.contents.len();
        self.contents.resize(start + PAGE, 0);
        page.copy_to(&mut self.contents[start..]);
    }

    /// Whether some of the pages shrink: then all of them are tried.
    fn sample_shrinks(&mut self, pieces: &[VolatileSlice<'_>]) -> Result<bool> {
        self.contents.clear();
        for page in pages(pieces).step_by(SAMPLE) {
            self.append(&page?);
        }
        Ok(self.compress().is_some())
    }

    /// Compresses the contents; the length, if that is worth it: less than nine tenths.
    fn compress(&mut self) -> Option<usize> {
        let most = self.contents.len() / 10 * 9;
        let length = self
            .compressor
            .compress(&self.contents, &mut self.packed, most);
        self.trials.went(length.is_some());
        length
    }
}

/// The pages of some pieces, one by one.
fn pages<'p>(
    pieces: &'p [VolatileSlice<'_>],
) -> impl Iterator<Item = Result<VolatileSlice<'p>>> + 'p {
    pieces.iter().flat_map(|piece| {
        (0..piece.len()).step_by(PAGE).map(|at| {
            piece.subslice(at, PAGE).map_err(|e| Error::Memory {
                what: "of a lease can't be reached",
                detail: e.to_string(),
            })
        })
    })
}
