//! What goes over multifd's connections. All integers are big-endian.
//!
//! A connection opens with a hello of 64 bytes. Packets follow: 1344 bytes that say which pages of one block, then their
//! contents. A packet may be without pages.

use gleaner_bitmap::PAGE_SIZE;

use crate::{Error, Result};

pub(crate) const MAGIC: u32 = 0x1122_3344;
const VERSION: u32 = 1;

pub(crate) const HELLO_LEN: usize = 64;
pub(crate) const PACKET_LEN: usize = 320 + 8 * MAX_PAGES;
/// Most pages in a packet.
pub(crate) const MAX_PAGES: usize = 128;
/// The connection waits after this packet until the main one lets all go on.
pub(crate) const SYNC: u32 = 1;

/// Where things stand in a packet.
const FLAGS: usize = 8;
const ALLOCATED: usize = 12;
const NORMAL: usize = 16;
const NEXT_SIZE: usize = 20;
const NUMBER: usize = 24;
/// From 9.0 on; 0 before.
const ZERO: usize = 32;
const BLOCK: usize = 64;
const BLOCK_LEN: usize = 256;
const OFFSETS: usize = 320;

/// What opens connection number `channel`. The id of the virtual machine is left out: all zero.
pub(crate) fn hello(channel: u8) -> [u8; HELLO_LEN] {
    let mut bytes = [0; HELLO_LEN];
    put(&mut bytes, 0, &MAGIC.to_be_bytes());
    put(&mut bytes, 4, &VERSION.to_be_bytes());
    bytes[24] = channel;
    bytes
}

/// A packet with whole pages of `block` at these `offsets` in bytes, at most [`MAX_PAGES`]. Contents follow it.
pub(crate) fn packet(
    number: u64,
    flags: u32,
    block: &str,
    offsets: &[u64],
) -> Result<[u8; PACKET_LEN]> {
    let too_long = |what, length: usize, cap: usize| Error::TooLong {
        what,
        length: length as u64,
        cap: cap as u64,
    };
    if offsets.len() > MAX_PAGES {
        return Err(too_long("packet (pages)", offsets.len(), MAX_PAGES));
    }
    // A zero has to follow the name.
    if block.len() >= BLOCK_LEN {
        return Err(too_long("name of a RAM block", block.len(), BLOCK_LEN - 1));
    }
    let mut bytes = [0; PACKET_LEN];
    put(&mut bytes, 0, &MAGIC.to_be_bytes());
    put(&mut bytes, 4, &VERSION.to_be_bytes());
    put(&mut bytes, FLAGS, &flags.to_be_bytes());
    put(&mut bytes, ALLOCATED, &count(MAX_PAGES));
    put(&mut bytes, NORMAL, &count(offsets.len()));
    put(&mut bytes, NEXT_SIZE, &count(4096 * offsets.len()));
    put(&mut bytes, NUMBER, &number.to_be_bytes());
    put(&mut bytes, BLOCK, block.as_bytes());
    for (at, offset) in (OFFSETS..).step_by(8).zip(offsets) {
        put(&mut bytes, at, &offset.to_be_bytes());
    }
    Ok(bytes)
}

/// What a connection says of itself first.
pub(crate) struct Hello {
    /// Names the virtual machine.
    pub(crate) machine: [u8; 16],
    pub(crate) channel: u8,
}

impl Hello {
    pub(crate) fn parse(bytes: &[u8; HELLO_LEN]) -> Result<Self> {
        check_head(bytes)?;
        let mut machine = [0; 16];
        machine.copy_from_slice(&bytes[8..24]);
        Ok(Self {
            machine,
            channel: bytes[24],
        })
    }
}

/// A packet, as a connection brings it.
pub(crate) struct Packet {
    pub(crate) flags: u32,
    pub(crate) block: String,
    /// In bytes; of pages whose contents follow first.
    pub(crate) offsets: Vec<u64>,
    /// How many those are. The rest are zero.
    pub(crate) normal: usize,
}

impl Packet {
    pub(crate) fn parse(bytes: &[u8; PACKET_LEN]) -> Result<Self> {
        check_head(bytes)?;
        let (flags, normal) = (u32_at(bytes, FLAGS), u32_at(bytes, NORMAL));
        let (size, zero) = (u32_at(bytes, NEXT_SIZE), u32_at(bytes, ZERO));
        if flags & !SYNC != 0 {
            return Err(bad(format!(
                "a packet has flags {flags:#x}: set multifd-compression to none at the source"
            )));
        }
        let pages = u64::from(normal) + u64::from(zero);
        if pages > MAX_PAGES as u64 {
            return Err(bad(format!(
                "a packet has {pages} pages, of {MAX_PAGES} at most"
            )));
        }
        // Without pages it is what it was in the packet before.
        if normal > 0 && u64::from(size) != u64::from(normal) * PAGE_SIZE {
            return Err(bad(format!("a packet has {size} bytes for {normal} pages")));
        }
        let name = &bytes[BLOCK..BLOCK + BLOCK_LEN];
        let length = name.iter().position(|byte| *byte == 0);
        let name = length.and_then(|length| std::str::from_utf8(&name[..length]).ok());
        let (offsets, _) = bytes[OFFSETS..].as_chunks();
        let offsets = offsets.iter().map(|bytes| u64::from_be_bytes(*bytes));
        Ok(Self {
            flags,
            block: name
                .ok_or_else(|| bad("a block's name is not a text".into()))?
                .to_owned(),
            offsets: offsets.take(normal as usize + zero as usize).collect(),
            normal: normal as usize,
        })
    }
}

fn check_head(bytes: &[u8]) -> Result<()> {
    if (u32_at(bytes, 0), u32_at(bytes, 4)) == (MAGIC, VERSION) {
        return Ok(());
    }
    Err(bad(
        "a connection that should bring pages by multifd does not".into(),
    ))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn bad(problem: String) -> Error {
    Error::QemuStream { problem }
}

/// Of pages in a packet or bytes in them: far below 2^32.
fn count(number: usize) -> [u8; 4] {
    u32::try_from(number).unwrap_or(u32::MAX).to_be_bytes()
}

fn put(bytes: &mut [u8], at: usize, what: &[u8]) {
    bytes[at..at + what.len()].copy_from_slice(what);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_names_its_channel() {
        let mut expected = [0; 64];
        expected[..8].copy_from_slice(b"\x11\x22\x33\x44\x00\x00\x00\x01");
        expected[24] = 3;
        assert_eq!(hello(3), expected);
    }

    #[test]
    fn a_packet_tells_its_pages() {
        let mut expected = [0; 1344];
        expected[..32].copy_from_slice(
            b"\x11\x22\x33\x44\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x80\
              \x00\x00\x00\x02\x00\x00\x20\x00\x00\x00\x00\x00\x00\x00\x01\x07",
        );
        expected[64..68].copy_from_slice(b"mem1");
        expected[320..336]
            .copy_from_slice(b"\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x50\x00");
        let offsets = [0x1_0000_0000, 0x5000];
        assert_eq!(packet(0x107, 0, "mem1", &offsets).unwrap(), expected);
    }

    #[test]
    fn a_sync_has_no_pages() {
        let mut expected = [0; 1344];
        expected[..32].copy_from_slice(
            b"\x11\x22\x33\x44\x00\x00\x00\x01\x00\x00\x00\x01\x00\x00\x00\x80\
              \x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x08",
        );
        assert_eq!(packet(8, SYNC, "", &[]).unwrap(), expected);
    }

    #[test]
    fn what_does_not_fit_a_packet_is_an_error() {
        assert!(packet(0, 0, "ram", &[0; 129]).is_err());
        assert!(packet(0, 0, &"x".repeat(256), &[]).is_err());
        assert!(packet(0, 0, &"x".repeat(255), &[0; 128]).is_ok());
    }
}
