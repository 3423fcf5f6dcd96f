//! The signal that kicks vCPUs.

use std::io;

use vmm_sys_util::signal::register_signal_handler;

use crate::{Error, Result};

extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Installs a handler that does nothing, so that the signal interrupts `KVM_RUN` instead of ending the process.
pub fn install_handler(signal: i32) -> Result<()> {
    register_signal_handler(signal, nothing).map_err(|error| Error::KickSignal {
        signal,
        source: io::Error::from_raw_os_error(error.errno()),
    })
}
