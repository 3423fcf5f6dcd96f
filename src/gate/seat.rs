//! A vCPU thread's seat: the only way into `KVM_RUN`.
#![allow(unsafe_code)] // one reborrow that the borrow checker can't follow

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use gleaner_ring::RING_FULL_EXIT;
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::{CLOSED, Gate, IN, OUT, Parked, RunPage, SHUTDOWN, STOP, SeatState, run_page::Thread};
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
#[derive(Debug)]
pub enum Turn<'a> {
    /// An exit that the VMM handles.
    Exit(VcpuExit<'a>),
    /// The guest is being stopped: complete pending I/O, then [`Drained::serve`](super::Drained::serve).
    Stopped(Parked<'a>),
    /// The thread is to end.
    Shutdown,
}

/// What a vCPU thread holds to run its vCPU. It stays on the thread that registered it.
pub struct Seat {
    gate: Arc<Gate>,
    state: Arc<SeatState>,
    ring: Option<Box<dyn RingFull>>,
    /// Descriptor of the vCPU it was registered for.
    fd: RawFd,
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
        vcpu: &VcpuFd,
        id: u64,
        ring: Option<Box<dyn RingFull>>,
    ) -> Result<Self> {
        let state = Arc::new(SeatState {
            state: AtomicU32::new(OUT),
            vcpu: id,
            thread: Thread::current(gate.signal),
            run: RunPage::map(vcpu).map_err(|source| Error::RunPage { vcpu: id, source })?,
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
            fd: vcpu.as_raw_fd(),
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
        let entered = self.enter(CLOSED | STOP | SHUTDOWN).is_ok();
        if entered {
            self.leave();
        }
        entered
    }

    /// Enters, unless the gate's word has one of `blockers`; those are returned then.
    #[inline]
    pub(super) fn enter(&self, blockers: u32) -> std::result::Result<(), u32> {
        self.state.state.swap(IN, Ordering::SeqCst);
        let word = self.gate.word.load(Ordering::SeqCst) & blockers;
        if word == 0 {
            return Ok(());
        }
        self.leave();
        Err(word)
    }

    #[inline]
    pub(super) fn leave(&self) {
        self.state.state.swap(OUT, Ordering::SeqCst);
        if self.gate.word.load(Ordering::SeqCst) != 0 {
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
    /// `KVM_RUN` repeated, and a full dirty ring emptied, all inside.
    ///
    /// # Errors
    /// [`Error::OtherVcpu`] for a vCPU that the seat was not registered for: a kick would not reach it, nor the harvest its
    /// ring. [`Error::VcpuRun`] when `KVM_RUN` fails for another reason; [`Error::Reaper`] when a full ring can't be emptied.
    pub fn run<'a>(&'a mut self, vcpu: &'a mut VcpuFd) -> Result<Turn<'a>> {
        if vcpu.as_raw_fd() != self.fd {
            return Err(Error::OtherVcpu {
                vcpu: self.state.vcpu,
            });
        }
        loop {
            if let Err(word) = self.enter(CLOSED | STOP | SHUTDOWN) {
                if word & SHUTDOWN != 0 {
                    return Ok(Turn::Shutdown);
                }
                if word & CLOSED != 0 {
                    self.wait_open();
                    continue;
                }
                return Ok(Turn::Stopped(Parked::new(self, vcpu)));
            }
            // SAFETY: the exit is returned, or dropped before `vcpu` is used again; the borrow checker can't see that a
            // borrow which is returned on one path is over on the others.
            let exit = unsafe { &mut *std::ptr::from_mut(vcpu) }.run();
            self.leave();
            match exit {
                Ok(VcpuExit::Unsupported(RING_FULL_EXIT)) => {
                    if let Some(ring) = &self.ring {
                        ring.empty()?;
                    }
                }
                Ok(VcpuExit::Intr) => self.state.run.set_immediate_exit(false),
                Ok(exit) => return Ok(Turn::Exit(exit)),
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                    self.state.run.set_immediate_exit(false);
                }
                Err(error) => {
                    return Err(Error::VcpuRun {
                        vcpu: self.state.vcpu,
                        source: io::Error::from_raw_os_error(error.errno()),
                    });
                }
            }
        }
    }

    /// Lets KVM complete the I/O of the last exit, without running guest code. The exit that this may lead to is returned.
    pub(super) fn complete_io<'a>(&self, vcpu: &'a mut VcpuFd) -> Result<Option<VcpuExit<'a>>> {
        while self.enter(CLOSED).is_err() {
            if self.wait_open() & SHUTDOWN != 0 {
                return Ok(None);
            }
        }
        self.state.run.set_immediate_exit(true);
        let result = vcpu.run();
        self.leave();
        self.state.run.set_immediate_exit(false);
        match result {
            Ok(VcpuExit::Intr) => Ok(None),
            Ok(exit) => Ok(Some(exit)),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Ok(None),
            Err(error) => Err(Error::VcpuRun {
                vcpu: self.state.vcpu,
                source: io::Error::from_raw_os_error(error.errno()),
            }),
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
        inner.saving.retain(|&v| v != self.state.vcpu);
        self.gate.changed.notify_all();
    }
}
