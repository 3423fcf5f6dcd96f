//! Loom's `AtomicU32`, which tries more orders than loom does by itself, and none that the memory model forbids.
//!
//! Loom looks for orders to try only where an access meets the last one of its object. A thread that loads and then stores
//! meets its own load, and the loads of others before it are never tried behind the store. So each access comes with a write
//! to a second atomic beside the first: those meet each other, in every order. They order nothing else.

use std::ops::Deref;

use loom::sync::atomic::{self, Ordering};

#[derive(Debug)]
pub struct AtomicU32 {
    value: atomic::AtomicU32,
    accesses: atomic::AtomicU32,
}

impl AtomicU32 {
    pub fn new(value: u32) -> Self {
        let atomic = Self {
            value: atomic::AtomicU32::new(value),
            accesses: atomic::AtomicU32::new(0),
        };
        // To a sequentially consistent load loom hides what an older store wrote only if that was sequentially consistent too.
        // A constructor's is not.
        atomic.value.store(value, Ordering::SeqCst);
        atomic
    }
}

impl Default for AtomicU32 {
    fn default() -> Self {
        Self::new(0)
    }
}

/// Each access goes through here.
impl Deref for AtomicU32 {
    type Target = atomic::AtomicU32;

    fn deref(&self) -> &atomic::AtomicU32 {
        self.accesses.fetch_add(1, Ordering::Relaxed);
        &self.value
    }
}
