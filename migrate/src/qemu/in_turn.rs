//! What several threads use in turn.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// A lock that nobody is overtaken at.
///
/// A lane asks for its connection again as soon as it has let go of it, and a mutex lets it have it. A full sync would wait
/// there for packet after packet, while QEMU reads none of the connections where the sync has come through.
pub(crate) struct InTurn<T> {
    /// Held by whoever is next.
    next: Mutex<()>,
    what: Mutex<T>,
}

impl<T> InTurn<T> {
    pub(crate) const fn new(what: T) -> Self {
        Self {
            next: Mutex::new(()),
            what: Mutex::new(what),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        let _next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        self.what.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn whoever_waits_comes_before_whoever_asks_again() {
        for _ in 0..100 {
            let connection = InTurn::new("of a lane");
            std::thread::scope(|scope| {
                let held = connection.lock();
                scope.spawn(|| *connection.lock() = "of a full sync");
                let end = Instant::now() + Duration::from_secs(30);
                while connection.next.try_lock().is_ok() {
                    assert!(Instant::now() < end, "nobody waits");
                    std::thread::yield_now();
                }
                drop(held);
                assert_eq!(*connection.lock(), "of a full sync");
            });
        }
    }
}
