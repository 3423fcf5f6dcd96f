//! How an agent asks: over a socket, or however else its requests reach a session.

use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use gleaner_migrate::CancelToken;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::message::{Request, Response, receive_response, send_request};
use crate::{Error, Result};

/// Longest wait for an answer: stopping a guest has a limit of 10 s of its own.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest wait for it when the migration was called off: whoever did so waits for the agent's end.
const CALLED_OFF: Duration = Duration::from_secs(1);
/// How often a wait looks whether it was.
const TICK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};

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
    cancel: CancelToken,
}

impl SocketExchange {
    /// Connects to the service at `path`. When `cancel` is used no answer is waited for longer than 1 s.
    ///
    /// # Errors
    /// [`Error::Socket`] when nobody serves there.
    pub fn connect(path: &Path, cancel: &CancelToken) -> Result<Self> {
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
            cancel: cancel.clone(),
        })
    }

    /// Returns when an answer begins to come.
    fn wait(&self) -> io::Result<()> {
        let start = Instant::now();
        let mut called_off = None;
        loop {
            let mut fds = [PollFd::new(&self.stream, PollFlags::IN)];
            match poll(&mut fds, Some(&TICK)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
            if self.cancel.is_cancelled() {
                let since = called_off.get_or_insert_with(Instant::now);
                if since.elapsed() >= CALLED_OFF {
                    let text = "cancelled, and the service does not answer";
                    return Err(io::Error::other(text));
                }
            }
            if start.elapsed() >= PATIENCE {
                let text = format!("no answer for {} s", PATIENCE.as_secs());
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
        }
    }
}

/// A service does not wait any longer than that for somebody to read its answer.
const UNREAD: Duration = Duration::from_secs(10);

/// In the words of whoever lost its guest after it had asked for so long.
fn gone(error: io::Error, asked: Duration) -> io::Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::UnexpectedEof => {
            let text = if asked < UNREAD {
                "the guest's service has gone".to_owned()
            } else {
                format!(
                    "the guest's service has gone, or has hung up because its answer was not read: {} s have passed since it was asked",
                    asked.as_secs()
                )
            };
            io::Error::new(error.kind(), text)
        }
        _ => error,
    }
}

impl Exchange for SocketExchange {
    fn ask(&mut self, request: &Request) -> Result<(Response, Option<File>)> {
        // A service that refuses says why before it hangs up, so a failed send is followed by a look for its words.
        let began = Instant::now();
        let sent = send_request(&mut self.stream, request);
        let answer = self
            .wait()
            .and_then(|()| receive_response(&mut self.stream));
        match (sent, answer) {
            (Ok(()), Ok((response, fd))) => Ok((response, fd.map(File::from))),
            (Err(_), Ok((response @ Response::Error(_), _))) => Ok((response, None)),
            // What was heard explains more than that nothing could be said.
            (_, Err(source)) | (Err(source), _) => {
                let _ = self.stream.shutdown(Shutdown::Both);
                Err(Error::Socket {
                    path: self.path.clone(),
                    source: gone(source, began.elapsed()),
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_did_not_read_for_long_may_have_been_hung_up_on() {
        let told = |seconds| {
            let cut = io::ErrorKind::UnexpectedEof.into();
            gone(cut, Duration::from_secs(seconds)).to_string()
        };
        assert_eq!(told(9), "the guest's service has gone");
        assert!(told(31).contains("was not read: 31 s"), "{}", told(31));
    }
}
