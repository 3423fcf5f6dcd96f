//! Why a process can't be looked at.

use std::io;

use super::AddressRange;

/// Why a process can't be looked at. Nothing was changed in it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// There is none.
    #[error("there is no process {pid}")]
    None {
        /// Its number.
        pid: u32,
    },
    /// It has ended meanwhile.
    #[error("process {pid} has ended")]
    Gone {
        /// Its number.
        pid: u32,
    },
    /// It may not be read.
    #[error(
        "process {pid} may not be read: that takes CAP_SYS_PTRACE, or its own user and group{scope}"
    )]
    Denied {
        /// Its number.
        pid: u32,
        /// What else stands against it.
        scope: String,
    },
    /// It has nothing that could be a guest's RAM.
    #[error(
        "process {pid} is no guest: it has no 16 MiB of memory in one piece; --range takes what is given"
    )]
    NoGuest {
        /// Its number.
        pid: u32,
    },
    /// Where memory was said to be there is none.
    #[error("process {pid} has no memory at {range}, or not all of it")]
    NotMapped {
        /// Its number.
        pid: u32,
        /// Where.
        range: AddressRange,
    },
    /// The kernel refused something else.
    #[error("process {pid} can't be looked at: {source}")]
    Kernel {
        /// Its number.
        pid: u32,
        /// Why.
        source: io::Error,
    },
}

impl ProcessError {
    pub(super) fn of_io(pid: u32, error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOENT) => Self::None { pid },
            Some(libc::ESRCH) => Self::Gone { pid },
            Some(libc::EACCES | libc::EPERM) => Self::Denied {
                pid,
                scope: scope(std::fs::read_to_string(YAMA).ok().as_deref()),
            },
            code => Self::Kernel {
                pid,
                source: code.map_or_else(|| error.kind().into(), io::Error::from_raw_os_error),
            },
        }
    }
}

const YAMA: &str = "/proc/sys/kernel/yama/ptrace_scope";

fn scope(yama: Option<&str>) -> String {
    match yama.map(str::trim) {
        None | Some("0") => String::new(),
        Some(scope) => format!(" and kernel.yama.ptrace_scope=0, which is {scope} here"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said() {
        let said = |code| ProcessError::of_io(7, &io::Error::from_raw_os_error(code)).to_string();
        assert!(said(libc::EPERM).contains("CAP_SYS_PTRACE"));
        assert!(said(libc::EACCES).contains("CAP_SYS_PTRACE"));
        assert_eq!(said(libc::ENOENT), "there is no process 7");
        assert_eq!(said(libc::ESRCH), "process 7 has ended");
        assert!(scope(Some("1\n")).contains("ptrace_scope=0, which is 1"));
        assert_eq!(scope(Some("0\n")), "");
    }
}
