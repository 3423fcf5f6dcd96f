//! A byte stream to the other end.

use std::fs::{File, OpenOptions};
use std::io;
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, sockopt};
use vm_memory::VolatileSlice;

use crate::{Address, Error, Result, raw};

/// How long a TCP connection may take to come about.
const CONNECT: Duration = Duration::from_secs(10);

/// A connection to the other end, or a file that stands for it.
#[derive(Debug)]
pub enum Stream {
    /// TCP, with `TCP_NODELAY` when it came from this crate.
    Tcp(TcpStream),
    /// A Unix stream socket.
    Unix(UnixStream),
    /// A file: written by the source, read by the destination, without answers.
    File(File),
}

/// Connects to the destination. A file is created with mode 0600 (guest memory is secret), or emptied.
///
/// # Errors
/// [`Error::Io`]; nothing is open then.
pub fn connect(address: &Address) -> Result<Stream> {
    let fail = |cause| Error::io(format!("connect to {address}"), cause);
    match address {
        Address::Tcp { host, port } => {
            let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
            for target in (host.as_str(), *port).to_socket_addrs().map_err(fail)? {
                match TcpStream::connect_timeout(&target, CONNECT) {
                    Ok(tcp) => return Stream::tcp(tcp).map_err(fail),
                    Err(cause) => last = cause,
                }
            }
            Err(fail(last))
        }
        Address::Unix(path) => Ok(Stream::Unix(UnixStream::connect(path).map_err(fail)?)),
        Address::Fd(fd) => Stream::inherited(*fd).map_err(fail),
        Address::File(path) => OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)
            .map(Stream::File)
            .map_err(|cause| Error::io(format!("create {address}"), cause)),
    }
}

impl Stream {
    /// Whether it is a file: nobody answers then.
    #[must_use]
    pub const fn is_file(&self) -> bool {
        matches!(self, Self::File(_))
    }

    /// A second handle on the same stream.
    ///
    /// # Errors
    /// [`Error::Io`]; the stream is untouched.
    pub fn try_clone(&self) -> Result<Self> {
        match self {
            Self::Tcp(s) => s.try_clone().map(Self::Tcp),
            Self::Unix(s) => s.try_clone().map(Self::Unix),
            Self::File(s) => s.try_clone().map(Self::File),
        }
        .map_err(|cause| Error::io("duplicate a stream", cause))
    }

    /// After how long reads and writes return without having moved a byte (`None`: never). Files always wait.
    ///
    /// # Errors
    /// [`Error::Io`], for a zero duration too.
    pub fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> Result<()> {
        match self {
            Self::Tcp(s) => s.set_read_timeout(read).and(s.set_write_timeout(write)),
            Self::Unix(s) => s.set_read_timeout(read).and(s.set_write_timeout(write)),
            Self::File(_) => Ok(()),
        }
        .map_err(|cause| Error::io("set the timeouts of a stream", cause))
    }

    /// Ends one or both directions, for every handle of the stream. Files have no directions to end; a peer that is
    /// gone already is no error.
    pub fn shutdown(&self, how: Shutdown) {
        // The only failure is ENOTCONN: what was wanted is so already.
        let _ = match self {
            Self::Tcp(s) => s.shutdown(how),
            Self::Unix(s) => s.shutdown(how),
            Self::File(_) => Ok(()),
        };
    }

    /// Says that nothing more will be said, then reads and drops what the peer still sends, until it is done too or
    /// `limit` has passed: closing a socket with unread bytes would take back what was said last.
    pub(crate) fn linger(&self, limit: Duration) {
        if self.is_file() {
            return;
        }
        self.shutdown(Shutdown::Write);
        let end = Instant::now() + limit;
        let mut scrap = vec![0; 256 << 10];
        while Instant::now() < end {
            match self.read(&mut scrap) {
                Ok(0) => break,
                Err(e) if !retry(&e) => break,
                _ => {}
            }
        }
        self.shutdown(Shutdown::Both);
    }

    pub(crate) fn tcp(tcp: TcpStream) -> io::Result<Self> {
        tcp.set_nodelay(true)?;
        Ok(Self::Tcp(tcp))
    }

    pub(crate) fn inherited(fd: RawFd) -> io::Result<Self> {
        let fd = raw::inherited(fd)?;
        let file = File::from(fd);
        if file.metadata()?.is_file() {
            return Ok(Self::File(file));
        }
        let fd = std::os::fd::OwnedFd::from(file);
        if sockopt::socket_type(&fd)? != SocketType::STREAM {
            return Err(io::Error::other("it is neither a stream socket nor a file"));
        }
        match sockopt::socket_domain(&fd)? {
            AddressFamily::UNIX => Ok(Self::Unix(fd.into())),
            _ => Self::tcp(fd.into()),
        }
    }

    /// Waits until what was written is on the disk. Nothing to do for a socket.
    pub(crate) fn sync(&self) -> Result<()> {
        match self {
            Self::File(file) => file
                .sync_all()
                .map_err(|cause| Error::io("bring the stream to the disk", cause)),
            _ => Ok(()),
        }
    }

    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::File(file) => io::Read::read(&mut &*file, buffer),
            _ => Ok(rustix::net::recv(self, buffer, RecvFlags::empty())?.0),
        }
    }

    /// `more`: the rest of a frame follows at once.
    pub(crate) fn write(&self, bytes: &[u8], more: bool) -> io::Result<usize> {
        match self {
            Self::File(file) => io::Write::write(&mut &*file, bytes),
            _ => {
                let more = if more {
                    SendFlags::MORE
                } else {
                    SendFlags::empty()
                };
                Ok(rustix::net::send(self, bytes, SendFlags::NOSIGNAL | more)?)
            }
        }
    }

    pub(crate) fn read_pages(&self, pieces: &[VolatileSlice<'_>]) -> io::Result<usize> {
        raw::read_pages(self.as_fd(), pieces)
    }

    pub(crate) fn write_pages(&self, pieces: &[VolatileSlice<'_>]) -> io::Result<usize> {
        raw::write_pages(self.as_fd(), !self.is_file(), pieces)
    }
}

/// Whether a read or write merely moved nothing yet.
pub(crate) fn retry(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(s) => s.as_fd(),
            Self::Unix(s) => s.as_fd(),
            Self::File(s) => s.as_fd(),
        }
    }
}

impl From<UnixStream> for Stream {
    fn from(stream: UnixStream) -> Self {
        Self::Unix(stream)
    }
}

impl From<TcpStream> for Stream {
    fn from(stream: TcpStream) -> Self {
        Self::Tcp(stream)
    }
}

impl From<File> for Stream {
    fn from(file: File) -> Self {
        Self::File(file)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn an_inherited_socket_is_used_and_left_open() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let address = Address::Fd(ours.as_raw_fd());
        for text in [b"one", b"two"] {
            connect(&address).unwrap().write(text, false).unwrap();
            let mut got = [0; 3];
            io::Read::read_exact(&mut &theirs, &mut got).unwrap();
            assert_eq!(&got, text);
        }
    }

    #[test]
    fn a_descriptor_that_is_not_open_is_named() {
        let message = connect(&Address::Fd(1_000_000)).unwrap_err().to_string();
        assert!(message.contains("fd:1000000"), "{message}");
    }

    #[test]
    fn a_file_is_private_to_its_owner() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stream");
        assert!(connect(&Address::File(path.clone())).unwrap().is_file());
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0);
    }
}
