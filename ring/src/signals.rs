//! Calls that a signal must not cut short: blocking those that can be blocked, and noticing those that can't.
#![allow(unsafe_code)] // pthread_sigmask, getrusage: the C library's interface

use std::io;
use std::mem::MaybeUninit;

use crate::{Error, Result};

/// How often this thread has given up its CPU of its own accord. A thread that is stopped (SIGSTOP, ptrace, the freezer) has,
/// before it is back in user space.
pub fn voluntary_switches() -> i64 {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the pointer is to memory of the right type; zeroes are a valid rusage, should the call fail.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init()
    };
    usage.ru_nvcsw
}

/// Restores the mask when dropped, so that an unwinding closure leaves the thread as it was.
struct Restore(libc::sigset_t);

impl Drop for Restore {
    fn drop(&mut self) {
        // SAFETY: the set was filled by pthread_sigmask; null is allowed for the old mask.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut())
        };
    }
}

/// Runs `f` with every signal blocked in this thread, then restores the mask.
///
/// # Errors
/// [`Error::SignalMask`]; `f` has not run then.
pub fn with_signals_blocked<T>(f: impl FnOnce() -> T) -> Result<T> {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    let mut old = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: both pointers are to memory of the right type; sigfillset initialises `all` before it is read.
    let code = unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), old.as_mut_ptr())
    };
    if code != 0 {
        return Err(Error::SignalMask {
            source: io::Error::from_raw_os_error(code),
        });
    }
    // SAFETY: pthread_sigmask succeeded and so has filled `old`.
    let _restore = Restore(unsafe { old.assume_init() });
    Ok(f())
}
