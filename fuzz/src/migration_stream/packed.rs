//! What packed pages are, worked out without the product's code.

use gleaner_migrate::Compress;
use gleaner_migrate::wire::PackedBody;

/// The payload of a frame that was taken, expanded.
pub fn expanded(packed: &PackedBody, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; packed.contents()];
    let length = match packed.codec {
        Compress::None => {
            bytes.copy_from_slice(payload);
            payload.len()
        }
        Compress::Lz4 => lz4_flex::block::decompress_into(payload, &mut bytes).expect("lz4"),
        Compress::Zstd => {
            bytes = zstd::bulk::decompress(payload, packed.contents()).expect("zstd");
            bytes.len()
        }
    };
    assert_eq!(length, packed.contents());
    bytes
}

/// Applies a delta that was taken, byte by byte.
pub fn change(page: &mut [u8], delta: &[u8]) {
    let mut delta = delta.iter().copied();
    let mut at = 0;
    while let Some(skip) = number(&mut delta) {
        at += skip;
        for _ in 0..number(&mut delta).expect("a length") {
            page[at] = delta.next().expect("a byte");
            at += 1;
        }
    }
}

fn number(bytes: &mut impl Iterator<Item = u8>) -> Option<usize> {
    let low = usize::from(bytes.next()?);
    if low < 0x80 {
        return Some(low);
    }
    let high = bytes.next().expect("a second byte");
    Some(low - 0x80 + 0x80 * usize::from(high))
}
