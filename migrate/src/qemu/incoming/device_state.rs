//! What follows the memory: the sections of the devices, and where they end.
//!
//! A section of a device has no length, and what is in it is the device's own business, so the sections are kept as they
//! come. They end with EOF and a description of them all, in JSON, whose length is told. Where the source waits for an
//! answer the stream goes no further, so the end has to be recognised:
//!
//! ```text
//! FOOTER, section id, EOF, VMDESCRIPTION, length, { "devices": [ { "name": ... "instance_id": ... } ... ] ... }
//! ```
//!
//! A guest can put bytes that look so into the state of a device. They are not taken for the end unless nothing comes behind
//! them for a while and the description names devices whose sections came before, in their order, the first one first.
//! A source that awaits no answer hangs up behind the end, and is read until it does.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::bytes::Bytes;
use crate::qemu::record::{EOF, FOOTER, SECTION_FULL, VMDESCRIPTION};
use crate::{Error, Result};

/// The most that is taken of sections and description together.
const MAX_STATE: usize = 256 << 20;
/// What may look like an end that is still to come. By chance there is none.
const MAX_EXPECTED: usize = 4096;
/// Bytes from FOOTER to the description.
const TAIL: usize = 11;

#[derive(Deserialize)]
struct Description {
    devices: Vec<Device>,
}

#[derive(Deserialize)]
struct Device {
    name: String,
    instance_id: u32,
}

/// Reads the sections of the devices, the first byte of which was `first`, and what follows them, to the end of the
/// stream. Of a source that awaits an answer `more` tells whether something comes behind what may be the end.
pub(super) fn read<R>(
    first: u8,
    bytes: &mut Bytes<R>,
    mut more: Option<impl FnMut() -> Result<bool>>,
) -> Result<Vec<u8>>
where
    R: FnMut(&mut [u8]) -> Result<usize>,
{
    let mut state = vec![first];
    let mut ends = Ends::default();
    loop {
        let piece = bytes.some()?;
        if piece.is_empty() {
            if ends.is_at(&state)? {
                return Ok(state);
            }
            return Err(Error::Closed {
                during: "reading the state of the devices",
            });
        }
        if state.len() + piece.len() > MAX_STATE {
            return Err(Error::TooLong {
                what: "state of all devices (bytes)",
                length: (state.len() + piece.len()) as u64,
                cap: MAX_STATE as u64,
            });
        }
        state.extend_from_slice(piece);
        if let Some(more) = &mut more
            && ends.is_at(&state)?
            && !more()?
        {
            return Ok(state);
        }
    }
}

/// Where descriptions would end, if they are some.
#[derive(Default)]
struct Ends {
    /// Bytes that were looked at.
    looked: usize,
    /// Begin of what may be a description, by its end.
    expected: BTreeMap<usize, Vec<usize>>,
    /// How many have been.
    count: usize,
}

impl Ends {
    /// Whether what has come so far is all that there is.
    fn is_at(&mut self, state: &[u8]) -> Result<bool> {
        while let Some(tail) = state[self.looked..].get(..=TAIL) {
            if tail[0] == FOOTER && tail[5..7] == [EOF, VMDESCRIPTION] && tail[TAIL] == b'{' {
                let length = u32::from_be_bytes([tail[7], tail[8], tail[9], tail[10]]);
                let begin = self.looked + TAIL;
                if let Some(end) = begin.checked_add(length as usize)
                    && end <= MAX_STATE
                {
                    self.expect(begin, end, state.len())?;
                }
            }
            self.looked += 1;
        }
        let here = self.expected.get(&state.len()).into_iter().flatten();
        Ok(here
            .into_iter()
            .any(|begin| describes(&state[*begin..], &state[..begin - TAIL])))
    }

    /// A description may begin and end here. `now` is the end of what has come.
    fn expect(&mut self, begin: usize, end: usize, now: usize) -> Result<()> {
        if end < now {
            return Ok(());
        }
        self.count += 1;
        if self.count > MAX_EXPECTED {
            return Err(Error::TooLong {
                what: "row of what may be the end of the devices' state",
                length: self.count as u64,
                cap: MAX_EXPECTED as u64,
            });
        }
        self.expected.entry(end).or_default().push(begin);
        Ok(())
    }
}

/// Whether `text` describes these sections, the first of which is the first that came. One without devices would describe
/// anything.
fn describes(text: &[u8], mut sections: &[u8]) -> bool {
    let Ok(description) = serde_json::from_slice::<Description>(text) else {
        return false;
    };
    for (number, device) in description.devices.iter().enumerate() {
        let Ok(length) = u8::try_from(device.name.len()) else {
            return false;
        };
        let mut head = vec![length];
        head.extend_from_slice(device.name.as_bytes());
        head.extend_from_slice(&device.instance_id.to_be_bytes());
        // Before it: the type and the id of the section.
        let most = sections.len().saturating_sub(head.len());
        let most = if number == 0 { most.min(6) } else { most };
        let found = (5..most)
            .find(|at| sections[at - 5] == SECTION_FULL && sections[*at..].starts_with(&head));
        match found {
            Some(at) => sections = &sections[at + head.len()..],
            None => return false,
        }
    }
    !description.devices.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    fn section(id: u8, name: &str, body: &[u8]) -> Vec<u8> {
        let length = u8::try_from(name.len()).unwrap();
        let head = [&[SECTION_FULL, 0, 0, 0, id, length], name.as_bytes()].concat();
        [
            &head,
            &[0, 0, 0, 3, 0, 0, 0, 1][..],
            body,
            &[FOOTER, 0, 0, 0, id],
        ]
        .concat()
    }

    fn end(text: &str) -> Vec<u8> {
        let length = u32::try_from(text.len()).unwrap().to_be_bytes();
        [&[EOF, VMDESCRIPTION], &length[..], text.as_bytes()].concat()
    }

    fn devices(names: &[&str]) -> String {
        let each = names.iter().map(|name| {
            format!(
                r#"{{"name":"{name}","instance_id":3,"vmsd_name":"x","fields":[{{"size":4}}]}}"#
            )
        });
        let all: Vec<_> = each.collect();
        format!(r#"{{"page_size":4096,"devices":[{}]}}"#, all.join(","))
    }

    /// What is read of a stream that comes in these pieces and waits for an answer after the last one.
    fn read_pieces(pieces: &[&[u8]]) -> Result<Vec<u8>> {
        let left = Cell::new(pieces);
        let mut bytes = Bytes::new(|buffer: &mut [u8]| {
            let (piece, rest) = left.get().split_first().ok_or(Error::Cancelled)?;
            left.set(rest);
            buffer[..piece.len()].copy_from_slice(piece);
            Ok(piece.len())
        });
        bytes.u8()?;
        let more = || Ok(!left.get().is_empty());
        read(SECTION_FULL, &mut bytes, Some(more))
    }

    /// What is read of a stream that comes in these pieces and ends behind the last one.
    fn read_to_end(pieces: &[&[u8]]) -> Result<Vec<u8>> {
        let mut pieces = pieces.iter();
        let mut bytes = Bytes::new(|buffer: &mut [u8]| {
            let piece = pieces.next().copied().unwrap_or_default();
            buffer[..piece.len()].copy_from_slice(piece);
            Ok(piece.len())
        });
        bytes.u8()?;
        read(SECTION_FULL, &mut bytes, None::<fn() -> Result<bool>>)
    }

    #[test]
    fn no_more_is_kept_in_mind_than_has_been_agreed() {
        let far = b"\x7e\0\0\0\x01\0\x06\x0f\0\0\0{";
        let many = section(1, "cpu", &far.repeat(MAX_EXPECTED + 1));
        let all = [many, end(&devices(&["cpu"]))].concat();
        let read = read_pieces(&[&all]);
        assert!(matches!(read, Err(Error::TooLong { .. })), "{read:?}");
    }

    #[test]
    fn the_end_is_seen_however_the_bytes_come() {
        let all = [
            section(1, "timer", b"0123"),
            section(2, "cpu", b"\x7e\0\0\0\x01\0\x06\0\0\0\x02{}"),
            end(&devices(&["timer", "cpu"])),
        ]
        .concat();
        for cut in 1..all.len() {
            let (one, two) = all.split_at(cut);
            assert_eq!(read_pieces(&[one, two]).unwrap(), all, "{cut}");
            assert_eq!(read_to_end(&[one, two]).unwrap(), all, "{cut}");
            assert!(
                matches!(read_pieces(&[one]), Err(Error::Cancelled)),
                "{cut}"
            );
            let half = read_to_end(&[one]);
            assert!(matches!(half, Err(Error::Closed { .. })), "{cut}");
        }
    }

    #[test]
    fn what_a_guest_puts_into_a_device_is_not_the_end() {
        let false_end = |text: &str| [&[FOOTER, 0, 0, 0, 1], &end(text)[..]].concat();
        let other = devices(&["another"]);
        for text in ["{}", "{\"devices\":0}", "{\"devices\":[]}", &other] {
            let planted = section(1, "cpu", &false_end(text));
            let cut = planted.len() - 5; // just behind what was planted
            let all = [planted, end(&devices(&["cpu"]))].concat();
            assert_eq!(read_pieces(&[&all[..cut], &all[cut..]]).unwrap(), all);
        }
        // A device that exists: only what comes behind tells.
        let planted = section(1, "cpu", &false_end(&devices(&["cpu"])));
        let cut = planted.len() - 5;
        let all = [planted, end(&devices(&["cpu"]))].concat();
        let pieces = [&all[..cut], &all[cut..]];
        assert_eq!(read_pieces(&[&all]).unwrap(), all);
        assert_eq!(read_pieces(&pieces).unwrap(), all);
        assert_eq!(read_to_end(&pieces).unwrap(), all);
        // One that is not the first: the description is of others too.
        let before = section(1, "timer", b"0123");
        let planted = section(2, "cpu", &false_end(&devices(&["cpu"])));
        let all = [before, planted].concat();
        let cut = all.len() - 5;
        assert!(matches!(read_pieces(&[&all[..cut]]), Err(Error::Cancelled)));
        // One whose length reaches past everything.
        let far = section(1, "cpu", b"\x7e\0\0\0\x01\0\x06\x0f\0\0\0{");
        let all = [far, end(&devices(&["cpu"]))].concat();
        assert_eq!(read_pieces(&[&all]).unwrap(), all);
    }
}
