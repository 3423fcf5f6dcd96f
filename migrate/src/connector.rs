//! How the source reaches the destination, as often as it needs to.

use std::fs::{File, OpenOptions};
use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::{Address, Error, Result, Stream};
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
        let stream = self.open()?;
        #[cfg(feature = "tls")]
        if let Some((client, host)) = &self.tls {
            return TlsStream::connect(stream, client, host.clone(), &self.address);
        }
        Ok(stream)
    }

    fn open(&self) -> Result<Stream> {
        let fail = |cause| Error::io(format!("connect to {}", self.address), cause);
        match &self.address {
            Address::Tcp { host, port } => tcp(host, *port).map_err(fail),
            Address::Unix(path) => UnixStream::connect(path).map(Stream::Unix).map_err(fail),
            Address::Fd(fd) => Stream::inherited(*fd).map_err(fail),
            Address::File(path) => file(path)
                .map(Stream::File)
                .map_err(|cause| Error::io(format!("create {}", self.address), cause)),
        }
    }
}

/// The first of the host's addresses that takes a connection.
fn tcp(host: &str, port: u16) -> io::Result<Stream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for target in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&target, CONNECT) {
            Ok(tcp) => return Stream::tcp(tcp),
            Err(cause) => last = cause,
        }
    }
    Err(last)
}

/// One that takes whatever is written to it: who writes to a pipe waits for its reader, and nothing calls that off.
fn file(path: &Path) -> io::Result<File> {
    let pipe = || {
        let text = "it is a pipe or a socket, and no file";
        io::Error::new(io::ErrorKind::InvalidInput, text)
    };
    let opened = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path);
    let file = match opened {
        // A pipe that nobody reads, or a socket.
        Err(cause) if Errno::from_io_error(&cause) == Some(Errno::NXIO) => return Err(pipe()),
        opened => opened?,
    };
    let kind = file.metadata()?.file_type();
    if kind.is_fifo() {
        return Err(pipe());
    }
    Ok(file)
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
