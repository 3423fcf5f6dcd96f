//! Mutual TLS 1.3 for the stream.
//!
//! Both ends show a certificate and verify the other's against one CA. There is no fall back to plaintext, no older
//! version and no resumption. One directory holds what an end needs, by the names that Cloud Hypervisor uses:
//!
//! | file | who needs it |
//! |---|---|
//! | `ca-cert.pem` | both: the CA that has signed the other end's certificate |
//! | `server-cert.pem`, `server-key.pem` | the destination |
//! | `client-cert.pem`, `client-key.pem` | the source |
//!
//! A server's certificate is made out to the host in `tcp:HOST:PORT`, a name or an IP address; for `unix:` and `fd:` to
//! `localhost`.
//!
//! In TLS 1.3 the source is done with its part before the destination has looked at its certificate: a source that is
//! turned away hears of it by the first thing that it reads, and the error says why.

mod config;
mod explain;
mod handshakes;
mod session;
mod stream;
#[cfg(test)]
mod tests;

pub use config::{TlsClient, TlsServer};
pub(crate) use handshakes::Handshakes;
pub use stream::TlsStream;
