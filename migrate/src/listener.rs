//! Where the destination waits for the source.

use std::fs::{self, File};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::net::sockopt;

use crate::connector;
use crate::newcomers::{self, Newcomers};
use crate::{Address, CancelToken, Error, Result, Stream, raw};
#[cfg(feature = "tls")]
use crate::{TlsServer, tls::Handshakes};

/// Waits for connections.
#[derive(Debug)]
pub struct Listener {
    kind: Kind,
    newcomers: Newcomers,
    /// Kept for its drop.
    _file: Option<Owned>,
    #[cfg(feature = "tls")]
    tls: Option<Handshakes>,
}

#[derive(Debug)]
enum Kind {
    Tcp(TcpListener),
    Unix(UnixListener),
    /// An inherited descriptor that is connected already.
    Connected(RawFd),
    File(PathBuf),
}

/// A socket file of ours, removed on drop unless somebody put another in its place.
#[derive(Debug)]
struct Owned {
    path: PathBuf,
    identity: (u64, u64),
}

impl Drop for Owned {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|m| (m.dev(), m.ino()))
}

impl Listener {
    /// Starts to listen. A Unix socket gets mode 0600; a socket file that nobody listens on any more is replaced. A file may
    /// not be a pipe, whose opening waits for its writer.
    ///
    /// # Errors
    /// [`Error::SocketInUse`], [`Error::NotASocket`], [`Error::Io`]: nothing was changed.
    pub fn bind(address: &Address) -> Result<Self> {
        let fail = |cause| Error::io(format!("listen on {address}"), cause);
        let mut file = None;
        let kind = match address {
            Address::Tcp { host, port } => {
                Kind::Tcp(TcpListener::bind((host.as_str(), *port)).map_err(fail)?)
            }
            Address::Unix(path) => {
                clear_stale(path)?;
                let socket = UnixListener::bind(path).map_err(fail)?;
                let owned = Owned {
                    identity: identity(path).map_err(fail)?,
                    path: path.clone(),
                };
                fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(fail)?;
                file = Some(owned);
                Kind::Unix(socket)
            }
            Address::Fd(fd) => inherited(*fd).map_err(fail)?,
            Address::File(path) => {
                // Says now what is wrong with it; opened when it is to be read.
                fs::metadata(path)
                    .and_then(|what| connector::is_file(&what))
                    .map_err(fail)?;
                Kind::File(path.clone())
            }
        };
        Ok(Self {
            kind,
            newcomers: Newcomers::default(),
            _file: file,
            #[cfg(feature = "tls")]
            tls: None,
        })
    }

    /// With TLS from now on, and never without: a connection is accepted when its handshake is done and the client's
    /// certificate is verified.
    ///
    /// Handshakes go on while somebody accepts, side by side. Each may take 5 s; at most 32 are under way, so however
    /// many clients say nothing, others wait for 5 s at most each time, and calling it off is noticed at once. One that
    /// fails is a warning in the log, both ends' reason in it, and the listener goes on listening. A connected
    /// descriptor has all the time that it wants, and its failure is the error.
    ///
    /// # Errors
    /// [`Error::Address`] for a file, which has no other end.
    #[cfg(feature = "tls")]
    pub fn tls(mut self, server: TlsServer) -> Result<Self> {
        if let Kind::File(path) = &self.kind {
            // Says why.
            crate::TlsClient::host(&Address::File(path.clone()))?;
        }
        self.tls = Some(Handshakes::new(server));
        Ok(self)
    }

    /// The next connection. For a file and for a connected descriptor: the same one each time.
    ///
    /// # Errors
    /// [`Error::Io`]; the listener goes on listening.
    pub fn accept(&self) -> Result<Stream> {
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.tls {
            let never = CancelToken::new();
            loop {
                if let Some(stream) = tls.next(self.waiting(), &|| self.take(), &never, None)? {
                    return Ok(stream);
                }
            }
        }
        self.take()
    }

    /// The next connection as it is.
    fn take(&self) -> Result<Stream> {
        match &self.kind {
            Kind::Tcp(socket) => socket.accept().and_then(|(tcp, _)| Stream::tcp(tcp)),
            Kind::Unix(socket) => socket.accept().map(|(unix, _)| Stream::Unix(unix)),
            Kind::Connected(fd) => Stream::inherited(*fd),
            Kind::File(path) => File::open(path).map(Stream::File).map_err(|cause| {
                io::Error::new(cause.kind(), format!("{}: {cause}", path.display()))
            }),
        }
        .map_err(|cause| Error::io("accept a connection", cause))
    }

    /// As [`Listener::accept`], until `cancel` is used; `None` when none has come by `end`. Of a socket's connections the
    /// next one that says something, or hangs up: those that do neither are waited for side by side, for 5 s each, and
    /// are a warning in the log then. At most 32 are waited for at once.
    ///
    /// # Errors
    /// [`Error::Cancelled`]; those of [`Listener::accept`].
    pub fn accept_until(
        &self,
        cancel: &CancelToken,
        end: Option<Instant>,
    ) -> Result<Option<Stream>> {
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.tls {
            return tls.next(self.waiting(), &|| self.take(), cancel, end);
        }
        let Some(waiting) = self.waiting() else {
            return self.take().map(Some);
        };
        self.newcomers.next(waiting, &|| self.take(), cancel, end)
    }

    /// As [`Listener::accept`], until `cancel` is used: for a protocol in which whoever listens speaks first.
    ///
    /// # Errors
    /// [`Error::Cancelled`]; those of [`Listener::accept`].
    pub fn accept_to_greet(&self, cancel: &CancelToken) -> Result<Stream> {
        if let Some(waiting) = self.waiting() {
            newcomers::wait(waiting, cancel)?;
        }
        self.accept()
    }

    /// What is ready when a connection has come, where one has to come.
    fn waiting(&self) -> Option<BorrowedFd<'_>> {
        match &self.kind {
            Kind::Tcp(socket) => Some(socket.as_fd()),
            Kind::Unix(socket) => Some(socket.as_fd()),
            Kind::Connected(_) | Kind::File(_) => None,
        }
    }

    /// The TCP address it listens on, the port chosen by the system in place of port 0. `None` unless it is TCP.
    #[must_use]
    pub fn local_addr(&self) -> Option<SocketAddr> {
        match &self.kind {
            Kind::Tcp(socket) => socket.local_addr().ok(),
            _ => None,
        }
    }

    /// Whether more than one connection can come.
    #[must_use]
    pub const fn is_socket(&self) -> bool {
        matches!(self.kind, Kind::Tcp(_) | Kind::Unix(_))
    }
}

fn clear_stale(path: &Path) -> Result<()> {
    let meta = match fs::symlink_metadata(path) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(cause) => return Err(Error::io(format!("look at {}", path.display()), cause)),
        Ok(meta) => meta,
    };
    if !meta.file_type().is_socket() {
        return Err(Error::NotASocket {
            path: path.to_owned(),
        });
    }
    match UnixStream::connect(path) {
        // Only a refused connection proves that nobody listens.
        Err(cause) if cause.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path)
            .map_err(|cause| {
                Error::io(format!("remove the stale socket {}", path.display()), cause)
            }),
        _ => Err(Error::SocketInUse {
            path: path.to_owned(),
        }),
    }
}

fn inherited(fd: RawFd) -> io::Result<Kind> {
    let owned = raw::inherited(fd)?;
    if sockopt::socket_acceptconn(&owned).unwrap_or(false) {
        return Ok(match sockopt::socket_domain(&owned)? {
            rustix::net::AddressFamily::UNIX => Kind::Unix(owned.into()),
            _ => Kind::Tcp(owned.into()),
        });
    }
    // Says now what is wrong with the descriptor, not when the migration is due.
    Stream::inherited(owned.as_raw_fd()).map(|_| Kind::Connected(fd))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unix(path: &Path) -> Address {
        Address::Unix(path.to_owned())
    }

    #[test]
    fn a_live_listener_is_respected_and_its_file_goes_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = Listener::bind(&unix(&path)).unwrap();
        let message = Listener::bind(&unix(&path)).unwrap_err().to_string();
        assert!(message.contains("socket path in use"), "{message}");
        crate::connect(&unix(&path)).unwrap();
        drop(first);
        assert!(!path.exists());
    }

    #[test]
    fn a_pipe_is_no_file_to_wait_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR);
        rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, 0).unwrap();
        let error = Listener::bind(&Address::File(path)).unwrap_err();
        assert!(error.to_string().contains("it is a pipe"), "{error}");
    }

    #[test]
    fn a_stale_socket_is_replaced_but_no_other_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap()); // std leaves the file behind
        assert!(path.exists());
        drop(Listener::bind(&unix(&path)).unwrap());
        fs::write(&path, "mine").unwrap();
        assert!(matches!(
            Listener::bind(&unix(&path)),
            Err(Error::NotASocket { .. })
        ));
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }

    #[test]
    fn a_file_that_took_the_place_of_the_socket_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = Listener::bind(&unix(&path)).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "mine").unwrap();
        drop(listener);
        assert!(path.exists());
    }

    #[test]
    fn waiting_for_a_connection_can_be_called_off() {
        let dir = tempfile::tempdir().unwrap();
        let cancel = CancelToken::new();
        for address in [
            unix(&dir.path().join("s")),
            "tcp:127.0.0.1:0".parse().unwrap(),
        ] {
            let listener = Listener::bind(&address).unwrap();
            std::thread::scope(|scope| {
                let waiting = scope.spawn(|| listener.accept_until(&cancel, None));
                cancel.cancel();
                assert!(matches!(waiting.join().unwrap(), Err(Error::Cancelled)));
            });
        }
    }

    #[test]
    fn an_inherited_listener_accepts() {
        let ours = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = ours.local_addr().unwrap().port();
        let listener = Listener::bind(&Address::Fd(ours.as_raw_fd())).unwrap();
        let _client = crate::connect(&Address::Tcp {
            host: "127.0.0.1".into(),
            port,
        })
        .unwrap();
        assert!(matches!(listener.accept().unwrap(), Stream::Tcp(_)));
    }
}
