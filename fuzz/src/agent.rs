//! The agent's side of the service protocol: answers of a service that may say anything.
//!
//! An input is the number of calls, then the calls, then what the service sends: the length of each answer, then its bytes.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use gleaner::service::{Attach, Response, ServiceClient};
use gleaner_migrate::{LeaseId, MigrationId, PageLease, Source, Throttle};
use vm_memory::VolatileMemory;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::MAX_INPUT;
use crate::allocations::capped;
use crate::bytes::Bytes;
use crate::service::RESPONSE_CAP;

/// The next answer comes with a descriptor.
pub const WITH_FD: u8 = 254;
/// The next four bytes are sent as the length of an answer, whatever follows.
pub const ANY_LENGTH: u8 = 255;

/// What the agent may allocate: an answer's length is believed up to the limit, and then the lengths in it are.
const CAP: usize = Response::LIMIT + RESPONSE_CAP;

/// Pages behind a descriptor.
const PAGES: u64 = 8;

/// Whatever a service says: an error, or pages that are there.
///
/// # Panics
/// When something else holds.
pub fn run(input: &[u8]) {
    pages_read(input);
}

/// [`run`], and how many leased pages could be read.
///
/// # Panics
/// As [`run`].
pub fn pages_read(input: &[u8]) -> u64 {
    let mut bytes = Bytes(&input[..input.len().min(MAX_INPUT)]);
    let count = bytes.byte().unwrap_or(0);
    let calls = bytes.take(count.into());
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("service");
    let listener = UnixListener::bind(&path).expect("a socket");
    let fd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).expect("a memfd");
    rustix::fs::ftruncate(&fd, PAGES * 4096).expect("room in memory");
    std::thread::scope(|scope| {
        // Everything that is measured is there before it is.
        let answers = bytes.clone();
        let service = scope.spawn(move || {
            let (mut stream, _) = listener.accept().expect("the agent");
            // The agent may have had enough.
            let _ = answer(&mut stream, answers, &fd);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let read = capped(CAP, || {
            match ServiceClient::attach(&path, MigrationId([9; 16])) {
                Ok(Attach::Ready(agent) | Attach::InDoubt(agent, _)) => drive(agent, calls),
                Err(_) => 0,
            }
        });
        service.join().expect("the service");
        read
    })
}

fn answer(stream: &mut UnixStream, mut bytes: Bytes<'_>, fd: &OwnedFd) -> std::io::Result<()> {
    let mut with_fd = false;
    while let Some(length) = bytes.byte() {
        if length == WITH_FD {
            with_fd = true;
            continue;
        }
        let (header, body) = if length == ANY_LENGTH {
            let mut any = [0; 4];
            let given = bytes.take(4);
            any[..given.len()].copy_from_slice(given);
            (any, &[][..])
        } else {
            (u32::from(length).to_le_bytes(), bytes.take(length.into()))
        };
        if std::mem::take(&mut with_fd) {
            let sent = stream
                .send_with_fd(&header[..], fd.as_raw_fd())
                .map_err(|e| std::io::Error::from_raw_os_error(e.errno()))?;
            stream.write_all(&header[sent..])?;
        } else {
            stream.write_all(&header)?;
        }
        stream.write_all(body)?;
    }
    Ok(())
}

/// Makes the calls, until one fails because the service is gone.
fn drive(mut agent: ServiceClient, calls: &[u8]) -> u64 {
    let mut pages = 0;
    for call in calls {
        let lease = LeaseId((call >> 4).into());
        let failed = match call & 15 {
            0 => agent.layout().err(),
            1 => agent.harvest().err(),
            2 | 3 => match agent.lease((call >> 4).into()) {
                Ok(Some(lease)) => {
                    pages += read(&lease);
                    None
                }
                other => other.err(),
            },
            4 => agent.ack(lease).err(),
            5 => agent.release(lease).err(),
            6 => agent.stop().err(),
            7 => agent.state().err(),
            8 => agent.relinquish().err(),
            9 => agent.complete().err(),
            10 => agent.resume().err(),
            11 => agent.transactions().err(),
            12 => agent.throttles().err(),
            _ => agent.throttle(Throttle::default()).err(),
        };
        if let Some(error) = failed {
            assert!(!error.to_string().is_empty());
        }
    }
    pages
}

/// Reads the first and the last byte of each part that is there: a page that is not would kill the process.
fn read(lease: &PageLease) -> u64 {
    let mut pages = 0;
    for part in &lease.parts {
        let extent = part.extent();
        let Ok(slice) = part.slice() else { continue };
        assert_eq!(slice.len() as u64, extent.range.pages * 4096);
        assert!(extent.range.pages <= PAGES);
        if let Some(last) = slice.len().checked_sub(1) {
            for at in [0, last] {
                slice.get_ref::<u8>(at).expect("its byte").load();
            }
        }
        let data = part.data(extent.range);
        assert!(data.is_none_or(|data| extent.range.contains(&data)));
        pages += extent.range.pages;
    }
    pages
}
