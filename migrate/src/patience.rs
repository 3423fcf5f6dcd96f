//! How long either end waits, and how it is called off.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::{Error, Result};

/// How often a wait looks up: the longest time that a cancellation goes unnoticed.
pub(crate) const TICK: Duration = Duration::from_millis(50);

/// How long an end that has said its last word waits for the other one to read it.
pub(crate) const LINGER: Duration = Duration::from_secs(2);

/// Calls a migration off from another thread, or from a signal handler.
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// One that has not been used.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Calls the migration off. Without effect once the source has let go of the guest.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it was used.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Waits for the peer until it has been silent for `limit`.
pub(crate) fn silent_after(
    during: &'static str,
    limit: Duration,
) -> impl Fn(Duration) -> Result<()> {
    move |after| {
        if after >= limit {
            Err(Error::Silent { during, after })
        } else {
            Ok(())
        }
    }
}

/// Waits for the peer until `limit` has passed from now on, however much it says.
pub(crate) fn within(during: &'static str, limit: Duration) -> impl Fn(Duration) -> Result<()> {
    let begun = Instant::now();
    move |_| match begun.elapsed() {
        after if after >= limit => Err(Error::Silent { during, after }),
        _ => Ok(()),
    }
}

/// Peers that say what they have to say byte by byte.
#[cfg(test)]
pub(crate) mod drip {
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::Duration;

    use crate::wire::{Message, Outlet, Payload};

    /// More than a tick, so that bytes are waited for one by one; far less than [`LIMIT`].
    const PAUSE: Duration = Duration::from_millis(60);
    /// All bytes of a frame together take longer.
    pub(crate) const LIMIT: Duration = Duration::from_millis(500);

    /// The other end of a peer that says `message` so, until nobody listens.
    pub(crate) fn peer(message: &Message) -> UnixStream {
        let (near, far) = UnixStream::pair().unwrap();
        let frame = frame(message);
        thread::spawn(move || {
            let mut near = near;
            for byte in frame {
                if near.write_all(&[byte]).is_err() {
                    return;
                }
                thread::sleep(PAUSE);
            }
        });
        far
    }

    fn frame(message: &Message) -> Vec<u8> {
        let file = tempfile::NamedTempFile::new().unwrap();
        let outlet = file.reopen().unwrap().into();
        let sent = Outlet::new(outlet).send(message, &Payload::None, &|_| Ok(()));
        sent.unwrap();
        std::fs::read(file.path()).unwrap()
    }
}
