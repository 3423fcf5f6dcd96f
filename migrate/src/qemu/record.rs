//! Records of QEMU's migration stream, as both ends know them. All integers are big-endian.
//!
//! ```text
//! file header, CONFIGURATION, COMMAND*, SECTION_START ram, (SECTION_PART ram | COMMAND)*, SECTION_END ram, EOF, VMDESCRIPTION
//! ```
//!
//! A section is its head, a body, and a footer. The body of a `ram` section is a row of page records that ends with EOS;
//! that of SECTION_START names the blocks instead.

use crate::{Error, Result};

/// The file header.
pub(crate) const MAGIC: u32 = 0x5145_564d; // "QEVM"
pub(crate) const VERSION: u32 = 3;

/// Types of records.
pub(crate) const EOF: u8 = 0x00;
pub(crate) const SECTION_START: u8 = 0x01;
pub(crate) const SECTION_PART: u8 = 0x02;
pub(crate) const SECTION_END: u8 = 0x03;
pub(crate) const SECTION_FULL: u8 = 0x04;
pub(crate) const SUBSECTION: u8 = 0x05;
pub(crate) const VMDESCRIPTION: u8 = 0x06;
pub(crate) const CONFIGURATION: u8 = 0x07;
pub(crate) const COMMAND: u8 = 0x08;
pub(crate) const FOOTER: u8 = 0x7e;

/// Commands.
pub(crate) const OPEN_RETURN_PATH: u16 = 1;
pub(crate) const PING: u16 = 2;
/// From 8.1 on: the guest has stopped.
pub(crate) const SWITCHOVER_START: u16 = 11;

/// Answers on the return path: u16 type, u16 length, then so many bytes.
pub(crate) const SHUT: u16 = 1;
pub(crate) const PONG: u16 = 2;
/// The longest answer that QEMU makes or takes, in bytes.
pub(crate) const ANSWER_MAX: u16 = 512;

/// The section of memory.
pub(crate) const RAM: &str = "ram";
pub(crate) const RAM_VERSION: u32 = 4;

/// Flags in the low bits of a page record's offset.
pub(crate) const ZERO: u64 = 0x002;
pub(crate) const MEM_SIZE: u64 = 0x004;
pub(crate) const PAGE: u64 = 0x008;
pub(crate) const EOS: u64 = 0x010;
pub(crate) const CONTINUE: u64 = 0x020;
pub(crate) const XBZRLE: u64 = 0x040;
/// From 8.1 on: wait here until every channel of multifd has come to its SYNC.
pub(crate) const MULTIFD_FLUSH: u64 = 0x200;

/// What a stream begins with.
pub(crate) fn put_header(out: &mut Vec<u8>) {
    put_u32(out, MAGIC);
    put_u32(out, VERSION);
}

/// The machine that the stream is of.
pub(crate) fn put_configuration(out: &mut Vec<u8>, machine: &str) -> Result<()> {
    let length = u32::try_from(machine.len()).map_err(|_| too_long("machine name", machine))?;
    out.push(CONFIGURATION);
    put_u32(out, length);
    out.extend_from_slice(machine.as_bytes());
    Ok(())
}

pub(crate) fn put_command(out: &mut Vec<u8>, command: u16, data: &[u8]) {
    out.push(COMMAND);
    put_u16(out, command);
    // The longest that is said here has 4 bytes.
    put_u16(out, u16::try_from(data.len()).unwrap_or(u16::MAX));
    out.extend_from_slice(data);
}

/// Opens the first section of memory: its blocks, by name and length in bytes.
pub(crate) fn put_ram_start<'a>(
    out: &mut Vec<u8>,
    section: u32,
    blocks: impl Iterator<Item = (&'a str, u64)> + Clone,
) -> Result<()> {
    out.push(SECTION_START);
    put_u32(out, section);
    put_name(out, RAM)?;
    put_u32(out, 0); // instance
    put_u32(out, RAM_VERSION);
    // Lengths are whole pages, so the sum leaves the bits of the flag free.
    let total = blocks
        .clone()
        .try_fold(0u64, |sum, (_, length)| sum.checked_add(length))
        .ok_or(Error::TooLong {
            what: "RAM of all blocks (bytes)",
            length: u64::MAX,
            cap: u64::MAX - 1,
        })?;
    put_u64(out, total | MEM_SIZE);
    for (name, length) in blocks {
        put_name(out, name)?;
        put_u64(out, length);
    }
    Ok(())
}

/// Opens a further section; `kind` is [`SECTION_PART`] or [`SECTION_END`].
pub(crate) fn put_section(out: &mut Vec<u8>, kind: u8, section: u32) {
    out.push(kind);
    put_u32(out, section);
}

/// Closes a section.
pub(crate) fn put_footer(out: &mut Vec<u8>, section: u32) {
    out.push(FOOTER);
    put_u32(out, section);
}

/// The head of a page record: `flags` is [`PAGE`], whose contents follow, or [`ZERO`], which a byte 0 follows. Without
/// the name of its block the page is of the block that was named last.
pub(crate) fn put_page(
    out: &mut Vec<u8>,
    offset: u64,
    flags: u64,
    block: Option<&str>,
) -> Result<()> {
    match block {
        None => put_u64(out, offset | flags | CONTINUE),
        Some(name) => {
            put_u64(out, offset | flags);
            put_name(out, name)?;
        }
    }
    Ok(())
}

/// A page record without a page: [`EOS`] or [`MULTIFD_FLUSH`].
pub(crate) fn put_mark(out: &mut Vec<u8>, flag: u64) {
    put_u64(out, flag);
}

/// The end of the stream, with a description of nothing.
pub(crate) fn put_end(out: &mut Vec<u8>) {
    out.push(EOF);
    out.push(VMDESCRIPTION);
    put_u32(out, 2);
    out.extend_from_slice(b"{}");
}

fn put_name(out: &mut Vec<u8>, name: &str) -> Result<()> {
    let length = u8::try_from(name.len()).map_err(|_| too_long("name of a RAM block", name))?;
    out.push(length);
    out.extend_from_slice(name.as_bytes());
    Ok(())
}

fn too_long(what: &'static str, name: &str) -> Error {
    Error::TooLong {
        what,
        length: name.len() as u64,
        cap: u8::MAX.into(),
    }
}

fn put_u16(out: &mut Vec<u8>, value: u16) {
    out.extend_from_slice(&value.to_be_bytes());
}

fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_be_bytes());
}

fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(with: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut out = Vec::new();
        with(&mut out);
        out
    }

    #[test]
    fn a_stream_begins_with_the_machine_and_a_question() {
        let bytes = put(|out| {
            put_header(out);
            put_configuration(out, "none").unwrap();
            put_command(out, OPEN_RETURN_PATH, &[]);
            put_command(out, PING, &0x0102_0304u32.to_be_bytes());
        });
        let expected = *b"QEVM\x00\x00\x00\x03\
            \x07\x00\x00\x00\x04none\
            \x08\x00\x01\x00\x00\
            \x08\x00\x02\x00\x04\x01\x02\x03\x04";
        assert_eq!(bytes, expected);
    }

    #[test]
    fn the_first_section_names_the_blocks() {
        let blocks = [("ram", 0x400_0000), ("mem1", 0x1000)];
        let bytes = put(|out| {
            put_ram_start(out, 5, blocks.into_iter()).unwrap();
            put_mark(out, MULTIFD_FLUSH);
            put_mark(out, EOS);
            put_footer(out, 5);
        });
        let expected = *b"\x01\x00\x00\x00\x05\x03ram\x00\x00\x00\x00\x00\x00\x00\x04\
            \x00\x00\x00\x00\x04\x00\x10\x04\
            \x03ram\x00\x00\x00\x00\x04\x00\x00\x00\
            \x04mem1\x00\x00\x00\x00\x00\x00\x10\x00\
            \x00\x00\x00\x00\x00\x00\x02\x00\
            \x00\x00\x00\x00\x00\x00\x00\x10\
            \x7e\x00\x00\x00\x05";
        assert_eq!(bytes, expected);
    }

    #[test]
    fn a_page_is_of_the_block_named_last() {
        let bytes = put(|out| {
            put_section(out, SECTION_PART, 2);
            put_page(out, 0x1_2345_6000, PAGE, Some("ram")).unwrap();
            put_page(out, 0x7000, ZERO, None).unwrap();
        });
        let expected = *b"\x02\x00\x00\x00\x02\
            \x00\x00\x00\x01\x23\x45\x60\x08\x03ram\
            \x00\x00\x00\x00\x00\x00\x70\x22";
        assert_eq!(bytes, expected);
    }

    #[test]
    fn a_stream_ends_with_a_description() {
        let bytes = put(|out| {
            put_section(out, SECTION_END, 2);
            put_mark(out, EOS);
            put_footer(out, 2);
            put_end(out);
        });
        let expected = *b"\x03\x00\x00\x00\x02\
            \x00\x00\x00\x00\x00\x00\x00\x10\
            \x7e\x00\x00\x00\x02\
            \x00\x06\x00\x00\x00\x02{}";
        assert_eq!(bytes, expected);
    }

    #[test]
    fn what_does_not_fit_a_record_is_an_error() {
        let long = "x".repeat(256);
        assert!(put_page(&mut Vec::new(), 0, PAGE, Some(&long)).is_err());
        let blocks = [("a", !0xfff), ("b", 0x1000)];
        assert!(put_ram_start(&mut Vec::new(), 0, blocks.into_iter()).is_err());
    }
}
