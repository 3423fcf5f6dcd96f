//! The VMM's own writers of guest memory, counted so that the last harvest can wait for them.

#[cfg(all(loom, test))]
mod loom_tests;

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use gleaner_bitmap::mutant::{self, Mutant};

use crate::primitive::{Condvar, Mutex, MutexGuard};
use crate::{Error, Result};

/// Counts the VMM's writers. A write and its mark in the block's log happen under one [`Writing`]; the last harvest of a
/// switchover comes after [`Writers::quiet`], so it finds every mark.
#[derive(Clone, Debug, Default)]
pub struct Writers(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    writing: u64,
    quiet: bool,
}

/// Somebody of the VMM's is writing guest memory.
#[derive(Debug)]
#[must_use = "writes are only covered while it lives"]
pub struct Writing(Arc<Shared>);

/// Nobody of the VMM's writes guest memory until this is dropped.
#[derive(Debug)]
#[must_use = "writers go on when it is dropped"]
pub struct QuietWriters {
    shared: Arc<Shared>,
    /// Nor afterwards.
    for_good: bool,
}

impl QuietWriters {
    /// Keeps writers out for good: the guest runs elsewhere.
    pub(crate) fn keep(mut self) {
        self.for_good = true;
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done`, or `deadline`.
    fn wait_until<'a>(
        &self,
        deadline: Instant,
        mut state: MutexGuard<'a, State>,
        done: fn(&State) -> bool,
    ) -> MutexGuard<'a, State> {
        while !done(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state
    }
}

impl Writers {
    /// Begins to write; waits while writers are quiet. Don't hold it across anything that waits for a migration.
    pub fn enter(&self) -> Writing {
        let mut state = self.0.lock();
        while state.quiet {
            state = self.0.wait(state);
        }
        state.writing += 1;
        Writing(Arc::clone(&self.0))
    }

    /// Begins to write, unless writers are quiet: for a thread that has to look at something else meanwhile, such as
    /// whether it is to end.
    #[must_use]
    pub fn try_enter(&self) -> Option<Writing> {
        let mut state = self.0.lock();
        if state.quiet {
            return None;
        }
        state.writing += 1;
        Some(Writing(Arc::clone(&self.0)))
    }

    /// Lets nobody in any more and waits for those inside, for `limit` at most. vCPU threads have to be parked before: their
    /// exit handlers write too.
    ///
    /// # Errors
    /// [`Error::WritersBusy`]: somebody holds on to a token, perhaps while waiting for who calls this. Writers go on.
    pub fn quiet(&self, limit: Duration) -> Result<QuietWriters> {
        let deadline = Instant::now() + limit;
        let mut state = self.0.wait_until(deadline, self.0.lock(), |s| !s.quiet);
        if state.quiet {
            return Err(Error::WritersBusy(limit));
        }
        state.quiet = true;
        let awaited = |s: &State| s.writing == 0 || mutant::is_planted(Mutant::WritersNotAwaited);
        let state = self.0.wait_until(deadline, state, awaited);
        let unfinished = !awaited(&state);
        drop(state);
        // Dropped on the error's path, it lets writers go on.
        let quiet = QuietWriters {
            shared: Arc::clone(&self.0),
            for_good: false,
        };
        if unfinished {
            return Err(Error::WritersBusy(limit));
        }
        Ok(quiet)
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.writing -= 1;
        // Who waits for a writer has made it quiet before. Waking nobody would still be a system call, at every exit.
        let awaited = state.quiet && state.writing == 0;
        drop(state);
        if awaited {
            self.0.changed.notify_all();
        }
    }
}

impl Drop for QuietWriters {
    fn drop(&mut self) {
        if !self.for_good {
            self.shared.lock().quiet = false;
            self.shared.changed.notify_all();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn a_writer_that_does_not_finish_makes_quiet_fail_and_keeps_nobody_out() {
        let writers = Writers::default();
        let _stuck = writers.enter();
        assert!(matches!(
            writers.quiet(Duration::ZERO),
            Err(Error::WritersBusy(_))
        ));
        assert!(writers.try_enter().is_some());
    }

    #[test]
    fn quiet_waits_for_an_unfinished_write_and_keeps_new_ones_out() {
        let writers = Writers::default();
        let (finished, entered) = (AtomicBool::new(false), AtomicBool::new(false));
        std::thread::scope(|s| {
            let writing = writers.enter();
            let quiet = s.spawn(|| {
                let quiet = writers.quiet(Duration::from_secs(60)).unwrap();
                assert!(
                    finished.load(Ordering::SeqCst),
                    "quiet with a write unfinished"
                );
                quiet
            });
            while !writers.0.lock().quiet {
                std::thread::yield_now();
            }
            let late = s.spawn(|| {
                let _writing = writers.enter();
                entered.store(true, Ordering::SeqCst);
            });
            finished.store(true, Ordering::SeqCst);
            drop(writing);
            let quiet = quiet.join().unwrap();
            assert!(!entered.load(Ordering::SeqCst), "a writer got in");
            drop(quiet);
            late.join().unwrap();
        });
        assert!(entered.load(Ordering::SeqCst));
    }
}
