//! Packs the pages of one connection.

use vm_memory::VolatileSlice;

use super::trials::{Trial, Trials};
use super::{Compress, Compressor};
use crate::memory::PAGE;
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
    /// Packed.
    Packed {
        codec: Compress,
        encodings: Vec<Encoding>,
        payload: &'p [u8],
    },
}

/// What one connection packs with: nothing of it is shared.
pub(crate) struct Packer {
    compressor: Compressor,
    trials: Trials,
    /// A private copy of the pages, encoded.
    contents: Vec<u8>,
    /// The same, compressed.
    packed: Vec<u8>,
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
            packed: Vec::new(),
        })))
    }

    /// Decides how the pages in `pieces` travel.
    pub(crate) fn pack(&mut self, pieces: &[VolatileSlice<'_>]) -> Result<Form<'_>> {
        let trial = self.trials.next();
        if trial == Trial::None || (trial == Trial::Sample && !self.sample_shrinks(pieces)?) {
            return Ok(Form::Memory);
        }
        self.contents.clear();
        for page in pages(pieces) {
            self.append(&page?);
        }
        let Some(length) = self.compress() else {
            return Ok(Form::Memory);
        };
        Ok(Form::Packed {
            codec: self.compressor.codec(),
            encodings: vec![Encoding::Whole; self.contents.len() / PAGE],
            payload: &self.packed[..length],
        })
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
