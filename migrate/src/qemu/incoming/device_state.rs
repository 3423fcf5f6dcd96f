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
//! A guest can put bytes that look so into the state of a device. They are not taken for the end unless nothing has come
//! behind them and the description names devices whose sections came before, in their order.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::bytes::Bytes;
use crate::qemu::record::{EOF, FOOTER, SECTION_FULL, VMDESCRIPTION};
use crate::{Error, Result};

/// The most that is taken of sections and description together.
const MAX_STATE: usize = 256 << 20;
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
/// stream.
pub(super) fn read<R>(first: u8, bytes: &mut Bytes<R>) -> Result<Vec<u8>>
where
    R: FnMut(&mut [u8]) -> Result<usize>,
{
    let mut state = vec![first];
    let mut ends = Ends::default();
    loop {
        let piece = bytes.some()?;
        if piece.is_empty() {
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
        if ends.is_at(&state) {
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
}

impl Ends {
    /// Whether what has come so far is all that there is.
    fn is_at(&mut self, state: &[u8]) -> bool {
        while let Some(tail) = state[self.looked..].get(..=TAIL) {
            if tail[0] == FOOTER && tail[5..7] == [EOF, VMDESCRIPTION] && tail[TAIL] == b'{' {
                let length = u32::from_be_bytes([tail[7], tail[8], tail[9], tail[10]]);
                let begin = self.looked + TAIL;
                if let Some(end) = begin.checked_add(length as usize) {
                    self.expected.entry(end).or_default().push(begin);
                }
            }
            self.looked += 1;
        }
        self.expected = self.expected.split_off(&state.len());
        let here = self.expected.get(&state.len()).into_iter().flatten();
        here.into_iter()
            .any(|begin| describes(&state[*begin..], &state[..begin - TAIL]))
    }
}

/// Whether `text` describes these sections.
fn describes(text: &[u8], mut sections: &[u8]) -> bool {
    let Ok(description) = serde_json::from_slice::<Description>(text) else {
        return false;
    };
    if description.devices.is_empty() {
        // It would describe anything.
        return false;
    }
    for device in &description.devices {
        let Ok(length) = u8::try_from(device.name.len()) else {
            return false;
        };
        let mut head = vec![length];
        head.extend_from_slice(device.name.as_bytes());
        head.extend_from_slice(&device.instance_id.to_be_bytes());
        // Before it: the type and the id of the section.
        let found = (5..sections.len().saturating_sub(head.len()))
            .find(|at| sections[at - 5] == SECTION_FULL && sections[*at..].starts_with(&head));
        match found {
            Some(at) => sections = &sections[at + head.len()..],
            None => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

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

    /// What is read of a stream that comes in these pieces and waits after the last one.
    fn read_pieces(pieces: &[&[u8]]) -> Result<Vec<u8>> {
        let mut pieces = pieces.iter();
        let mut bytes = Bytes::new(|buffer: &mut [u8]| {
            let piece = pieces.next().copied();
            let piece = piece.ok_or(Error::Cancelled)?;
            buffer[..piece.len()].copy_from_slice(piece);
            Ok(piece.len())
        });
        bytes.u8()?;
        read(SECTION_FULL, &mut bytes)
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
            assert!(
                matches!(read_pieces(&[one]), Err(Error::Cancelled)),
                "{cut}"
            );
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
        let all = [planted, end(&devices(&["cpu"]))].concat();
        assert_eq!(read_pieces(&[&all]).unwrap(), all);
        // One whose length reaches past everything.
        let far = section(1, "cpu", b"\x7e\0\0\0\x01\0\x06\x0f\0\0\0{");
        let all = [far, end(&devices(&["cpu"]))].concat();
        assert_eq!(read_pieces(&[&all]).unwrap(), all);
    }
}
