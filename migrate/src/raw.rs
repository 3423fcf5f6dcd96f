//! The only unsafe code of the crate: the calls that take several pieces of guest memory at once, and inherited
//! descriptors. vm-memory moves one piece a call, which costs a system call a page when dirty pages lie scattered.
#![allow(unsafe_code)] // vectored I/O on guest memory takes raw pointers: it must never become a `&[u8]`

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use vm_memory::VolatileSlice;

/// The most pieces that one system call takes (`IOV_MAX`).
pub(crate) const MAX_PIECES: usize = 1024;
/// The most bytes that one call writes: it returns only when the peer has made room for the last of them, and until then
/// nothing that the peer says is heard.
const MAX_BYTES: usize = 1 << 20;

fn ret(n: isize) -> io::Result<usize> {
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Writes guest memory to a socket (no `SIGPIPE`) or a file; bytes written, which may be fewer than there are.
pub(crate) fn write_pages(
    fd: BorrowedFd<'_>,
    socket: bool,
    pieces: &[VolatileSlice<'_>],
) -> io::Result<usize> {
    let pieces = &pieces[..pieces.len().min(MAX_PIECES)];
    let guards: Vec<_> = pieces.iter().map(VolatileSlice::ptr_guard).collect();
    let mut room = MAX_BYTES;
    let mut vector: Vec<libc::iovec> = guards
        .iter()
        .map_while(|guard| {
            let iov_len = guard.len().min(room);
            room -= iov_len;
            (iov_len > 0).then(|| libc::iovec {
                iov_base: guard.as_ptr().cast_mut().cast(),
                iov_len,
            })
        })
        .collect();
    if socket {
        // SAFETY: all-zero bytes are a valid msghdr: null pointers with zero lengths.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = vector.as_mut_ptr();
        message.msg_iovlen = vector.len() as _;
        // SAFETY: `message` points at `vector`, each entry of which is memory that a VolatileSlice vouches for and
        // its guard keeps mapped; the kernel only reads it. `fd` is open for as long as it is borrowed.
        ret(unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) })
    } else {
        // At most MAX_PIECES, so the count fits.
        let count = libc::c_int::try_from(vector.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: as above: entries are guarded guest memory, the kernel only reads it, `fd` is open.
        ret(unsafe { libc::writev(fd.as_raw_fd(), vector.as_ptr(), count) })
    }
}

/// Reads into guest memory; bytes read, which may be fewer than fit, 0 at the end of the stream.
pub(crate) fn read_pages(fd: BorrowedFd<'_>, pieces: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let pieces = &pieces[..pieces.len().min(MAX_PIECES)];
    let guards: Vec<_> = pieces.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let vector: Vec<libc::iovec> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast(),
            iov_len: guard.len(),
        })
        .collect();
    // At most MAX_PIECES, so the count fits.
    let count = libc::c_int::try_from(vector.len()).unwrap_or(libc::c_int::MAX);
    // SAFETY: each entry is memory that a VolatileSlice vouches for as writable and its guard keeps mapped; volatile
    // memory may change under anybody, so no reference is broken. `fd` is open for as long as it is borrowed.
    ret(unsafe { libc::readv(fd.as_raw_fd(), vector.as_ptr(), count) })
}

/// A copy of an inherited descriptor. The original stays open, so that an address may be used twice without closing
/// what somebody else holds.
pub(crate) fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: the borrow lasts for the duplication alone, which fails with EBADF when `fd` is not open.
    unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()
}
