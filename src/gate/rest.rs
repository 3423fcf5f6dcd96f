//! Rests: a vCPU that is kept out of `KVM_RUN` for a while, the others not.
//!
//! It is the gate's own order of looks again, with the seat's `rests` for the word: who orders the rest sets it and then
//! looks whether the vCPU is inside; the vCPU says that it is inside and then looks at it. The word only says whether
//! anybody rests at all, so that an entry costs nothing more while nobody does.
//!
//! A vCPU that rests is out: a closed gate does not wait for it. It sleeps in the gate's wait, where a stop, a shutdown and
//! [`Gate::wake`] end the sleep at once. How long it sleeps it knows itself: a rest ends even if whoever ordered it is gone.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::{Gate, IN, Seat, THROTTLED};

impl Gate {
    /// Keeps the vCPUs that are `meant` out of `KVM_RUN` until a moment; does not wait until they are out. Those that no
    /// thread runs go on: how fast they are is for the simulation to say.
    pub(crate) fn rest(&self, until: Instant, meant: impl Fn(u64) -> bool) {
        let mut inner = self.lock();
        if self.is_stopping() {
            return;
        }
        self.word.fetch_or(THROTTLED, Ordering::SeqCst);
        let inner = &mut *inner;
        for seat in &inner.seats {
            if seat.kick.is_threadless() || !meant(seat.vcpu) {
                continue;
            }
            inner.resting.insert(seat.vcpu, until);
            seat.rests.swap(1, Ordering::SeqCst);
            if seat.state.load(Ordering::SeqCst) == IN {
                seat.kick.set_immediate_exit(true);
                seat.kick.interrupt();
            }
        }
    }

    /// Ends all rests.
    pub(crate) fn wake(&self) {
        let mut inner = self.lock();
        self.word.fetch_and(!THROTTLED, Ordering::SeqCst);
        inner.resting.clear();
        for seat in &inner.seats {
            seat.rests.store(0, Ordering::SeqCst);
        }
        drop(inner);
        self.changed.notify_all();
    }
}

impl Seat {
    /// Sleeps until the vCPU's rest is over, or the guest is to be stopped or shut down.
    pub(super) fn rest(&self) {
        let (gate, state) = self.shared();
        let mut inner = gate.lock();
        while !gate.is_stopping() {
            let until = inner.resting.get(&state.vcpu).copied();
            let left = until.and_then(|u| u.checked_duration_since(Instant::now()));
            let Some(left) = left else {
                inner.resting.remove(&state.vcpu);
                state.rests.store(0, Ordering::SeqCst);
                break;
            };
            inner = gate
                .changed
                .wait_timeout(inner, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        // Of the kick, if the vCPU was on its way out by itself.
        state.kick.set_immediate_exit(false);
    }
}
