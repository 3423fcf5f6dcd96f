//! The main connection, as numbers, names and pages. All integers are big-endian.

use vm_memory::VolatileSlice;

use crate::{Error, Result};

/// Bytes that are read at a time.
const STEP: usize = 256 << 10;

/// A stream that is read by pieces. `read` fills some of a buffer and says how much; 0 at the end.
pub(super) struct Bytes<R> {
    read: R,
    buffer: Vec<u8>,
    /// What is still to be taken out of the buffer.
    at: usize,
    end: usize,
    /// Bytes that were read before the buffer.
    before: u64,
}

impl<R: FnMut(&mut [u8]) -> Result<usize>> Bytes<R> {
    pub(super) fn new(read: R) -> Self {
        Self {
            read,
            buffer: vec![0; STEP],
            at: 0,
            end: 0,
            before: 0,
        }
    }

    /// Bytes taken so far.
    pub(super) const fn position(&self) -> u64 {
        self.before + self.at as u64
    }

    /// What is wrong, here.
    pub(super) fn bad(&self, problem: impl std::fmt::Display) -> Error {
        Error::QemuStream {
            problem: format!("{problem} (before byte {})", self.position()),
        }
    }

    /// Some bytes that are next, whatever they are; none at the end of the stream.
    pub(super) fn some(&mut self) -> Result<&[u8]> {
        self.refill()?;
        let from = self.at;
        self.at = self.end;
        Ok(&self.buffer[from..self.end])
    }

    /// Has bytes in the buffer, unless the stream has ended.
    fn refill(&mut self) -> Result<()> {
        if self.at == self.end {
            self.before += self.end as u64;
            (self.at, self.end) = (0, 0);
            self.end = (self.read)(&mut self.buffer)?.min(STEP);
        }
        Ok(())
    }

    /// Takes `length` bytes, piece by piece: `each` is told where a piece belongs.
    fn take(&mut self, length: usize, mut each: impl FnMut(usize, &[u8])) -> Result<()> {
        let mut done = 0;
        while done < length {
            self.refill()?;
            if self.at == self.end {
                return Err(Error::Closed {
                    during: "reading QEMU's stream",
                });
            }
            let take = (length - done).min(self.end - self.at);
            each(done, &self.buffer[self.at..self.at + take]);
            self.at += take;
            done += take;
        }
        Ok(())
    }

    pub(super) fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.take(bytes.len(), |at, piece| {
            bytes[at..at + piece.len()].copy_from_slice(piece);
        })
    }

    /// Reads into memory that may be looked at meanwhile.
    pub(super) fn memory(&mut self, memory: &VolatileSlice<'_>) -> Result<()> {
        self.take(memory.len(), |at, piece| {
            // Inside, because no piece reaches past the length.
            if let Ok(rest) = memory.offset(at) {
                rest.copy_from(piece);
            }
        })
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn u8(&mut self) -> Result<u8> {
        self.array().map(u8::from_be_bytes)
    }

    pub(super) fn u16(&mut self) -> Result<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A name with its length in one byte.
    pub(super) fn name(&mut self) -> Result<String> {
        let length = self.u8()?;
        self.text(length.into())
    }

    /// A name of `length` bytes, which the caller has capped.
    pub(super) fn text(&mut self, length: usize) -> Result<String> {
        let mut bytes = vec![0; length];
        self.fill(&mut bytes)?;
        match String::from_utf8(bytes) {
            Ok(name) if !name.is_empty() && !name.contains(char::is_control) => Ok(name),
            _ => Err(self.bad("a name is not a text")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream that comes in pieces of `step` bytes.
    fn stream(all: &[u8], step: usize) -> Bytes<impl FnMut(&mut [u8]) -> Result<usize>> {
        let mut at = 0;
        let all = all.to_vec();
        Bytes::new(move |buffer: &mut [u8]| {
            let take = step.min(all.len() - at).min(buffer.len());
            buffer[..take].copy_from_slice(&all[at..at + take]);
            at += take;
            Ok(take)
        })
    }

    #[test]
    fn numbers_and_names_are_read_across_pieces() {
        let all = b"\x01\x02\x03\x04\x05\x06\x07\x00\x00\x00\x00\x00\x00\x10\x08\x03ramrest";
        for step in 1..=all.len() {
            let mut bytes = stream(all, step);
            assert_eq!(bytes.u8().unwrap(), 1);
            assert_eq!(bytes.u16().unwrap(), 0x203);
            assert_eq!(bytes.u32().unwrap(), 0x0405_0607);
            assert_eq!(bytes.u64().unwrap(), 0x1008);
            assert_eq!(bytes.name().unwrap(), "ram");
            assert_eq!(bytes.position(), 19);
            let mut rest = Vec::new();
            while let piece @ [_, ..] = bytes.some().unwrap() {
                rest.extend_from_slice(piece);
            }
            assert_eq!(rest, b"rest");
            assert!(matches!(bytes.u8(), Err(Error::Closed { .. })));
        }
    }

    #[test]
    fn names_that_are_no_text_are_refused() {
        for bad in [&b"\x00"[..], b"\x02\xff\xfe", b"\x02a\n", b"\x03ab"] {
            assert!(stream(bad, 99).name().is_err(), "{bad:?}");
        }
    }
}
