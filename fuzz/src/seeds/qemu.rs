//! Streams of a QEMU, written down from the format.

use super::Seed;

const BEGUN: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x04none";
const RETURN_PATH: &[u8] = b"\x08\0\x01\0\0\x08\0\x02\0\x04abcd";
/// Two pages of `ram`.
const START: &[u8] =
    b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\x20\x04\x03ram\0\0\0\0\0\0\x20\0";
const MARK: &[u8] = b"\0\0\0\0\0\0\x02\0";
const END_OF_SECTION: &[u8] = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02";
const PART: &[u8] = b"\x02\0\0\0\x02";
const LAST: &[u8] = b"\x03\0\0\0\x02";
/// Page 0, as it is.
const WHOLE: &[u8] = b"\0\0\0\0\0\0\0\x08\x03ram";
/// Page 1, and page 1 as what has changed of it.
const ZERO: &[u8] = b"\0\0\0\0\0\0\x10\x22\0";
const DELTA: &[u8] = b"\0\0\0\0\0\0\x10\x60\x01\0\x05\xac\x02\x02\x09\x08";
const NO_DEVICES: &[u8] = b"\0\x06\0\0\0\x02{}";
const DEVICES: &[u8] = b"\x04\0\0\0\x01\x05timer\0\0\0\0\0\0\0\x02ticks\x7e\0\0\0\x01\
    \0\x06\0\0\0\x2e{\"devices\":[{\"name\":\"timer\",\"instance_id\":0}]}";

/// The seeds of the target.
pub fn seeds() -> Vec<Seed> {
    let page = [0x5a; 4096];
    let uuid: &[u8] = b"\x05\x12configuration/uuid\0\0\0\x010123456789abcdef";
    let all = |parts: &[&[u8]]| parts.concat();
    let memory: &[&[u8]] = &[WHOLE, &page, ZERO, END_OF_SECTION];
    let memory = memory.concat();
    [
        (
            "completes",
            all(&[
                BEGUN,
                RETURN_PATH,
                START,
                END_OF_SECTION,
                PART,
                &memory,
                LAST,
                DELTA,
                END_OF_SECTION,
                DEVICES,
            ]),
        ),
        (
            "without-devices",
            all(&[BEGUN, START, END_OF_SECTION, LAST, &memory, NO_DEVICES]),
        ),
        (
            "with-marks",
            all(&[
                BEGUN,
                uuid,
                START,
                MARK,
                END_OF_SECTION,
                PART,
                &memory,
                LAST,
                MARK,
                END_OF_SECTION,
                NO_DEVICES,
            ]),
        ),
        (
            "never-came",
            all(&[
                BEGUN,
                START,
                END_OF_SECTION,
                LAST,
                WHOLE,
                &page,
                END_OF_SECTION,
                DEVICES,
            ]),
        ),
        (
            "delta-of-nothing",
            all(&[BEGUN, START, END_OF_SECTION, LAST, WHOLE, &page, DELTA]),
        ),
        (
            "ends-early",
            all(&[BEGUN, START, END_OF_SECTION, PART, WHOLE]),
        ),
        (
            "claims-much",
            all(&[
                BEGUN,
                &START[..17],
                b"\xff\xff\xff\xff\xff\xff\xf0\x04\x01r\xff\xff\xff\xff\xff\xff\xf0\0",
            ]),
        ),
    ]
    .map(|(name, bytes)| (name.into(), bytes))
    .into()
}
