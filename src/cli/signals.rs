//! Signals that end a command.
#![allow(unsafe_code)] // sets what a signal does

use gleaner_migrate::CancelToken;

/// Lets Ctrl-C, SIGTERM and SIGHUP call `cancel` off. After that Ctrl-C and SIGTERM end the process at once: it may be waiting
/// for something that no cancellation reaches. SIGHUP does not, for of a terminal that closes two may come.
pub fn cancel_on_signal(cancel: &CancelToken) -> Result<(), ctrlc::Error> {
    let cancel = cancel.clone();
    ctrlc::set_handler(move || {
        cancel.cancel();
        for signal in [libc::SIGINT, libc::SIGTERM] {
            // SAFETY: it installs no handler: the system does what it does with the signal of a process that knows none.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
    })
}
