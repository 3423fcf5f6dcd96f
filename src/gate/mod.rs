//! The gate: what vCPU threads pass to enter `KVM_RUN`.
//!
//! Each vCPU thread holds a [`Seat`]. To enter `KVM_RUN` it says so in its own cache line and then looks at the gate's
//! word; whoever closes the gate sets the word and then looks at each seat. Both are sequentially consistent, so at least
//! one of them sees the other:
//!
//! ```text
//! vCPU thread                         who closes
//! seat.state = IN                     word |= CLOSED
//! word has CLOSED? -> back out        seat.state == IN? -> kick, wait for OUT
//! KVM_RUN                             every seat OUT: nobody is inside, nobody gets in
//! seat.state = OUT
//! word has CLOSED? -> wake the closer
//! ```
//!
//! A kick is `immediate_exit = 1` and then a signal. The signal alone is lost when it arrives just before `KVM_RUN`;
//! `immediate_exit` alone does not interrupt. Together they do: whichever comes too early, the other works.
//! The seat clears `immediate_exit` while it is out, before it looks at the word again: a stale one costs one turn, and a
//! kick that is cleared by mistake has set the word before, which the seat then sees.
//!
//! *Closing* is for slot transactions: all out of `KVM_RUN`, wherever else they are. *Stopping* is for the switchover:
//! all threads parked in [`Drained::serve`], with pending I/O completed. *Resting* is for throttling: one vCPU out for a
//! while, the others not.

#[cfg(all(loom, test))]
mod loom_tests;
mod parked;
mod rest;
mod seat;
mod signal;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use gleaner_ring::Kick;
pub use parked::{Drained, Parked, StoppedVcpus};
pub use seat::{RingFull, Seat, Turn};

use crate::primitive::{AtomicU32, Condvar, Mutex, MutexGuard};
use crate::{Error, Result};

/// A slot transaction is under way.
const CLOSED: u32 = 1;
/// The guest is to be stopped, or is.
const STOP: u32 = 2;
/// vCPU threads are to end.
const SHUTDOWN: u32 = 4;
/// Some vCPU may have to rest: each seat's `rests` says which.
const THROTTLED: u32 = 8;
/// What keeps a vCPU out of `KVM_RUN`.
const KEPT_OUT: u32 = CLOSED | STOP | SHUTDOWN | THROTTLED;

/// How long to wait for a vCPU to leave `KVM_RUN` before calling it an error: far longer than any kernel needs.
const KICK_LIMIT: Duration = Duration::from_secs(10);

const OUT: u32 = 0;
const IN: u32 = 1;

/// What a seat shares with the gate. On cache lines of its own: entering and leaving writes no line that another vCPU reads.
#[repr(align(128))]
#[derive(Debug)]
struct SeatState {
    state: AtomicU32,
    /// Not 0: the vCPU has to rest.
    rests: AtomicU32,
    vcpu: u64,
    kick: Box<dyn Kick>,
}

/// State under the gate's lock; changed only by who closes, stops or parks.
#[derive(Debug, Default)]
struct Inner {
    seats: Vec<Arc<SeatState>>,
    /// Ids of the vCPUs whose threads are parked.
    parked: Vec<u64>,
    /// vCPUs that have to rest, and until when.
    resting: BTreeMap<u64, Instant>,
    /// The gate stays closed for good.
    kept: bool,
    /// Whose state is wanted, and what they answered.
    saving: Vec<u64>,
    saved: Vec<(u64, std::result::Result<Vec<u8>, String>)>,
}

impl Inner {
    /// Seats whose vCPUs are run by threads, which park and answer.
    fn threads(&self) -> impl Iterator<Item = &SeatState> {
        let seats = self.seats.iter().map(|s| &**s);
        seats.filter(|s| !s.kick.is_threadless())
    }
}

/// The gate of one VM.
#[derive(Debug, Default)]
pub struct Gate {
    word: AtomicU32,
    inner: Mutex<Inner>,
    changed: Condvar,
    signal: i32,
}

/// All vCPUs are out of `KVM_RUN`, and stay out until this is dropped.
#[derive(Debug)]
pub struct Closed<'a> {
    gate: &'a Gate,
}

impl Gate {
    /// A gate that kicks with `signal`, whose handler it installs.
    pub(crate) fn new(signal: i32) -> Result<Self> {
        signal::install_handler(signal)?;
        Ok(Self {
            signal,
            ..Self::default()
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, inner: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
        self.changed
            .wait(inner)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes every vCPU that is inside leave `KVM_RUN`.
    fn kick_all(&self, inner: &Inner) {
        for seat in &inner.seats {
            seat.kick.set_immediate_exit(true);
            if seat.state.load(Ordering::SeqCst) == IN {
                seat.kick.interrupt();
                if seat.kick.is_threadless() {
                    seat.state.store(OUT, Ordering::SeqCst);
                }
            }
        }
    }

    /// Waits until `done`, or says which vCPU keeps it waiting.
    fn wait_until<'a>(
        &self,
        mut inner: MutexGuard<'a, Inner>,
        late: impl Fn(&Inner) -> Option<u64>,
    ) -> Result<MutexGuard<'a, Inner>> {
        let deadline = Instant::now() + KICK_LIMIT;
        loop {
            let Some(vcpu) = late(&inner) else {
                return Ok(inner);
            };
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return Err(Error::KickTimeout { vcpu });
            };
            inner = self
                .changed
                .wait_timeout(inner, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Closes the gate: on return every vCPU is out of `KVM_RUN`. One at a time; the tracker's lock sees to it.
    ///
    /// # Errors
    /// [`Error::KickTimeout`]; the gate is open again.
    pub(crate) fn close(&self) -> Result<Closed<'_>> {
        let inner = self.lock();
        self.word.fetch_or(CLOSED, Ordering::SeqCst);
        let closed = Closed { gate: self };
        self.kick_all(&inner);
        let inside = |inner: &Inner| {
            let seat = inner
                .seats
                .iter()
                .find(|s| s.state.load(Ordering::SeqCst) == IN);
            seat.map(|s| s.vcpu)
        };
        drop(self.wait_until(inner, inside)?);
        Ok(closed)
    }

    /// Says that it is closed, and is not: a bug to plant.
    pub(crate) const fn pretend_closed(&self) -> Closed<'_> {
        Closed { gate: self }
    }

    /// Opens the gate, and says when it was open: a thread that is woken may take the CPU from this one.
    fn open(&self) -> Instant {
        let inner = self.lock();
        if inner.kept || self.word.load(Ordering::SeqCst) & CLOSED == 0 {
            return Instant::now();
        }
        // Still closed, so all are out: no KVM_RUN is interrupted for a transaction that is over.
        for seat in &inner.seats {
            seat.kick.set_immediate_exit(false);
        }
        self.word.fetch_and(!CLOSED, Ordering::SeqCst);
        let opened = Instant::now();
        // Not under the lock, which each of those who wake takes first. They look at the word under it before they wait.
        drop(inner);
        self.changed.notify_all();
        opened
    }

    /// Ends all vCPU threads: every [`Seat::run`] returns [`Turn::Shutdown`] from now on.
    pub fn shutdown(&self) {
        let inner = self.lock();
        self.word.fetch_or(SHUTDOWN, Ordering::SeqCst);
        self.kick_all(&inner);
        self.changed.notify_all();
    }

    /// Stops the guest: on return every vCPU thread is parked. They leave exit handlers first; a handler must therefore
    /// not wait for the one who calls this.
    ///
    /// # Errors
    /// [`Error::KickTimeout`]; the guest runs on. [`Error::AlreadyStopped`]; it stays stopped.
    pub(crate) fn stop(self: &Arc<Self>) -> Result<StoppedVcpus> {
        let inner = self.lock();
        if self.word.fetch_or(STOP, Ordering::SeqCst) & STOP != 0 {
            return Err(Error::AlreadyStopped);
        }
        let stopped = StoppedVcpus::new(Arc::clone(self));
        self.kick_all(&inner);
        self.changed.notify_all();
        let running = |inner: &Inner| {
            let mut seats = inner.threads();
            seats
                .find(|s| !inner.parked.contains(&s.vcpu))
                .map(|s| s.vcpu)
        };
        drop(self.wait_until(inner, running)?);
        Ok(stopped)
    }

    /// Whether vCPU threads have been asked to stop, park or end: a cue for exit handlers that wait for something.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.word.load(Ordering::SeqCst) & (STOP | SHUTDOWN) != 0
    }

    /// Sleeps in a vCPU thread, outside `KVM_RUN`, for `time` or until the guest is stopped or shut down. A VMM's own pacing
    /// waits here, so that it never delays a stop.
    pub fn pause(&self, time: Duration) {
        let deadline = Instant::now() + time;
        let mut inner = self.lock();
        while !self.is_stopping() {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return;
            };
            inner = self
                .changed
                .wait_timeout(inner, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl Closed<'_> {
    /// Opens the gate, and says when it was open.
    pub(crate) fn open(self) -> Instant {
        let gate = self.gate;
        std::mem::forget(self);
        gate.open()
    }

    /// Leaves the gate closed for good, whoever else closes it and lets go: a guest whose memory is not what it should be
    /// must not run.
    pub(crate) fn keep(&self) {
        self.gate.lock().kept = true;
    }

    /// Whether it is closed for good.
    pub(crate) fn is_kept(&self) -> bool {
        self.gate.lock().kept
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.gate.open();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_gate_that_is_kept_closed_is_not_opened_by_whoever_closes_it_next() {
        let gate = Gate::new(libc::SIGRTMIN()).unwrap();
        let is_closed = || gate.word.load(Ordering::SeqCst) & CLOSED != 0;
        drop(gate.close().unwrap());
        assert!(!is_closed());
        let closed = gate.close().unwrap();
        closed.keep();
        drop(closed);
        assert!(is_closed());
        drop(gate.close().unwrap());
        assert!(is_closed() && gate.close().unwrap().is_kept());
    }
}
