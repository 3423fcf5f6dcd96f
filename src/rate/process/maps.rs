//! Where the guest's RAM is in a process.

use std::fmt;
use std::str::FromStr;

use gleaner_bitmap::PAGE_SIZE;

/// A piece of a process's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AddressRange {
    /// Its first byte.
    pub address: u64,
    /// Its length.
    pub bytes: u64,
}

impl fmt::Display for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.address, self.bytes)
    }
}

/// `ADDR+LEN`: the address in hex with 0x, or in decimal; the length with K, M, G or T. Whole pages.
impl FromStr for AddressRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("\"{text}\" is no range: write ADDR+LEN, as in 0x7f0000000000+1G");
        let (address, bytes) = text.split_once('+').ok_or_else(bad)?;
        let range = Self {
            address: number(address).ok_or_else(bad)?,
            bytes: length(bytes).ok_or_else(bad)?,
        };
        let whole = [range.address, range.bytes]
            .iter()
            .all(|n| n.is_multiple_of(PAGE_SIZE));
        if !whole || range.bytes == 0 || range.end().is_none() {
            return Err(format!(
                "\"{text}\" is no range of whole pages of 4096 bytes"
            ));
        }
        Ok(range)
    }
}

fn number(text: &str) -> Option<u64> {
    let (digits, radix) = text.strip_prefix("0x").map_or((text, 10), |hex| (hex, 16));
    let plain = digits.bytes().all(|b| b.is_ascii_hexdigit());
    u64::from_str_radix(digits, radix).ok().filter(|_| plain)
}

fn length(text: &str) -> Option<u64> {
    let shift = match text.bytes().last()?.to_ascii_uppercase() {
        _ if text.starts_with("0x") => 0,
        b'K' => 10,
        b'M' => 20,
        b'G' => 30,
        b'T' => 40,
        _ => 0,
    };
    let digits = if shift > 0 {
        &text[..text.len() - 1]
    } else {
        text
    };
    number(digits)?.checked_mul(1 << shift)
}

impl AddressRange {
    const fn end(self) -> Option<u64> {
        self.address.checked_add(self.bytes)
    }
}

/// No guest's RAM is smaller, in bytes.
const LEAST: u64 = 16 << 20;
/// What is smaller than the largest by so much is something else.
const SMALL: u64 = 16;
/// More pieces than any guest has.
const MOST: usize = 256;

/// A mapping.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Mapping {
    start: u64,
    end: u64,
    writable: bool,
    executable: bool,
    shared: bool,
    offset: u64,
    inode: u64,
    path: String,
}

impl Mapping {
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.splitn(6, ' ');
        let mut word = || words.next();
        let (start, end) = word()?.split_once('-')?;
        let access = word()?.as_bytes();
        let offset = word()?;
        let _device = word()?;
        let inode = word()?;
        let path = word().unwrap_or_default().trim();
        let hex = |text| u64::from_str_radix(text, 16).ok();
        Some(Self {
            start: hex(start)?,
            end: hex(end)?,
            writable: access.get(1) == Some(&b'w'),
            executable: access.get(2) == Some(&b'x'),
            shared: access.get(3) == Some(&b's'),
            offset: hex(offset)?,
            inode: inode.parse().ok()?,
            path: path.to_owned(),
        })
    }

    /// Whether it could be a guest's RAM: no program, no stack, no device.
    fn is_ram(&self) -> bool {
        let path = self.path.as_str();
        let kept_in_memory = path.is_empty()
            || [
                "[anon",
                "/memfd:",
                "/dev/shm/",
                "/dev/zero",
                "/dev/hugepages",
                "/anon_hugepage",
            ]
            .iter()
            .any(|start| path.starts_with(start));
        let file = self.shared && path.starts_with('/') && !path.starts_with("/dev/");
        self.writable && !self.executable && (kept_in_memory || file)
    }

    /// Whether `next` goes on where this one ends, of the same memory.
    fn goes_on(&self, next: &Self) -> bool {
        let same = self.path == next.path && self.inode == next.inode && self.shared == next.shared;
        let offset = self.inode == 0 || self.offset + (self.end - self.start) == next.offset;
        self.end == next.start && same && offset
    }

    /// A name for people, of what a block's name may hold.
    fn name(&self) -> String {
        let path = self.path.trim_end_matches(" (deleted)");
        let name = path.rsplit('/').next().unwrap_or_default();
        let name = name.trim_matches(['[', ']']);
        let good = |c: char| c.is_ascii_alphanumeric() || "._-:".contains(c);
        let name: String = name.chars().filter(|c| good(*c)).take(40).collect();
        let name = name.trim_start_matches('.');
        if name.is_empty() {
            "anonymous".into()
        } else {
            name.into()
        }
    }
}

fn mappings(maps: &str) -> impl Iterator<Item = Mapping> + '_ {
    maps.lines().filter_map(Mapping::parse)
}

/// Names and places of what a guest's RAM is likely to be; `None` if there is nothing.
pub(super) fn guest_ram(maps: &str) -> Option<Vec<(String, AddressRange)>> {
    let mut found: Vec<Mapping> = Vec::new();
    for next in mappings(maps).filter(Mapping::is_ram) {
        match found.last_mut() {
            Some(last) if last.goes_on(&next) => last.end = next.end,
            _ => found.push(next),
        }
    }
    let bytes = |mapping: &Mapping| mapping.end - mapping.start;
    let largest = found.iter().map(bytes).max()?;
    found.retain(|mapping| bytes(mapping) >= LEAST.max(largest / SMALL));
    // What is mapped twice is the same memory.
    let mut once: Vec<Mapping> = Vec::new();
    for mapping in found {
        let same = |other: &Mapping| {
            let apart = mapping.offset >= other.offset + bytes(other)
                || other.offset >= mapping.offset + bytes(&mapping);
            mapping.inode != 0
                && mapping.inode == other.inode
                && mapping.path == other.path
                && !apart
        };
        if !once.iter().any(same) && once.len() < MOST {
            once.push(mapping);
        }
    }
    let named = once.iter().map(|mapping| {
        let name = mapping.name();
        let alone = once.iter().filter(|other| other.name() == name).count() == 1;
        let name = if alone {
            name
        } else {
            format!("{name}@{:x}", mapping.start)
        };
        let range = AddressRange {
            address: mapping.start,
            bytes: bytes(mapping),
        };
        (name, range)
    });
    let named: Vec<_> = named.collect();
    (!named.is_empty()).then_some(named)
}

/// The same of ranges that are given; the first that is not there is the error.
pub(super) fn given(
    maps: &str,
    ranges: &[AddressRange],
) -> Result<Vec<(String, AddressRange)>, AddressRange> {
    let named = ranges.iter().map(|range| {
        let mut next = range.address;
        let end = range.end().ok_or(*range)?;
        for mapping in mappings(maps) {
            if mapping.start <= next && next < mapping.end {
                next = mapping.end;
            }
        }
        let name = format!("{:#x}", range.address);
        if next >= end {
            Ok((name, *range))
        } else {
            Err(*range)
        }
    });
    named.collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // helpers are not known to be tests
    use super::*;

    const QEMU: &str = "\
55d0c0000000-55d0c0400000 r--p 00000000 08:01 1000  /usr/bin/qemu-system-x86_64
55d0c2000000-55d0c4000000 rw-p 00000000 00:00 0     [heap]
7f0000000000-7f0040000000 rwxp 00000000 00:00 0
7f1000000000-7f1020000000 rw-p 00000000 00:00 0
7f1020000000-7f1040000000 rw-p 00000000 00:00 0
7f1040000000-7f1040001000 ---p 00000000 00:00 0
7f1050000000-7f1051000000 rw-p 00000000 00:00 0
7f1060000000-7f1080000000 rw-s 00000000 00:01 77    /memfd:memory-backend-memfd (deleted)
7f1090000000-7f10b0000000 rw-s 00000000 00:01 77    /memfd:memory-backend-memfd (deleted)
7f10c0000000-7f10d0000000 rw-s 00000000 00:05 12    /dev/vfio/3
7f10e0000000-7f10e0001000 rw-s 00000000 00:10 1038  anon_inode:kvm-vcpu:0
nonsense
";

    #[test]
    fn what_is_large_and_written_and_no_device_is_ram() {
        let found = guest_ram(QEMU).unwrap();
        let found: Vec<_> = found
            .iter()
            .map(|(n, r)| (n.as_str(), r.to_string()))
            .collect();
        let expected = [
            ("anonymous", "0x7f1000000000+0x40000000"),
            ("memfd:memory-backend-memfd", "0x7f1060000000+0x20000000"),
        ];
        let expected = expected.map(|(name, range)| (name, range.to_owned()));
        assert_eq!(found, expected);
    }

    #[test]
    fn pieces_of_one_file_that_do_not_go_on_are_two_of_different_names() {
        let maps = "\
7f0000000000-7f0001000000 rw-s 00000000 00:01 5 /memfd:a b (deleted)
7f0001000000-7f0002000000 rw-s 10000000 00:01 5 /memfd:a b (deleted)
";
        let names: Vec<_> = guest_ram(maps)
            .unwrap()
            .into_iter()
            .map(|found| found.0)
            .collect();
        assert_eq!(names, ["memfd:ab@7f0000000000", "memfd:ab@7f0001000000"]);
    }

    #[test]
    fn a_process_without_large_memory_is_no_guest() {
        assert_eq!(guest_ram(""), None);
        let small = "7f0000000000-7f0000fff000 rw-p 00000000 00:00 0 \n";
        assert_eq!(guest_ram(small), None);
    }

    #[test]
    fn a_range_is_read_as_it_is_written_or_refused() {
        let range = |text: &str| text.parse::<AddressRange>().map(|r| (r.address, r.bytes));
        assert_eq!(range("0x7f0000000000+1G"), Ok((0x7f00_0000_0000, 1 << 30)));
        assert_eq!(range("8192+64k"), Ok((8192, 65536)));
        assert_eq!(range("0x1000+0x2000"), Ok((4096, 8192)));
        for bad in [
            "",
            "+",
            "1G",
            "0x1000+",
            "0x1000+0",
            "7+4K",
            "4096+7",
            "x+4K",
            "0x+4K",
            "4096+-4K",
            "0xfffffffffffff000+8K",
            "++",
            "4096+4K+4K",
            "4096+µ",
        ] {
            assert!(range(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_given_range_has_to_be_there_all_of_it() {
        let all: AddressRange = "0x7f1000000000+1G".parse().unwrap();
        assert!(given(QEMU, &[all]).is_ok());
        let more: AddressRange = "0x7f1000000000+1025M".parse().unwrap();
        assert_eq!(given(QEMU, &[all, more]), Err(more));
    }
}
