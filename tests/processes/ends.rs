//! The ends of a connection that a proxy stands between. With TLS it has keys of the ends' own CA, so it reads what goes
//! by, and breaks it where it likes.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig};

/// Bytes of a frame's header, and where its two lengths stand.
const HEADER: usize = 28;
const LENGTHS: usize = 16;

/// What the ends of a line encipher with.
pub enum Cipher {
    None,
    /// TLS, with what is in this directory.
    Tls(PathBuf),
}

/// One end; clones are handles on the same one.
#[derive(Clone)]
pub struct End {
    socket: Arc<UnixStream>,
    tls: Option<Arc<Mutex<Connection>>>,
}

impl Cipher {
    /// The source's and the destination's end of a connection.
    pub fn ends(&self, near: UnixStream, far: UnixStream) -> io::Result<(End, End)> {
        let dir = match self {
            Self::None => return Ok((End::new(near, None)?, End::new(far, None)?)),
            Self::Tls(dir) => dir,
        };
        let own = |role: &str| {
            let chain = CertificateDer::from_pem_file(dir.join(format!("{role}-cert.pem")));
            let key = PrivateKeyDer::from_pem_file(dir.join(format!("{role}-key.pem")));
            (vec![chain.unwrap()], key.unwrap())
        };
        let mut roots = RootCertStore::empty();
        let ca = CertificateDer::from_pem_file(dir.join("ca-cert.pem")).unwrap();
        roots.add(ca).unwrap();
        let roots = Arc::new(roots);
        let clients = WebPkiClientVerifier::builder(Arc::clone(&roots));
        let (chain, key) = own("server");
        let server = ServerConfig::builder()
            .with_client_cert_verifier(clients.build().unwrap())
            .with_single_cert(chain, key)
            .unwrap();
        let (chain, key) = own("client");
        let client = ClientConfig::builder()
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .unwrap();
        let near_tls = rustls::ServerConnection::new(Arc::new(server)).unwrap();
        let host = ServerName::try_from("localhost").unwrap();
        let far_tls = ClientConnection::new(Arc::new(client), host).unwrap();
        Ok((
            End::new(near, Some(near_tls.into()))?,
            End::new(far, Some(far_tls.into()))?,
        ))
    }
}

impl End {
    fn new(mut socket: UnixStream, tls: Option<Connection>) -> io::Result<Self> {
        let tls = match tls {
            None => None,
            Some(mut tls) => {
                while tls.is_handshaking() {
                    tls.complete_io(&mut socket)?;
                }
                tls.set_buffer_limit(None);
                Some(Arc::new(Mutex::new(tls)))
            }
        };
        Ok(Self {
            socket: socket.into(),
            tls,
        })
    }

    /// The next frame, all of it, with the descriptor that came along.
    pub fn frame(&self) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
        let mut frame = vec![0; HEADER];
        let mut file = None;
        let mut got = 0;
        if self.tls.is_none() {
            (got, file) = self.begin(&mut frame)?;
        }
        self.fill(&mut frame[got..])?;
        let length = |at| u32::from_le_bytes(std::array::from_fn(|n| frame[at + n])) as usize;
        let rest = length(LENGTHS) + length(LENGTHS + 4);
        frame.resize(HEADER + rest, 0);
        self.fill(&mut frame[HEADER..])?;
        Ok((frame, file))
    }

    /// The first bytes of a frame, and the descriptor that came along.
    fn begin(&self, frame: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut pieces = [IoSliceMut::new(frame)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = recvmsg(&*self.socket, &mut pieces, &mut control, flags)?.bytes;
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let file = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut files) => files.next(),
            _ => None,
        });
        Ok((got, file))
    }

    fn fill(&self, mut bytes: &mut [u8]) -> io::Result<()> {
        let Some(tls) = &self.tls else {
            return (&*self.socket).read_exact(bytes);
        };
        while !bytes.is_empty() {
            match tls.lock().unwrap().reader().read(bytes) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => {
                    bytes = &mut bytes[read..];
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            // Waited for without the lock: the other direction ciphers meanwhile.
            let mut sealed = [0; 8192];
            let got = (&*self.socket).read(&mut sealed)?;
            let mut sealed = &sealed[..got];
            let mut tls = tls.lock().unwrap();
            loop {
                tls.read_tls(&mut sealed)?;
                tls.process_new_packets().map_err(io::Error::other)?;
                if sealed.is_empty() {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Writes bytes of a frame; its descriptor goes along with the first one.
    pub fn write(&self, bytes: &[u8], file: &mut Option<OwnedFd>) -> io::Result<()> {
        let mut to = &*self.socket;
        if let Some(tls) = &self.tls {
            let sealed = sealed(&mut tls.lock().unwrap(), |tls| {
                tls.writer().write_all(bytes)
            })?;
            return to.write_all(&sealed);
        }
        let mut sent = 0;
        if !bytes.is_empty()
            && let Some(file) = file.take()
        {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let files = [file.as_fd()];
            assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
            let pieces = [IoSlice::new(bytes)];
            sent = sendmsg(to, &pieces, &mut control, SendFlags::NOSIGNAL)?;
        }
        to.write_all(&bytes[sent..])
    }

    /// Ends it; the other side hears a goodbye only where the other direction may go on.
    pub fn shutdown(&self, how: Shutdown) {
        if let (Some(tls), Shutdown::Write) = (&self.tls, how) {
            let goodbye = sealed(&mut tls.lock().unwrap(), |tls| {
                tls.send_close_notify();
                Ok(())
            });
            let _ = goodbye.and_then(|goodbye| (&*self.socket).write_all(&goodbye));
        }
        let _ = self.socket.shutdown(how);
    }
}

/// What has to be written after `say`.
fn sealed(
    tls: &mut Connection,
    say: impl FnOnce(&mut Connection) -> io::Result<()>,
) -> io::Result<Vec<u8>> {
    let mut sealed = Vec::new();
    say(tls)?;
    while tls.wants_write() {
        tls.write_tls(&mut sealed)?;
    }
    Ok(sealed)
}
