//! Frames in and out of a stream.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use vm_memory::VolatileSlice;

use super::header::{HEADER_LEN, Header, MAGIC_LEN};
use super::message::Message;
use crate::patience::TICK;
use crate::{Error, Result, Stream};

/// Asked each time the stream's own timeout has passed without a byte, with the time since the last one; and now and then,
/// with no time, while bytes go on. Its error ends the transfer.
pub type Patience<'a> = &'a dyn Fn(Duration) -> Result<()>;

/// What follows the metadata.
pub enum Payload<'a> {
    /// Nothing.
    None,
    /// Bytes that nobody changes.
    Bytes(&'a [u8]),
    /// Guest memory, which may change while it is sent.
    Pages(&'a [VolatileSlice<'a>]),
    /// No bytes: a descriptor that goes along with the frame, over a Unix socket.
    Descriptor(BorrowedFd<'a>),
}

impl Payload<'_> {
    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        match self {
            Self::None | Self::Descriptor(_) => 0,
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Pages(pieces) => pieces.iter().map(|p| p.len() as u64).sum(),
        }
    }
}

/// Repeats `step`, which moves some bytes, until it says that nothing is left. `step` returns bytes moved.
fn pump(
    during: &'static str,
    patience: Patience<'_>,
    mut left: usize,
    mut step: impl FnMut(usize) -> io::Result<usize>,
) -> Result<()> {
    let total = left;
    let mut last = Instant::now();
    let mut asked = last;
    while left > 0 {
        match step(total - left) {
            Ok(0) => return Err(Error::Closed { during }),
            Ok(n) => {
                left = left.saturating_sub(n);
                last = Instant::now();
                if left > 0 && last - asked >= TICK {
                    asked = last;
                    patience(Duration::ZERO)?;
                }
            }
            Err(e) => match e.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => patience(last.elapsed())?,
                io::ErrorKind::ConnectionReset
                | io::ErrorKind::BrokenPipe
                | io::ErrorKind::ConnectionAborted => return Err(Error::Closed { during }),
                // Words of our own, of what TLS met.
                _ if e.get_ref().is_some() => {
                    let problem = e.to_string();
                    return Err(Error::Broken { during, problem });
                }
                _ => return Err(Error::io(format!("go on {during}"), e)),
            },
        }
    }
    Ok(())
}

/// The pieces from byte `done` on, for `step` to go on with.
struct Rest<'a> {
    pieces: Vec<VolatileSlice<'a>>,
    next: usize,
    done: usize,
}

impl<'a> Rest<'a> {
    fn new(pieces: &[VolatileSlice<'a>]) -> Self {
        Self {
            pieces: pieces.to_vec(),
            next: 0,
            done: 0,
        }
    }

    fn after(&mut self, done: usize) -> io::Result<&[VolatileSlice<'a>]> {
        let mut skip = done - self.done;
        self.done = done;
        while let Some(piece) = self.pieces.get_mut(self.next) {
            if skip < piece.len() {
                *piece = piece.offset(skip).map_err(io::Error::other)?;
                break;
            }
            skip -= piece.len();
            self.next += 1;
        }
        Ok(&self.pieces[self.next..])
    }
}

/// Fills `buffer`.
pub(crate) fn read(
    stream: &Stream,
    buffer: &mut [u8],
    during: &'static str,
    patience: Patience<'_>,
) -> Result<()> {
    pump(during, patience, buffer.len(), |done| {
        stream.read(&mut buffer[done..])
    })
}

/// Reads some bytes, as many as there are; 0 at the end of the stream.
pub(crate) fn read_some(
    stream: &Stream,
    buffer: &mut [u8],
    during: &'static str,
    patience: Patience<'_>,
) -> Result<usize> {
    let mut count = 0;
    let read = pump(during, patience, 1, |_| {
        count = stream.read(buffer)?;
        Ok(count)
    });
    match read {
        Err(Error::Closed { .. }) => Ok(0),
        read => read.map(|()| count),
    }
}

/// Fills memory that may be looked at meanwhile.
pub(crate) fn read_pieces(
    stream: &Stream,
    pieces: &[VolatileSlice<'_>],
    during: &'static str,
    patience: Patience<'_>,
) -> Result<()> {
    let size = pieces.iter().map(VolatileSlice::len).sum();
    let mut rest = Rest::new(pieces);
    pump(during, patience, size, |done| {
        stream.read_pages(rest.after(done)?)
    })
}

const WRITING: &str = "writing to the stream";

/// Writes bytes that nobody changes. `more`: others follow at once.
pub(crate) fn write(
    stream: &Stream,
    bytes: &[u8],
    more: bool,
    patience: Patience<'_>,
) -> Result<()> {
    pump(WRITING, patience, bytes.len(), |done| {
        stream.write(&bytes[done..], more)
    })
}

/// Writes memory that may change meanwhile.
pub(crate) fn write_pieces(
    stream: &Stream,
    pieces: &[VolatileSlice<'_>],
    patience: Patience<'_>,
) -> Result<()> {
    let size = pieces.iter().map(VolatileSlice::len).sum();
    let mut rest = Rest::new(pieces);
    pump(WRITING, patience, size, |done| {
        stream.write_pages(rest.after(done)?)
    })
}

/// Writes frames.
pub(crate) struct Outlet {
    stream: Stream,
    /// Number of the next frame.
    pub(crate) sequence: u64,
    /// Bytes written.
    pub(crate) bytes: u64,
    /// No frame is half written. Otherwise nothing more can be said on this stream.
    pub(crate) whole: bool,
}

impl Outlet {
    pub(crate) fn new(stream: Stream) -> Self {
        Self {
            stream,
            sequence: 0,
            bytes: 0,
            whole: true,
        }
    }

    pub(crate) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Writes a frame and returns its number.
    pub(crate) fn send(
        &mut self,
        message: &Message,
        payload: &Payload<'_>,
        patience: Patience<'_>,
    ) -> Result<u64> {
        let metadata = message.encode()?;
        let sequence = self.sequence;
        let header = Header::encode(message.kind(), sequence, &metadata, payload.bytes())?;
        let mut head = Vec::with_capacity(HEADER_LEN + metadata.len());
        head.extend_from_slice(&header);
        head.extend_from_slice(&metadata);
        let length = payload.bytes();
        self.whole = false;
        match payload {
            // With the first byte, whose frame it belongs to.
            Payload::Descriptor(fd) => pump(WRITING, patience, head.len(), |done| match done {
                0 => self.stream.write_with(&head, *fd),
                _ => self.stream.write(&head[done..], false),
            })?,
            _ => write(&self.stream, &head, length > 0, patience)?,
        }
        match payload {
            Payload::None | Payload::Descriptor(_) => {}
            Payload::Bytes(bytes) => write(&self.stream, bytes, false, patience)?,
            Payload::Pages(pieces) => write_pieces(&self.stream, pieces, patience)?,
        }
        self.whole = true;
        self.sequence += 1;
        self.bytes += head.len() as u64 + length;
        Ok(sequence)
    }
}

/// Reads frames.
pub(crate) struct Inlet {
    stream: Stream,
    sequence: u64,
    /// What came along with the last frame.
    descriptor: Option<OwnedFd>,
}

impl Inlet {
    pub(crate) fn new(stream: Stream) -> Self {
        Self {
            stream,
            sequence: 0,
            descriptor: None,
        }
    }

    pub(crate) const fn takes_descriptors(&self) -> bool {
        self.stream.takes_descriptors()
    }

    /// The descriptor that came along with the last frame.
    pub(crate) fn take_descriptor(&mut self) -> Option<OwnedFd> {
        self.descriptor.take()
    }

    /// Reads header and metadata. The payload, if there is one, must be read next.
    pub(crate) fn receive(
        &mut self,
        during: &'static str,
        patience: Patience<'_>,
    ) -> Result<(Header, Message)> {
        let mut bytes = [0; HEADER_LEN];
        self.descriptor = None;
        let mut got = 0;
        // Whoever speaks otherwise may never say as much as a header.
        for least in [MAGIC_LEN, HEADER_LEN] {
            let head = pump(during, patience, least.saturating_sub(got), |_| {
                let (read, descriptor) = self.stream.read_with(&mut bytes[got..])?;
                if got == 0 {
                    self.descriptor = descriptor;
                }
                got += read;
                Ok(read)
            });
            self.of_its_kind(head)?;
            Header::check_magic(&bytes)?;
        }
        let header = Header::parse(&bytes)?;
        // The cap of the kind has been checked: this is at most MAX_METADATA.
        let mut metadata = vec![0; header.metadata as usize];
        self.fill(&mut metadata, "reading the metadata of a frame", patience)?;
        header.check(&bytes, &metadata)?;
        if header.sequence != self.sequence {
            return Err(Error::Sequence {
                expected: self.sequence,
                found: header.sequence,
            });
        }
        self.sequence += 1;
        Ok((header, Message::decode(header.kind, &metadata)?))
    }

    /// Reads a payload into guest memory.
    pub(crate) fn pages(&self, pieces: &[VolatileSlice<'_>], patience: Patience<'_>) -> Result<()> {
        self.of_its_kind(read_pieces(&self.stream, pieces, "reading pages", patience))
    }

    /// Reads a payload of `length` bytes. Memory grows with what has really come.
    pub(crate) fn bytes(&self, length: u32, patience: Patience<'_>) -> Result<Vec<u8>> {
        const STEP: usize = 1 << 20;
        let length = length as usize;
        let mut bytes = Vec::new();
        while bytes.len() < length {
            let start = bytes.len();
            bytes.resize(length.min(start + STEP), 0);
            self.fill(&mut bytes[start..], "reading a payload", patience)?;
        }
        Ok(bytes)
    }

    fn fill(&self, buffer: &mut [u8], during: &'static str, patience: Patience<'_>) -> Result<()> {
        self.of_its_kind(read(&self.stream, buffer, during, patience))
    }

    /// A file has no other end that could have gone.
    fn of_its_kind(&self, read: Result<()>) -> Result<()> {
        match read {
            Err(Error::Closed { during }) if self.stream.is_file() => {
                Err(Error::Truncated { during })
            }
            read => read,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{MappedMemory, PageMemory};
    use gleaner_bitmap::PageRange;
    use std::os::unix::net::UnixStream;

    /// More pieces than one call takes, through a socket whose buffer is far smaller, so that calls end anywhere.
    #[test]
    fn scattered_pages_arrive_in_order() {
        let (near, far) = UnixStream::pair().unwrap();
        let pages = 3000;
        let from = MappedMemory::anonymous(pages).unwrap();
        let to = MappedMemory::anonymous(pages).unwrap();
        for page in 0..pages {
            let text = [u8::try_from(page % 251).unwrap(); 4096];
            from.slice(PageRange::new(page, 1))
                .unwrap()
                .copy_from(&text);
        }
        let every: Vec<_> = (0..pages).rev().map(|p| PageRange::new(p, 1)).collect();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let stream = Stream::from(near);
                let pieces: Vec<_> = every.iter().map(|r| from.slice(*r).unwrap()).collect();
                let mut rest = Rest::new(&pieces);
                pump("test", &|_| Ok(()), 4096 * pieces.len(), |done| {
                    stream.write_pages(rest.after(done)?)
                })
                .unwrap();
            });
            let pieces: Vec<_> = every.iter().map(|r| to.slice(*r).unwrap()).collect();
            Inlet::new(far.into()).pages(&pieces, &|_| Ok(())).unwrap();
        });
        for page in 0..pages {
            let mut text = [0u8; 4096];
            to.slice(PageRange::new(page, 1))
                .unwrap()
                .copy_to(&mut text);
            assert!(text.iter().all(|b| u64::from(*b) == page % 251), "{page}");
        }
    }
}
