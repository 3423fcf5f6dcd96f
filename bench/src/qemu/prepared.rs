//! A whole migration as bytes, to be written as fast as a QEMU takes them: no sender can be faster.

use std::fs::File;
use std::io::Write;
use std::net::TcpStream;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use gleaner_bitmap::{PAGE_SIZE, PageRange};
use gleaner_migrate::{Address, MappedMemory, MultifdSync, PageMemory};
use vm_memory::VolatileSlice;

use crate::Result;

/// Bytes of a write.
const STEP: usize = 1 << 20;
/// Pages in a packet.
const PACKET: u64 = 128;
/// Bytes that say what a connection is, before all others are there.
const HEADER: usize = 8;
const HELLO: usize = 64;

/// What goes over each connection.
#[derive(Default)]
pub struct Prepared {
    bytes: Vec<u8>,
    main: Range<usize>,
    multifd: Vec<Range<usize>>,
}

impl Prepared {
    /// All of `memory` as the block `ram`, over so many channels. The bytes of an earlier one are written over.
    pub fn write_over(
        self,
        memory: &MappedMemory,
        channels: u16,
        sync: MultifdSync,
    ) -> Result<Self> {
        let mut bytes = self.bytes;
        bytes.clear();
        let all = memory.slice(PageRange::new(0, memory.pages()))?;
        let is_multifd = channels > 1;
        put_main(&mut bytes, &all, is_multifd, sync)?;
        let (main, mut multifd) = (0..bytes.len(), Vec::new());
        for number in (0..channels).filter(|_| is_multifd) {
            let start = bytes.len();
            put_channel(&mut bytes, &all, number, channels)?;
            multifd.push(start..bytes.len());
        }
        Ok(Self {
            bytes,
            main,
            multifd,
        })
    }

    /// Writes everything to a QEMU, all connections at once. They stay open.
    pub fn send(&self, to: &Address) -> Result<Vec<File>> {
        let mut open = Vec::new();
        let multifd = self.multifd.iter().map(|range| (range, HELLO));
        for (range, begin) in std::iter::once((&self.main, HEADER)).chain(multifd) {
            let mut connection = connect(to)?;
            let (begin, rest) = self.bytes[range.clone()].split_at(begin);
            connection.write_all(begin)?;
            open.push((connection, rest));
        }
        std::thread::scope(|scope| {
            let write = |(mut connection, rest): (File, &[u8])| -> Result<File> {
                for step in rest.chunks(STEP) {
                    connection.write_all(step)?;
                }
                Ok(connection)
            };
            let writers = open.into_iter().map(|one| scope.spawn(move || write(one)));
            let writers: Vec<_> = writers.collect();
            writers
                .into_iter()
                .map(|writer| writer.join().map_err(|_| "a writer panicked")?)
                .collect()
        })
    }
}

fn connect(to: &Address) -> Result<File> {
    let fd: OwnedFd = match to {
        Address::Unix(path) => UnixStream::connect(path)?.into(),
        Address::Tcp { host, port } => {
            let stream = TcpStream::connect((host.as_str(), *port))?;
            stream.set_nodelay(true)?;
            stream.into()
        }
        Address::Fd(_) | Address::File(_) => return Err("nobody listens there".into()),
    };
    Ok(fd.into())
}

/// The main connection: the block, the pages unless they go by multifd, and the end.
fn put_main(
    out: &mut Vec<u8>,
    all: &VolatileSlice<'_>,
    multifd: bool,
    sync: MultifdSync,
) -> Result<()> {
    let length = (all.len() as u64).to_be_bytes();
    let total = (all.len() as u64 | 0x004).to_be_bytes();
    let end_of_section = |out: &mut Vec<u8>| {
        if multifd && sync == MultifdSync::Flush {
            out.extend(0x200u64.to_be_bytes());
        }
        out.extend(0x010u64.to_be_bytes());
        out.extend(b"\x7e\x00\x00\x00\x02");
    };
    out.extend(b"QEVM\x00\x00\x00\x03\x07\x00\x00\x00\x04none");
    out.extend(b"\x01\x00\x00\x00\x02\x03ram\x00\x00\x00\x00\x00\x00\x00\x04");
    out.extend([&total[..], b"\x03ram", &length].concat());
    end_of_section(out);
    out.extend(b"\x03\x00\x00\x00\x02");
    if !multifd {
        // The first page names its block, the others are of the same.
        for at in (0..all.len()).step_by(PAGE_SIZE as usize) {
            let flags = if at == 0 { 0x008 } else { 0x028 };
            out.extend((at as u64 | flags).to_be_bytes());
            out.extend((at == 0).then_some(b"\x03ram").into_iter().flatten());
            put_memory(out, all, at, PAGE_SIZE as usize)?;
        }
    }
    end_of_section(out);
    out.extend(b"\x00\x06\x00\x00\x00\x02{}");
    Ok(())
}

/// A connection of multifd: every so many-th packet, between one SYNC for each section.
fn put_channel(
    out: &mut Vec<u8>,
    all: &VolatileSlice<'_>,
    number: u16,
    channels: u16,
) -> Result<()> {
    let mut hello = [0; HELLO];
    hello[..8].copy_from_slice(b"\x11\x22\x33\x44\x00\x00\x00\x01");
    hello[24] = number.to_be_bytes()[1];
    out.extend(hello);
    out.extend(packet(1, 0..0));
    let pages = all.len() as u64 / PAGE_SIZE;
    let firsts = (u64::from(number) * PACKET..pages).step_by(usize::from(channels) * 128);
    for first in firsts {
        let pages = first..pages.min(first + PACKET);
        let (at, len) = (pages.start * PAGE_SIZE, (pages.end - first) * PAGE_SIZE);
        out.extend(packet(0, pages));
        put_memory(out, all, at as usize, len as usize)?;
    }
    out.extend(packet(1, 0..0));
    Ok(())
}

/// A packet's head: flags, and the pages that follow.
fn packet(flags: u32, pages: Range<u64>) -> [u8; 1344] {
    let count = (pages.end - pages.start) as u32;
    let mut head = [0; 1344];
    let mut put = |at: usize, bytes: &[u8]| head[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x11\x22\x33\x44\x00\x00\x00\x01");
    put(8, &flags.to_be_bytes());
    put(12, &(PACKET as u32).to_be_bytes());
    put(16, &count.to_be_bytes());
    put(20, &(count * 4096).to_be_bytes());
    put(64, b"ram");
    for (at, page) in (320..).step_by(8).zip(pages) {
        put(at, &(page * PAGE_SIZE).to_be_bytes());
    }
    head
}

fn put_memory(out: &mut Vec<u8>, all: &VolatileSlice<'_>, at: usize, len: usize) -> Result<()> {
    let end = out.len();
    out.resize(end + len, 0);
    all.subslice(at, len)?.copy_to(&mut out[end..]);
    Ok(())
}
