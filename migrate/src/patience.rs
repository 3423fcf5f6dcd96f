//! How long either end waits, and how it is called off.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

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
