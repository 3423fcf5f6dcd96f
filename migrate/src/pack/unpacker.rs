//! What one connection of a destination unpacks with.

use super::{Compress, Expander};
use crate::wire::PackedBody;
use crate::{Error, Result};

/// Contexts of the codecs, and room for the contents of a frame.
#[derive(Default)]
pub(crate) struct Unpacker {
    expander: Expander,
    contents: Vec<u8>,
}

impl Unpacker {
    /// Fails where such a frame can't be unpacked, before its payload is read.
    pub(crate) fn prepare(&mut self, packed: &PackedBody) -> Result<()> {
        self.expander.prepare(packed.codec)
    }

    /// The contents that `packed` describes, exactly as long as that, of its payload.
    pub(crate) fn contents<'p>(
        &'p mut self,
        packed: &PackedBody,
        payload: &'p [u8],
    ) -> Result<&'p [u8]> {
        let length = packed.contents();
        if packed.codec == Compress::None {
            if payload.len() != length {
                return Err(Error::PayloadLength {
                    kind: "Packed",
                    described: length as u64,
                    carried: payload.len() as u64,
                });
            }
            return Ok(payload);
        }
        // At most what the pages of a frame can be, which is capped.
        self.contents.resize(length, 0);
        self.expander
            .expand(packed.codec, payload, &mut self.contents)?;
        Ok(&self.contents)
    }
}
