//! Certificates and keys of one end, from a directory.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{
    ClientConfig, ClientConnection, Connection, RootCertStore, ServerConfig, ServerConnection,
};

use crate::{Address, Error, Result};

const CA: &str = "ca-cert.pem";
/// The most bytes that a file of certificates may have.
const MOST: u64 = 1 << 20;

type Started = std::result::Result<Connection, rustls::Error>;

/// What the source needs for TLS. Cheap to clone.
#[derive(Clone)]
pub struct TlsClient(Arc<ClientConfig>);

/// What the destination needs for TLS. Cheap to clone.
#[derive(Clone)]
pub struct TlsServer(Arc<ServerConfig>);

impl TlsClient {
    /// Reads `ca-cert.pem`, `client-cert.pem` and `client-key.pem` in `dir`.
    ///
    /// # Errors
    /// [`Error::Credentials`] names the file and what is wrong with it.
    pub fn load(dir: &Path) -> Result<Self> {
        let own = Own::load(dir, "client")?;
        let mut config = ClientConfig::builder_with_provider(own.provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| own.wrong(&error))?
            .with_root_certificates(own.roots.clone())
            .with_client_auth_cert(own.chain.clone(), own.key.clone_key())
            .map_err(|error| own.wrong(&error))?;
        config.resumption = Resumption::disabled();
        Ok(Self(Arc::new(config)))
    }

    pub(super) fn start(&self, host: ServerName<'static>) -> Started {
        ClientConnection::new(Arc::clone(&self.0), host).map(Into::into)
    }

    /// Whom the certificate of the end at `address` has to be made out to.
    pub(crate) fn host(address: &Address) -> Result<ServerName<'static>> {
        let refused = |problem| Error::Address {
            text: address.to_string(),
            problem,
        };
        let host = match address {
            Address::Tcp { host, .. } => host.clone(),
            Address::Unix(_) | Address::Fd(_) => "localhost".into(),
            Address::File(_) => {
                return Err(refused("TLS needs an other end, which a file has not"));
            }
        };
        ServerName::try_from(host)
            .map_err(|_| refused("TLS needs a DNS name or an IP address for the host"))
    }
}

impl TlsServer {
    /// Reads `ca-cert.pem`, `server-cert.pem` and `server-key.pem` in `dir`.
    ///
    /// # Errors
    /// [`Error::Credentials`] names the file and what is wrong with it.
    pub fn load(dir: &Path) -> Result<Self> {
        let own = Own::load(dir, "server")?;
        let roots = Arc::new(own.roots.clone());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, own.provider())
            .build()
            .map_err(|error| wrong(dir.join(CA), format!("is not usable: {error}")))?;
        let mut config = ServerConfig::builder_with_provider(own.provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| own.wrong(&error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(own.chain.clone(), own.key.clone_key())
            .map_err(|error| own.wrong(&error))?;
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Self(Arc::new(config)))
    }

    pub(super) fn start(&self) -> Started {
        ServerConnection::new(Arc::clone(&self.0)).map(Into::into)
    }
}

// Nothing of a key gets into a log.
impl fmt::Debug for TlsClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsClient")
    }
}

impl fmt::Debug for TlsServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsServer")
    }
}

/// What one end has of its own, and whom it trusts.
struct Own {
    roots: RootCertStore,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    key_path: PathBuf,
    cert_path: PathBuf,
}

impl Own {
    /// `role` is `client` or `server`.
    fn load(dir: &Path, role: &str) -> Result<Self> {
        let [ca, cert_path, key_path] = [
            CA.to_owned(),
            format!("{role}-cert.pem"),
            format!("{role}-key.pem"),
        ]
        .map(|name| dir.join(name));
        let mut roots = RootCertStore::empty();
        for root in certificates(&ca)? {
            roots.add(root).map_err(|error| {
                wrong(ca.clone(), format!("holds no usable certificate: {error}"))
            })?;
        }
        Ok(Self {
            roots,
            chain: certificates(&cert_path)?,
            key: PrivateKeyDer::from_pem_slice(&read(&key_path)?)
                .map_err(|error| not_pem(&key_path, "private key", &error))?,
            key_path,
            cert_path,
        })
    }

    fn provider(&self) -> Arc<rustls::crypto::CryptoProvider> {
        Arc::new(rustls::crypto::ring::default_provider())
    }

    /// Certificate and key, each whole, are no pair that can be used.
    fn wrong(&self, error: &rustls::Error) -> Error {
        match error {
            rustls::Error::InconsistentKeys(_) => wrong(
                self.key_path.clone(),
                format!(
                    "is not the key of {}: put the key there that this certificate was made for",
                    self.cert_path.display()
                ),
            ),
            rustls::Error::InvalidCertificate(why) => wrong(
                self.cert_path.clone(),
                format!("holds no usable certificate: {why}"),
            ),
            other => wrong(self.key_path.clone(), format!("is not usable: {other}")),
        }
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let bytes = read(path)?;
    let all: Vec<_> = CertificateDer::pem_slice_iter(&bytes)
        .collect::<std::result::Result<_, _>>()
        .map_err(|error| not_pem(path, "certificate", &error))?;
    if all.is_empty() {
        return Err(not_pem(path, "certificate", &pem::Error::NoItemsFound));
    }
    Ok(all)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let fail = |cause: io::Error| {
        let needed = "TLS needs ca-cert.pem, and of the destination server-cert.pem and server-key.pem, of the source \
                      client-cert.pem and client-key.pem";
        wrong(path.to_owned(), format!("can't be read: {cause}; {needed}"))
    };
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MOST + 1).read_to_end(&mut bytes))
        .map_err(fail)?;
    if bytes.len() as u64 > MOST {
        return Err(wrong(
            path.to_owned(),
            format!("is over {MOST} bytes: that is no certificate or key"),
        ));
    }
    Ok(bytes)
}

fn not_pem(path: &Path, what: &str, error: &pem::Error) -> Error {
    let problem = match error {
        pem::Error::NoItemsFound => format!("holds no {what}: put one there, in PEM form"),
        // Never the contents, which may be a key's.
        _ => format!("holds no whole {what} in PEM form: make it anew"),
    };
    wrong(path.to_owned(), problem)
}

const fn wrong(path: PathBuf, problem: String) -> Error {
    Error::Credentials { path, problem }
}
