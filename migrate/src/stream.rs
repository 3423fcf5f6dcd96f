//! A byte stream to the other end.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketType, sockopt,
};
use vm_memory::VolatileSlice;

#[cfg(feature = "tls")]
use crate::TlsStream;
use crate::{Error, Result, raw};

/// A peer that sent nothing for so long is asked whether it is still there,
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
/// so long after each other,
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// and is taken for gone after so many questions.
const KEEPALIVE_PROBES: u32 = 3;
/// Bytes that the peer's system has not taken for so long break the connection, in milliseconds.
const USER_TIMEOUT: u32 = 30_000;

/// A connection to the other end, or a file that stands for it.
#[derive(Debug)]
#[non_exhaustive]
pub enum Stream {
    /// TCP. When it came from this crate: with `TCP_NODELAY`, with keepalive (after 10 s, every 5 s, 3 times), and
    /// broken after 30 s in which the peer's system took nothing (`TCP_USER_TIMEOUT`).
    Tcp(TcpStream),
    /// A Unix stream socket.
    Unix(UnixStream),
    /// A file: written by the source, read by the destination, without answers.
    File(File),
    /// One of the sockets with TLS, the handshake done. Its descriptor is good for waiting alone.
    #[cfg(feature = "tls")]
    Tls(TlsStream),
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
            #[cfg(feature = "tls")]
            Self::Tls(s) => Ok(Self::Tls(s.clone())),
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
            #[cfg(feature = "tls")]
            Self::Tls(s) => s.set_timeouts(read, write),
        }
        .map_err(|cause| Error::io("set the timeouts of a stream", cause))
    }

    /// Ends one or both directions, for every handle of the stream; the peer hears of it (with TLS, by `close_notify`
    /// too). Files have no directions to end; a peer that is gone already is no error.
    pub fn shutdown(&self, how: Shutdown) {
        // The only failure is ENOTCONN: what was wanted is so already.
        let _ = match self {
            Self::Tcp(s) => s.shutdown(how),
            Self::Unix(s) => s.shutdown(how),
            Self::File(_) => Ok(()),
            #[cfg(feature = "tls")]
            Self::Tls(s) => {
                s.shutdown(how);
                Ok(())
            }
        };
    }

    /// Says that nothing more will be said, then reads and drops what the peer still sends, until it is done too or
    /// `limit` has passed: closing a socket with unread bytes would take back what was said last.
    /// Who is at the other end, for people.
    pub(crate) fn peer(&self) -> String {
        match self {
            Self::Tcp(tcp) => tcp
                .peer_addr()
                .map_or_else(|_| "a peer that has gone".into(), |peer| peer.to_string()),
            _ => "a Unix socket".into(),
        }
    }

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
        sockopt::set_socket_keepalive(&tcp, true)?;
        sockopt::set_tcp_keepidle(&tcp, KEEPALIVE_IDLE)?;
        sockopt::set_tcp_keepintvl(&tcp, KEEPALIVE_INTERVAL)?;
        sockopt::set_tcp_keepcnt(&tcp, KEEPALIVE_PROBES)?;
        sockopt::set_tcp_user_timeout(&tcp, USER_TIMEOUT)?;
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
            #[cfg(feature = "tls")]
            Self::Tls(s) => s.read(buffer),
            _ => Ok(rustix::net::recv(self, buffer, RecvFlags::empty())?.0),
        }
    }

    /// `more`: the rest of a frame follows at once. After an error that is to be tried again (see [`retry`]) what is
    /// written next has to begin with the same bytes: with TLS some of them may be enciphered already.
    pub(crate) fn write(&self, bytes: &[u8], more: bool) -> io::Result<usize> {
        match self {
            Self::File(file) => io::Write::write(&mut &*file, bytes),
            #[cfg(feature = "tls")]
            Self::Tls(s) => s.write(bytes, more),
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

    /// Whether a descriptor can go along. Only a Unix socket carries it, and what goes through TLS is bytes.
    pub(crate) const fn takes_descriptors(&self) -> bool {
        matches!(self, Self::Unix(_))
    }

    /// As [`Stream::read`]; with a descriptor that came along, if one did.
    pub(crate) fn read_with(&self, buffer: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
        let Self::Unix(socket) = self else {
            return Ok((self.read(buffer)?, None));
        };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut pieces = [IoSliceMut::new(buffer)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = rustix::net::recvmsg(socket, &mut pieces, &mut control, flags)?;
        let descriptor = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        Ok((got.bytes, descriptor))
    }

    /// As [`Stream::write`], on a Unix socket; `descriptor` goes along with the first byte.
    pub(crate) fn write_with(&self, bytes: &[u8], descriptor: BorrowedFd<'_>) -> io::Result<usize> {
        let Self::Unix(socket) = self else {
            return Err(io::Error::other("only a Unix socket carries descriptors"));
        };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = [descriptor];
        if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
            return Err(io::ErrorKind::InvalidInput.into()); // not reached: there is room for one
        }
        let flags = SendFlags::NOSIGNAL;
        Ok(rustix::net::sendmsg(
            socket,
            &[IoSlice::new(bytes)],
            &mut control,
            flags,
        )?)
    }

    pub(crate) fn read_pages(&self, pieces: &[VolatileSlice<'_>]) -> io::Result<usize> {
        match self {
            #[cfg(feature = "tls")]
            Self::Tls(s) => s.read_pages(pieces),
            _ => raw::read_pages(self.as_fd(), pieces),
        }
    }

    pub(crate) fn write_pages(&self, pieces: &[VolatileSlice<'_>]) -> io::Result<usize> {
        match self {
            #[cfg(feature = "tls")]
            Self::Tls(s) => s.write_pages(pieces),
            _ => raw::write_pages(self.as_fd(), !self.is_file(), pieces),
        }
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
            #[cfg(feature = "tls")]
            Self::Tls(s) => s.as_fd(),
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
