//! What the tests under `--cfg loom` share.
#![allow(unsafe_code)] // one cell for several threads

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use loom::cell::UnsafeCell;
use loom::model::Builder;

/// Guest memory or its slots, for those who must not get at it at the same time: loom ends a test in which nothing orders
/// one's writes and another's accesses.
#[derive(Clone, Debug)]
pub struct Memory(Arc<UnsafeCell<()>>);

// SAFETY: there is nothing in the cell; loom is told of each access, and panics when two race.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    pub fn new() -> Self {
        Self(Arc::new(UnsafeCell::new(())))
    }

    pub fn read(&self) {
        self.0.with(|_| ());
    }

    pub fn write(&self) {
        self.0.with_mut(|_| ());
    }
}

/// Runs `f` in every order that the memory model allows, with at most `preemptions` threads suspended where they could go
/// on; prints how many there were.
pub fn explore(name: &str, preemptions: usize, f: impl Fn() + Send + Sync + 'static) {
    let executions = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&executions);
    let mut builder = Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(move || {
        counter.fetch_add(1, Ordering::Relaxed);
        f();
    });
    println!("{name}: {} executions", executions.load(Ordering::Relaxed));
}
