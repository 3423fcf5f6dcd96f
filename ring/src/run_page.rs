//! What it takes to get a vCPU out of `KVM_RUN`: `immediate_exit` and a signal.
#![allow(unsafe_code)] // memory shared with the kernel; signals

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU8, Ordering};

use memmap2::{MmapOptions, MmapRaw};

/// The first page of a vCPU's `kvm_run`, mapped a second time: `kvm-ioctls` gives `immediate_exit` only to who holds the
/// vCPU, and a kick comes from another thread.
#[derive(Debug)]
pub struct RunPage(MmapRaw);

/// `immediate_exit` in `struct kvm_run`.
const IMMEDIATE_EXIT: usize = std::mem::offset_of!(kvm_bindings::kvm_run, immediate_exit);

impl RunPage {
    pub fn map(vcpu: &impl AsRawFd) -> io::Result<Self> {
        MmapOptions::new()
            .len(4096)
            .map_raw(vcpu.as_raw_fd())
            .map(Self)
    }

    pub fn set_immediate_exit(&self, on: bool) {
        // SAFETY: the byte lies in the mapped page, which lives as long as `self`; the kernel reads it once on each
        // KVM_RUN, and everybody here writes it atomically.
        let byte = unsafe { AtomicU8::from_ptr(self.0.as_mut_ptr().add(IMMEDIATE_EXIT)) };
        byte.store(u8::from(on), Ordering::SeqCst);
    }
}

/// A vCPU's thread.
#[derive(Debug)]
pub struct Thread(libc::pid_t);

impl Thread {
    /// The calling thread, with `signal` unblocked.
    pub fn current(signal: i32) -> Self {
        // SAFETY: a zeroed sigset_t is a valid target for sigemptyset, which initialises it; null means that the old mask
        // is not wanted.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, signal);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
            Self(libc::gettid())
        }
    }

    /// Sends `signal`. A thread that has ended, its seat leaked, gets none; whoever has its number since gets a signal whose
    /// handler does nothing.
    pub fn kick(&self, signal: i32) {
        // SAFETY: plain numbers; the kernel checks that the thread is one of this process.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.0, signal) };
    }
}
