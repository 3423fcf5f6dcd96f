//! A vCPU thread's seat: the only way into `KVM_RUN`.
#![allow(unsafe_code)] // one reborrow that the borrow checker can't follow

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use gleaner_ring::{Entered, Vcpu, VcpuIdentity};
use kvm_ioctls::VcpuFd;

use super::{CLOSED, Gate, IN, KEPT_OUT, OUT, Parked, SHUTDOWN, STOP, SeatState, THROTTLED};
use crate::primitive::AtomicU32;
use crate::{Error, Result};

/// Whom a vCPU with a full ring asks to empty it. The vCPU waits outside `KVM_RUN`, so transactions go on meanwhile.
pub trait RingFull: Send {
    /// Returns when the rings have been emptied, or the guest is being shut down.
    ///
    /// # Errors
    /// Why they can't be.
    fn empty(&self) -> Result<()>;
}

/// What [`Seat::run`] came back with.
pub enum Turn<'a, V: Vcpu + 'a = VcpuFd> {
    /// An exit that the VMM handles.
    Exit(V::Exit<'a>),
    /// The guest is being stopped: complete pending I/O, then [`Drained::serve`](super::Drained::serve).
    Stopped(Parked<'a, V>),
    /// The thread is to end.
    Shutdown,
}

impl<V: Vcpu> fmt::Debug for Turn<'_, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exit(exit) => f.debug_tuple("Exit").field(exit).finish(),
            Self::Stopped(parked) => f.debug_tuple("Stopped").field(parked).finish(),
            Self::Shutdown => f.write_str("Shutdown"),
        }
    }
}

/// What a vCPU thread holds to run its vCPU. It stays on the thread that registered it.
///
/// There is no other way to one than [`Tracker::register`](crate::Tracker::register), which maps the vCPU's ring first: no
/// vCPU runs whose ring can't be read.
///
/// ```
/// # use {gleaner::{Result, Tracker, gate::Seat}, kvm_ioctls::VcpuFd};
/// fn seat(tracker: &Tracker, vcpu: &VcpuFd) -> Result<Seat> {
///     tracker.register(vcpu, 0)
/// }
/// ```
///
/// ```compile_fail,E0624
/// # use {gleaner::{Result, Tracker, gate::Seat}, kvm_ioctls::VcpuFd};
/// fn seat(tracker: &Tracker, vcpu: &VcpuFd) -> Result<Seat> {
///     Seat::new(tracker.gate(), vcpu, 0, None)
/// }
/// ```
pub struct Seat {
    gate: Arc<Gate>,
    state: Arc<SeatState>,
    ring: Option<Box<dyn RingFull>>,
    /// The vCPU it was registered for.
    vcpu: VcpuIdentity,
    _thread: PhantomData<*const ()>,
}

impl fmt::Debug for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Seat").field(&self.state.vcpu).finish()
    }
}

impl Seat {
    /// A seat for the calling thread. `ring` is called when the vCPU's dirty ring is full.
    pub(crate) fn new(
        gate: &Arc<Gate>,
        vcpu: &impl Vcpu,
        id: u64,
        ring: Option<Box<dyn RingFull>>,
    ) -> Result<Self> {
        let state = Arc::new(SeatState {
            state: AtomicU32::new(OUT),
            rests: AtomicU32::new(0),
            vcpu: id,
            kick: vcpu
                .kicker(gate.signal)
                .map_err(|source| Error::RunPage { vcpu: id, source })?,
        });
        let mut inner = gate.lock();
        if inner.seats.iter().any(|s| s.vcpu == id) {
            return Err(Error::SeatTaken { vcpu: id });
        }
        inner.seats.push(Arc::clone(&state));
        drop(inner);
        Ok(Self {
            gate: Arc::clone(gate),
            state,
            ring,
            vcpu: vcpu.identity(),
            _thread: PhantomData,
        })
    }

    /// The gate, for waiting in exit handlers ([`Gate::pause`]).
    #[must_use]
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// The two stores and loads that every entry costs, without `KVM_RUN`: for measuring.
    #[doc(hidden)]
    pub fn pass(&self) -> bool {
        let entered = self.enter(KEPT_OUT).is_ok();
        if entered {
            self.leave();
        }
        entered
    }

    /// Enters `KVM_RUN` for a vCPU that no thread runs, unless the gate is closed or the guest stopped. It is inside until it is
    /// kicked, or leaves by [`Seat::step_out`]. It never has to rest.
    #[cfg(feature = "mutants")]
    #[must_use]
    pub fn step_in(&self) -> bool {
        self.enter(CLOSED | STOP | SHUTDOWN).is_ok()
    }

    /// Leaves `KVM_RUN` for a vCPU that no thread runs.
    #[cfg(feature = "mutants")]
    pub fn step_out(&self) {
        self.leave();
    }

    /// Enters, unless the gate's word has one of `blockers`; those are returned then.
    #[inline]
    pub(super) fn enter(&self, blockers: u32) -> std::result::Result<(), u32> {
        self.state.state.swap(IN, Ordering::SeqCst);
        let word = self.gate.word.load(Ordering::SeqCst) & blockers;
        if word == 0 {
            return Ok(());
        }
        self.enter_throttled(word)
    }

    /// The word is not all clear: enters if that is for other vCPUs' rests alone.
    #[cold]
    fn enter_throttled(&self, word: u32) -> std::result::Result<(), u32> {
        if word == THROTTLED && self.state.rests.load(Ordering::SeqCst) == 0 {
            return Ok(());
        }
        self.leave();
        Err(word)
    }

    #[inline]
    pub(super) fn leave(&self) {
        self.state.state.swap(OUT, Ordering::SeqCst);
        if self.gate.word.load(Ordering::SeqCst) & (CLOSED | STOP | SHUTDOWN) != 0 {
            // Under the lock, so that it can't fall between the closer's look and its wait.
            drop(self.gate.lock());
            self.gate.changed.notify_all();
        }
    }

    /// Waits until the gate opens, is to be stopped, or shut down; returns the word.
    fn wait_open(&self) -> u32 {
        let mut inner = self.gate.lock();
        loop {
            let word = self.gate.word.load(Ordering::SeqCst);
            if word & CLOSED == 0 || word & SHUTDOWN != 0 {
                return word;
            }
            inner = self.gate.wait(inner);
        }
    }

    /// Runs the vCPU until it exits to the VMM, or the guest is to be stopped. A closed gate is waited for, an interrupted
    /// `KVM_RUN` repeated, a full dirty ring emptied, and what throttling takes is slept, all inside.
    ///
    /// # Errors
    /// [`Error::OtherVcpu`] for a vCPU that the seat was not registered for: a kick would not reach it, nor the harvest its
    /// ring. [`Error::VcpuRun`] when `KVM_RUN` fails for another reason; [`Error::Reaper`] when a full ring can't be emptied.
    pub fn run<'a, V: Vcpu>(&'a mut self, vcpu: &'a mut V) -> Result<Turn<'a, V>> {
        if vcpu.identity() != self.vcpu {
            return Err(Error::OtherVcpu {
                vcpu: self.state.vcpu,
            });
        }
        loop {
            if let Err(word) = self.enter(KEPT_OUT) {
                if word & SHUTDOWN != 0 {
                    return Ok(Turn::Shutdown);
                }
                if word & CLOSED != 0 {
                    self.wait_open();
                    continue;
                }
                if word & STOP != 0 {
                    return Ok(Turn::Stopped(Parked::new(self, vcpu)));
                }
                self.rest();
                continue;
            }
            // SAFETY: the exit is returned, or dropped before `vcpu` is used again; the borrow checker can't see that a
            // borrow which is returned on one path is over on the others.
            let entered = unsafe { &mut *std::ptr::from_mut(vcpu) }.enter();
            self.leave();
            match entered {
                Entered::Exit(exit) => return Ok(Turn::Exit(exit)),
                Entered::RingFull => {
                    if let Some(ring) = &self.ring {
                        ring.empty()?;
                    }
                }
                Entered::Interrupted => self.state.kick.set_immediate_exit(false),
                Entered::Failed(source) => return Err(self.failed(source)),
            }
        }
    }

    /// Lets KVM complete the I/O of the last exit, without running guest code. The exit that this may lead to is returned.
    pub(super) fn complete_io<'a, V: Vcpu>(&self, vcpu: &'a mut V) -> Result<Option<V::Exit<'a>>> {
        while self.enter(CLOSED).is_err() {
            if self.wait_open() & SHUTDOWN != 0 {
                return Ok(None);
            }
        }
        self.state.kick.set_immediate_exit(true);
        let entered = vcpu.enter();
        self.leave();
        self.state.kick.set_immediate_exit(false);
        match entered {
            Entered::Exit(exit) => Ok(Some(exit)),
            // KVM looks at the ring after it has completed the I/O.
            Entered::Interrupted | Entered::RingFull => Ok(None),
            Entered::Failed(source) => Err(self.failed(source)),
        }
    }

    fn failed(&self, source: std::io::Error) -> Error {
        Error::VcpuRun {
            vcpu: self.state.vcpu,
            source,
        }
    }

    pub(super) fn shared(&self) -> (&Gate, &SeatState) {
        (&self.gate, &self.state)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut inner = self.gate.lock();
        inner.seats.retain(|s| s.vcpu != self.state.vcpu);
        inner.parked.retain(|&v| v != self.state.vcpu);
        inner.resting.remove(&self.state.vcpu);
        inner.saving.retain(|&v| v != self.state.vcpu);
        self.gate.changed.notify_all();
    }
}
