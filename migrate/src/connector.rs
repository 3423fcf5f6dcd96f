//! How the source reaches the destination, as often as it needs to.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::{Errno, ioctl_fionbio};
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect as start, socket_with, sockopt};

use crate::patience::TICK;
use crate::{Address, CancelToken, Error, Result, Stream};
#[cfg(feature = "tls")]
use crate::{TlsClient, TlsStream};

/// How long a TCP connection may take to come about.
const CONNECT: Duration = Duration::from_secs(10);

/// Makes connections to one destination. It may be used several times, by several threads at once.
#[derive(Clone, Debug)]
pub struct Connector {
    address: Address,
    /// With the name that the destination's certificate has to be made out to.
    #[cfg(feature = "tls")]
    tls: Option<(TlsClient, rustls::pki_types::ServerName<'static>)>,
}

impl Connector {
    /// For connections to `address`. Nothing is opened yet.
    #[must_use]
    pub const fn new(address: Address) -> Self {
        Self {
            address,
            #[cfg(feature = "tls")]
            tls: None,
        }
    }

    /// With TLS from now on, and never without. The destination's certificate has to be made out to the host in
    /// `tcp:HOST:PORT`; to `localhost` for `unix:` and `fd:`.
    ///
    /// # Errors
    /// [`Error::Address`] for a file, which has no other end, and for a host that no certificate can name.
    #[cfg(feature = "tls")]
    pub fn tls(mut self, client: TlsClient) -> Result<Self> {
        let host = TlsClient::host(&self.address)?;
        self.tls = Some((client, host));
        Ok(self)
    }

    /// Where it connects to.
    #[must_use]
    pub const fn address(&self) -> &Address {
        &self.address
    }

    /// A new connection. A file is created with mode 0600 (guest memory is secret), or emptied; a device may stand
    /// for it, a pipe may not. TCP takes at most 10 s
    /// for each address of the host, and the handshake of TLS as long again.
    ///
    /// # Errors
    /// [`Error::Io`]; with TLS `Error::Handshake`, when the destination can't prove who it is, or refuses this end already. What
    /// it thinks of this end's certificate is heard by the first that is read from the stream. Nothing is open then.
    pub fn connect(&self) -> Result<Stream> {
        self.connect_until(&CancelToken::new())
    }

    /// As [`Connector::connect`], until `cancel` is used. The host's name is looked up, and hands are shaken, to the end all the
    /// same.
    ///
    /// # Errors
    /// [`Error::Cancelled`]; those of [`Connector::connect`].
    pub fn connect_until(&self, cancel: &CancelToken) -> Result<Stream> {
        let stream = self.open(cancel)?;
        #[cfg(feature = "tls")]
        if let Some((client, host)) = &self.tls {
            return TlsStream::connect(stream, client, host.clone(), &self.address);
        }
        Ok(stream)
    }

    fn open(&self, cancel: &CancelToken) -> Result<Stream> {
        let fail = |cause| Error::io(format!("connect to {}", self.address), cause);
        match &self.address {
            Address::Tcp { host, port } => match tcp(host, *port, cancel) {
                Err(_) if cancel.is_cancelled() => Err(Error::Cancelled),
                connected => connected.map_err(fail),
            },
            Address::Unix(path) => UnixStream::connect(path).map(Stream::Unix).map_err(fail),
            Address::Fd(fd) => Stream::inherited(*fd).map_err(fail),
            Address::File(path) => file(path)
                .map(Stream::File)
                .map_err(|cause| Error::io(format!("create {}", self.address), cause)),
        }
    }
}

/// The first of the host's addresses that takes a connection.
fn tcp(host: &str, port: u16, cancel: &CancelToken) -> io::Result<Stream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for target in (host, port).to_socket_addrs()? {
        match tcp_to(target, cancel) {
            Ok(tcp) => return Stream::tcp(tcp),
            Err(cause) => last = cause,
        }
        if cancel.is_cancelled() {
            break;
        }
    }
    Err(last)
}

/// As `TcpStream::connect_timeout`, which nothing calls off.
fn tcp_to(target: SocketAddr, cancel: &CancelToken) -> io::Result<TcpStream> {
    let family = match target {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    let end = Instant::now() + CONNECT;
    match start(&socket, &target) {
        Ok(()) => {}
        Err(Errno::INPROGRESS) => {
            let tick = Timespec {
                tv_sec: 0,
                tv_nsec: TICK.subsec_nanos().into(),
            };
            loop {
                let mut fds = [PollFd::new(&socket, PollFlags::OUT)];
                match poll(&mut fds, Some(&tick)) {
                    Ok(0) | Err(Errno::INTR) => {}
                    Ok(_) => break,
                    Err(cause) => return Err(cause.into()),
                }
                if cancel.is_cancelled() || Instant::now() >= end {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            sockopt::socket_error(&socket)??;
        }
        Err(cause) => return Err(cause.into()),
    }
    ioctl_fionbio(&socket, false)?;
    Ok(socket.into())
}

/// One that takes whatever is written to it: who writes to a pipe waits for its reader, and nothing calls that off.
fn file(path: &Path) -> io::Result<File> {
    let opened = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path);
    let file = match opened {
        // A pipe that nobody reads, or a socket.
        Err(cause) if Errno::from_io_error(&cause) == Some(Errno::NXIO) => {
            return Err(no_file());
        }
        opened => opened?,
    };
    is_file(&file.metadata()?)?;
    Ok(file)
}

/// Of what stands behind a path: whether nobody waits for another one when it is opened, read or written.
pub(crate) fn is_file(what: &Metadata) -> io::Result<()> {
    let kind = what.file_type();
    if kind.is_fifo() || kind.is_socket() {
        return Err(no_file());
    }
    Ok(())
}

fn no_file() -> io::Error {
    let text = "it is a pipe or a socket, and no file";
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

/// One connection to `address`: [`Connector::connect`] in short.
///
/// # Errors
/// As there.
pub fn connect(address: &Address) -> Result<Stream> {
    Connector::new(address.clone()).connect()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use rustix::net::sockopt;

    use super::*;
    use crate::Listener;

    #[test]
    fn an_inherited_socket_is_used_and_left_open() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let connector = Connector::new(Address::Fd(ours.as_raw_fd()));
        for text in [b"one", b"two"] {
            connector.connect().unwrap().write(text, false).unwrap();
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

    #[test]
    fn a_pipe_is_no_file_whether_anybody_reads_it_or_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        let (kind, mode) = (FileType::Fifo, Mode::RUSR | Mode::WUSR);
        mknodat(CWD, &path, kind, mode, 0).unwrap();
        let refused = || {
            let error = connect(&Address::File(path.clone())).unwrap_err();
            let text = error.to_string();
            assert!(text.contains("it is a pipe"), "{text}");
        };
        refused();
        let flags = OFlags::RDONLY | OFlags::NONBLOCK;
        let _reader = rustix::fs::open(&path, flags, Mode::empty()).unwrap();
        refused();
    }

    #[test]
    fn a_host_that_does_not_answer_is_left_when_it_is_called_off() {
        let flags = SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
        rustix::net::bind(&socket, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        // Room for one who is not accepted; who comes after that hears nothing.
        rustix::net::listen(&socket, 0).unwrap();
        let listener = std::net::TcpListener::from(socket);
        let target = listener.local_addr().unwrap();
        let soon = Duration::from_millis(200);
        let full: Vec<_> = std::iter::from_fn(|| TcpStream::connect_timeout(&target, soon).ok())
            .take(16)
            .collect();
        assert!((1..16).contains(&full.len()), "{}", full.len());
        let cancel = CancelToken::new();
        cancel.cancel();
        let connector = Connector::new(format!("tcp:{target}").parse().unwrap());
        let ended = connector.connect_until(&cancel);
        assert!(matches!(ended, Err(Error::Cancelled)), "{ended:?}");
    }

    #[test]
    fn a_host_that_vanishes_is_noticed_at_both_ends() {
        let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let address = format!("tcp:{}", listener.local_addr().unwrap());
        let near = connect(&address.parse().unwrap()).unwrap();
        for end in [near, listener.accept().unwrap()] {
            assert!(sockopt::tcp_nodelay(&end).unwrap());
            assert!(sockopt::socket_keepalive(&end).unwrap());
            assert_eq!(sockopt::tcp_keepidle(&end).unwrap().as_secs(), 10);
            assert_eq!(sockopt::tcp_keepintvl(&end).unwrap().as_secs(), 5);
            assert_eq!(sockopt::tcp_keepcnt(&end).unwrap(), 3);
            assert_eq!(sockopt::tcp_user_timeout(&end).unwrap(), 30_000);
        }
    }
}
