//! Memory for the longest messages, which no search for inputs comes to: at most four times their limit.

use gleaner::service::Response;
use gleaner_fuzz::allocations::capped;
use gleaner_migrate::wire::{Kind, MAX_METADATA, Message};

/// Bytes that claim 2^32 entries after `start`, and then are zeros: entries as short as can be.
fn list(start: &[u8], length: usize) -> Vec<u8> {
    let mut bytes = start.to_vec();
    bytes.push(252);
    bytes.extend(u32::MAX.to_le_bytes());
    bytes.resize(length, 0);
    bytes
}

#[test]
fn the_longest_layout_frame() {
    let limit = MAX_METADATA as usize;
    // Generation; then blocks, or no blocks and slots.
    for start in [&[1][..], &[1, 0]] {
        let bytes = list(start, limit);
        let decoded = capped(4 * limit, || Message::decode(Kind::Layout, &bytes));
        assert!(decoded.is_err());
    }
}

#[test]
fn the_longest_list_of_extents() {
    let (metadata, _) = Kind::Pages.caps();
    let bytes = list(&[1], metadata as usize);
    let decoded = capped(4 << 20, || Message::decode(Kind::Pages, &bytes));
    assert!(decoded.is_err());
}

#[test]
fn the_longest_list_of_packed_pages() {
    let (metadata, _) = Kind::Packed.caps();
    // No extents, and a codec.
    let bytes = list(&[1, 0, 2], metadata as usize);
    let decoded = capped(1 << 20, || Message::decode(Kind::Packed, &bytes));
    assert!(decoded.is_err());
}

#[test]
fn the_longest_response() {
    // Layout: generation; then blocks, or no blocks and slots.
    for start in [&[2, 1][..], &[2, 1, 0]] {
        let bytes = list(start, Response::LIMIT);
        let decoded = capped(4 * Response::LIMIT, || Response::decode(&bytes));
        assert!(decoded.is_err());
    }
}
