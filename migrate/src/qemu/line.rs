//! One connection to a QEMU.

use vm_memory::VolatileSlice;

use crate::wire::{self, Patience};
use crate::{Error, Result, Stream};

/// PINGs are numbered from here on; the first one asks whether there is a QEMU.
pub(crate) const FIRST_PING: u32 = 1;

/// One connection, as it is written to.
pub(crate) struct Line {
    stream: Stream,
    pub(crate) bytes: u64,
    /// Nothing on it is half written. Otherwise what follows would be read as something else.
    whole: bool,
    /// The last full sync that has passed here, by its PING. Of the main connection it is the last one of all.
    pub(crate) synced: u32,
}

impl Line {
    pub(crate) fn new(stream: Stream) -> Self {
        Self {
            stream,
            bytes: 0,
            whole: true,
            synced: FIRST_PING,
        }
    }

    pub(crate) const fn stream(&self) -> &Stream {
        &self.stream
    }

    fn write(&mut self, length: usize, write: impl FnOnce(&Stream) -> Result<()>) -> Result<()> {
        if !std::mem::replace(&mut self.whole, false) {
            return Err(Error::Closed {
                during: "writing to a stream that has failed",
            });
        }
        write(&self.stream)?;
        self.whole = true;
        self.bytes += length as u64;
        Ok(())
    }

    /// Writes bytes that nobody changes.
    pub(crate) fn put(&mut self, bytes: &[u8], patience: Patience<'_>) -> Result<()> {
        self.write(bytes.len(), |stream| {
            wire::write(stream, bytes, false, patience)
        })
    }

    /// As [`Line::put`], of memory that may change meanwhile.
    pub(crate) fn put_pieces(
        &mut self,
        pieces: &[VolatileSlice<'_>],
        patience: Patience<'_>,
    ) -> Result<()> {
        let length = pieces.iter().map(VolatileSlice::len).sum();
        self.write(length, |stream| {
            wire::write_pieces(stream, pieces, patience)
        })
    }
}
