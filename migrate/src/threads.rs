//! Threads that a peer's connections ask for: where the system has none left, that is an error, and no panic.

use std::thread::{Builder, Scope};

use crate::{Error, Result};

/// Starts a thread that does `work`; `work` is dropped when there is none.
pub(crate) fn start<'scope>(
    scope: &'scope Scope<'scope, '_>,
    work: impl FnOnce() + Send + 'scope,
) -> Result<()> {
    match Builder::new().spawn_scoped(scope, work) {
        Ok(_) => Ok(()),
        Err(cause) => Err(Error::io("start a thread", cause)),
    }
}
