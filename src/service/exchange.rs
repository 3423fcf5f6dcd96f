//! How an agent asks: over a socket, or however else its requests reach a session.

use std::fs::File;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::message::{Request, Response, receive_response, send_request};
use crate::{Error, Result};

/// Longest wait for an answer: stopping a guest has a limit of 10 s of its own.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection to a service. Dropped, the service hears that the agent is gone.
pub trait Exchange: Send {
    /// Asks, and awaits the answer, which may be a refusal ([`Response::Error`]), with the file that comes along.
    ///
    /// # Errors
    /// [`Error::Socket`]: no answer came, and whether the service has heard the request is unknown. The connection is
    /// over then: nothing that is asked later is heard, or an answer that comes late would be taken for the next one.
    fn ask(&mut self, request: &Request) -> Result<(Response, Option<File>)>;
}

/// A connection over a service's Unix socket.
#[derive(Debug)]
pub struct SocketExchange {
    stream: UnixStream,
    path: PathBuf,
}

impl SocketExchange {
    /// Connects to the service at `path`.
    ///
    /// # Errors
    /// [`Error::Socket`] when nobody serves there.
    pub fn connect(path: &Path) -> Result<Self> {
        let fail = |source| Error::Socket {
            path: path.to_path_buf(),
            source,
        };
        let stream = UnixStream::connect(path).map_err(fail)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(fail)?;
        stream.set_write_timeout(Some(PATIENCE)).map_err(fail)?;
        Ok(Self {
            stream,
            path: path.to_path_buf(),
        })
    }
}

impl Exchange for SocketExchange {
    fn ask(&mut self, request: &Request) -> Result<(Response, Option<File>)> {
        // A service that refuses says why before it hangs up, so a failed send is followed by a look for its words.
        let sent = send_request(&mut self.stream, request);
        let answer = receive_response(&mut self.stream);
        match (sent, answer) {
            (Ok(()), Ok((response, fd))) => Ok((response, fd.map(File::from))),
            (Err(_), Ok((response @ Response::Error(_), _))) => Ok((response, None)),
            (Err(source), _) | (Ok(()), Err(source)) => {
                let _ = self.stream.shutdown(Shutdown::Both);
                Err(Error::Socket {
                    path: self.path.clone(),
                    source,
                })
            }
        }
    }
}
