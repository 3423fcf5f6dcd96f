//! Threads that a peer's connections ask for: where the system has none left, that is an error, and no panic. And what a
//! VMM's own code does in them, which may panic: nobody must wait for it then.

use std::thread::{Builder, Scope, panicking};

use crate::{Error, Result};

/// Done when it goes out of scope, by a panic too.
pub(crate) struct Finally<F: FnMut()>(pub(crate) F);

impl<F: FnMut()> Drop for Finally<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// What others are told, in a thread that panics. The panic itself is passed on by the scope.
pub(crate) fn panic_met() -> Option<Error> {
    panicking().then(|| Error::Memory {
        what: "or another part of the VMM failed",
        detail: "it panicked".into(),
    })
}

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
