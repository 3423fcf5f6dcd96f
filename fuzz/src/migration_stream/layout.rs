//! Whether what a peer describes is a layout, judged without the product's code.

use std::collections::{BTreeMap, BTreeSet};

use gleaner_migrate::wire::{LayoutBody, MAX_BLOCKS};

/// Where x86 can address no more.
const END: u128 = 1 << 52;

/// Lets the product judge, and compares.
pub fn check(body: LayoutBody) {
    let good = is_layout(&body);
    let Ok(layout) = body.clone().check() else {
        assert!(!good, "refused: {body:?}");
        return;
    };
    assert!(good, "taken: {body:?}");
    assert_eq!(layout.generation(), body.generation);
    assert_eq!(layout.blocks().len(), body.blocks.len());
    assert_eq!(layout.slots().len(), body.slots.len());
    assert!(body.blocks.iter().all(|b| layout.block(b.id) == Some(b)));
    assert!(body.slots.iter().all(|s| layout.slot(s.key) == Some(s)));
}

fn is_layout(body: &LayoutBody) -> bool {
    let mut names = BTreeSet::new();
    let mut lengths = BTreeMap::new();
    for block in &body.blocks {
        let name = block.name.as_bytes();
        let fit = (1..=64).contains(&name.len())
            && name[0] != b'.'
            && name
                .iter()
                .all(|b| b.is_ascii_alphanumeric() || b"._-:@".contains(b));
        let pages = u128::from(block.pages);
        let new = names.insert(&block.name) && lengths.insert(block.id, pages).is_none();
        if !fit || !new || pages == 0 || pages * 4096 > END {
            return false;
        }
    }
    let mut taken: Vec<(u16, u128, u128)> = Vec::new();
    let mut keys = BTreeSet::new();
    for slot in &body.slots {
        let (first, pages) = (u128::from(slot.range.first), u128::from(slot.range.pages));
        let Some(length) = lengths.get(&slot.block) else {
            return false;
        };
        let start = u128::from(slot.gpa);
        let end = start + pages * 4096;
        let inside = pages > 0 && first + pages <= *length && start % 4096 == 0 && end <= END;
        let space = slot.key.address_space;
        let free = taken
            .iter()
            .all(|(other, from, to)| *other != space || end <= *from || *to <= start);
        if !inside || !free || !keys.insert(slot.key) {
            return false;
        }
        taken.push((space, start, end));
    }
    body.blocks.len() <= MAX_BLOCKS
}
