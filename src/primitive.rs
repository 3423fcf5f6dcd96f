//! The atomics and locks of the gate and of the writers: the standard library's, or loom's, which tries every order in which
//! threads may see them (`RUSTFLAGS="--cfg loom"`).

#[cfg(loom)]
pub(crate) use crate::loom_atomic::AtomicU32;
#[cfg(loom)]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, atomic::AtomicU32};
