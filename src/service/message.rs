//! What agent and service say to each other, and how it is framed.
//!
//! A frame is a little-endian `u32` length, then so many bytes. A file descriptor travels with the length.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use gleaner_bitmap::{BlockId, BlockInfo, Extent, Generation, Slot};
use gleaner_migrate::{Throttle, Throttles};
use serde::{Deserialize, Serialize};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::codec;
use crate::rate::{Look, Metered};

/// How a migration's stream begins, whose other end has taken the wrong socket.
const STREAM: [u8; 4] = *b"GLNR";

/// Version of these messages.
pub const VERSION: u32 = 3;

/// What a meter says hello with, in place of a migration's name. So a service of version 1, which knows of no meter,
/// answers it with its version.
pub const METER: [u8; 16] = *b"a meter, no move";

/// What the agent asks.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Request {
    /// The first message, and the first only.
    Hello {
        /// [`VERSION`].
        version: u32,
        /// Names the attempt; [`METER`]: there is to be none.
        migration: [u8; 16],
    },
    /// The layout in force.
    Layout,
    /// The memory of a block of the layout or of an open lease.
    Block(BlockId),
    /// Collect, re-arm, publish.
    Harvest,
    /// Take up to so many dirty pages on lease.
    Lease(u64),
    /// A lease was applied at the destination.
    Ack(u64),
    /// A lease was not applied.
    Release(u64),
    /// Stop the guest.
    Stop,
    /// State of devices and vCPUs.
    State,
    /// The destination is ready and will be told to run.
    Relinquish,
    /// The destination runs.
    Complete,
    /// The guest goes on here.
    Resume,
    /// Slot transactions since the attempt began.
    Transactions,
    /// What can be slowed.
    Throttles,
    /// Slow the guest, instead of what slowed it before.
    Throttle(Throttle),
    /// The memory of a block of the layout, for writing: a destination on this host goes on with it.
    HandOver(BlockId),
    /// Of a meter: what is metered.
    Metered,
    /// Of a meter: what was written since the last look.
    Look,
    /// Of a meter: more of the last look, whose pages came to a whole chunk.
    Rest,
}

/// What the service answers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Response {
    /// The agent is attached, and everything is dirty.
    Welcome {
        /// [`VERSION`].
        version: u32,
    },
    /// An earlier attempt is in doubt: only `Complete` and `Resume` change anything, once it is known what became of it.
    InDoubt {
        /// The earlier attempt.
        migration: [u8; 16],
    },
    /// The layout.
    Layout {
        /// Its stamp.
        generation: Generation,
        /// Its blocks.
        blocks: Vec<BlockInfo>,
        /// Its slots.
        slots: Vec<Slot>,
    },
    /// A descriptor of the block's memory came with this message, read-only unless it was handed over; the block starts at
    /// `offset` bytes of it.
    Block {
        /// Where the block starts in the file.
        offset: u64,
    },
    /// After a harvest.
    Harvested {
        /// The layout in force.
        generation: Generation,
        /// Pages that can be leased.
        dirty_pages: u64,
    },
    /// A lease, or none.
    Leased(Option<LeaseMessage>),
    /// State of devices and vCPUs.
    State(Vec<u8>),
    /// A number.
    Number(u64),
    /// Done.
    Done,
    /// Not done.
    Error(String),
    /// What can be slowed.
    Throttles(Throttles),
    /// What is metered.
    Metered(Metered),
    /// A look, with the first chunk of its pages.
    Look(Box<Look>),
    /// The next chunk; one that is not whole is the last.
    Rest(Vec<Extent>),
}

/// A lease, as it travels.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LeaseMessage {
    /// Its number.
    pub id: u64,
    /// The layout under which it was taken.
    pub generation: Generation,
    /// Its pages.
    pub extents: Vec<Extent>,
}

fn invalid(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// The two directions differ in their message alone, and in how long it may be.
macro_rules! bytes {
    ($message:ident, $limit:expr) => {
        impl $message {
            /// Longest message in bytes. Decoding any bytes allocates at most four times as much.
            pub const LIMIT: usize = $limit;

            /// The bytes of a frame after its length.
            ///
            /// # Errors
            /// [`io::ErrorKind::InvalidData`] for a message over its limit.
            pub fn encode(&self) -> io::Result<Vec<u8>> {
                let bytes = codec::encode::<{ Self::LIMIT }>(self).map_err(invalid)?;
                check_length(bytes.len(), Self::LIMIT)?;
                Ok(bytes)
            }

            /// Reads the bytes of a frame after its length, as a peer sent them.
            ///
            /// # Errors
            /// [`io::ErrorKind::InvalidData`] for what is no message, or more than one, or over the limit.
            pub fn decode(bytes: &[u8]) -> io::Result<Self> {
                check_length(bytes.len(), Self::LIMIT)?;
                codec::decode::<{ Self::LIMIT }, Self>(bytes).map_err(invalid)
            }
        }
    };
}

// A layout of 32,764 slots is below 2 MiB, machine state may be more.
bytes!(Request, 4 << 10);
bytes!(Response, 64 << 20);

fn check_length(length: usize, limit: usize) -> io::Result<()> {
    if length > limit {
        return Err(invalid(format!(
            "message of {length} bytes is longer than {limit}"
        )));
    }
    Ok(())
}

fn send(stream: &mut UnixStream, bytes: &[u8], fd: Option<&OwnedFd>) -> io::Result<()> {
    let length = u32::try_from(bytes.len()).map_err(|_| invalid("message too long"))?;
    let header = length.to_le_bytes();
    match fd {
        Some(fd) => {
            let sent = stream
                .send_with_fd(&header[..], fd.as_fd().as_raw_fd())
                .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
            stream.write_all(&header[sent..])?;
        }
        None => stream.write_all(&header)?,
    }
    stream.write_all(bytes)
}

/// `None` at the end of the stream between two messages.
fn receive(
    stream: &mut UnixStream,
    limit: usize,
) -> io::Result<Option<(Vec<u8>, Option<OwnedFd>)>> {
    let mut header = [0; 4];
    let (got, file) = loop {
        match stream.recv_with_fd(&mut header) {
            Ok(got) => break got,
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(io::Error::from_raw_os_error(error.errno())),
        }
    };
    if got == 0 {
        return Ok(None);
    }
    stream.read_exact(&mut header[got..])?;
    if header == STREAM {
        let text = "a migration's stream is spoken there, and not a guest's service: --control takes a guest's socket, --to what a destination listens at";
        return Err(invalid(text));
    }
    let length = u32::from_le_bytes(header) as usize;
    check_length(length, limit)?;
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes)?;
    Ok(Some((bytes, file.map(OwnedFd::from))))
}

pub fn send_request(stream: &mut UnixStream, request: &Request) -> io::Result<()> {
    send(stream, &request.encode()?, None)
}

pub fn receive_request(stream: &mut UnixStream) -> io::Result<Option<Request>> {
    let frame = receive(stream, Request::LIMIT)?;
    frame.map(|(bytes, _)| Request::decode(&bytes)).transpose()
}

pub fn send_response(
    stream: &mut UnixStream,
    response: &Response,
    fd: Option<&OwnedFd>,
) -> io::Result<()> {
    send(stream, &response.encode()?, fd)
}

pub fn receive_response(stream: &mut UnixStream) -> io::Result<(Response, Option<OwnedFd>)> {
    let (bytes, fd) = receive(stream, Response::LIMIT)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    Ok((Response::decode(&bytes)?, fd))
}
