//! Pages that travel packed.

use gleaner_bitmap::PAGE_SIZE;
use serde::{Deserialize, Serialize};

use super::Extents;
use crate::{Compress, Error, Result};

/// Most pages in a Packed frame, and most extents.
pub const MAX_PACKED_PAGES: usize = 256;
/// Most bytes of a page's delta: half a page.
#[allow(clippy::cast_possible_truncation)] // 2048
pub const MAX_DELTA: u16 = (PAGE_SIZE / 2) as u16;

/// How a page is encoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Encoding {
    /// As it is.
    Whole,
    /// As what has changed since it came last, in so many bytes.
    Delta(u16),
}

impl Encoding {
    /// Its bytes.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Whole => crate::memory::PAGE,
            Self::Delta(bytes) => bytes as usize,
        }
    }
}

/// Pages that travel packed: what describes the payload. The payload is the pages' encodings in their order, as one piece,
/// compressed.
///
/// A delta is a row of: how many bytes are as they were; how many are not, at least one; those bytes. Both numbers have
/// seven bits a byte, the low ones first, in one or two bytes. What is left of the page is as it was.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PackedBody {
    /// The pages.
    pub pages: Extents,
    /// What the payload is compressed with.
    pub codec: Compress,
    /// How each page is encoded.
    pub encodings: Vec<Encoding>,
}

impl PackedBody {
    /// Bytes of the payload before it was compressed.
    #[must_use]
    pub fn contents(&self) -> usize {
        self.encodings.iter().map(|encoding| encoding.bytes()).sum()
    }

    /// Fails where it is longer than it may be. How many pages the extents have is for those who know the blocks.
    pub(super) fn check(&self) -> Result<()> {
        let cap = MAX_PACKED_PAGES as u64;
        let counts = [self.encodings.len(), self.pages.extents.len()];
        if let Some(count) = counts.iter().find(|count| **count > MAX_PACKED_PAGES) {
            return Err(Error::TooLong {
                what: "list of packed pages",
                length: *count as u64,
                cap,
            });
        }
        for encoding in &self.encodings {
            if let Encoding::Delta(bytes) = encoding
                && *bytes > MAX_DELTA
            {
                return Err(Error::TooLong {
                    what: "delta of a page (bytes)",
                    length: (*bytes).into(),
                    cap: MAX_DELTA.into(),
                });
            }
        }
        Ok(())
    }
}
