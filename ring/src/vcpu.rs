//! What runs a guest: a vCPU of KVM's, or one of the model's.

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::run_page::{RunPage, Thread};
use crate::{DirtyRing, Result};

/// The exit reason with which `KVM_RUN` returns when the ring is (softly) full; `kvm-ioctls` reports it as
/// `VcpuExit::Unsupported`.
const RING_FULL_EXIT: u32 = kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;

/// Tells a vCPU from all others that exist at the same time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VcpuIdentity(pub u64);

/// A vCPU, as the gate runs it.
pub trait Vcpu {
    /// An exit that the VMM handles.
    type Exit<'a>: fmt::Debug
    where
        Self: 'a;

    /// Which one it is.
    fn identity(&self) -> VcpuIdentity;

    /// How others get it out of [`Vcpu::enter`]. The calling thread is the one that will run it.
    ///
    /// # Errors
    /// Why it can't be kicked.
    fn kicker(&self, signal: i32) -> io::Result<Box<dyn Kick>>;

    /// Its dirty ring of `bytes` bytes, which were enabled before the vCPU was made.
    ///
    /// # Errors
    /// [`crate::Error::MapRing`].
    fn ring(&self, id: u64, bytes: u32) -> Result<DirtyRing>;

    /// Runs the guest until it exits.
    fn enter(&mut self) -> Entered<Self::Exit<'_>>;
}

/// What [`Vcpu::enter`] came back with.
#[derive(Debug)]
pub enum Entered<E> {
    /// Something for the VMM.
    Exit(E),
    /// The dirty ring is full: it does not go on before the rings are harvested and reset.
    RingFull,
    /// Nothing happened, or it was kicked.
    Interrupted,
    /// It can't run.
    Failed(io::Error),
}

/// Gets a vCPU out of [`Vcpu::enter`]: `immediate_exit` and an interrupt, because either alone races.
pub trait Kick: fmt::Debug + Send + Sync {
    /// Whether the next entry returns at once.
    fn set_immediate_exit(&self, on: bool);

    /// Interrupts an entry that is under way.
    fn interrupt(&self);

    /// No thread runs this vCPU: it leaves inside [`Kick::interrupt`], its I/O complete, and counts as parked then. So are
    /// those of a simulation, which does one thing after the other.
    fn is_threadless(&self) -> bool {
        false
    }
}

/// A vCPU's run page and thread.
#[derive(Debug)]
struct Kicker {
    page: RunPage,
    thread: Thread,
    signal: i32,
}

impl Kick for Kicker {
    fn set_immediate_exit(&self, on: bool) {
        self.page.set_immediate_exit(on);
    }

    fn interrupt(&self) {
        self.thread.kick(self.signal);
    }
}

impl Vcpu for VcpuFd {
    type Exit<'a> = VcpuExit<'a>;

    fn identity(&self) -> VcpuIdentity {
        // Open for as long as the vCPU exists.
        VcpuIdentity(self.as_raw_fd().unsigned_abs().into())
    }

    fn kicker(&self, signal: i32) -> io::Result<Box<dyn Kick>> {
        Ok(Box::new(Kicker {
            page: RunPage::map(self)?,
            thread: Thread::current(signal),
            signal,
        }))
    }

    fn ring(&self, id: u64, bytes: u32) -> Result<DirtyRing> {
        DirtyRing::map(self, id, bytes)
    }

    fn enter(&mut self) -> Entered<VcpuExit<'_>> {
        match self.run() {
            Ok(VcpuExit::Unsupported(RING_FULL_EXIT)) => Entered::RingFull,
            Ok(VcpuExit::Intr) => Entered::Interrupted,
            Ok(exit) => Entered::Exit(exit),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                Entered::Interrupted
            }
            Err(error) => Entered::Failed(io::Error::from_raw_os_error(error.errno())),
        }
    }
}
