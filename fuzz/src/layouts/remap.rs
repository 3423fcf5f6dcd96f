//! What became of each dirty page between two layouts, page by page.

use std::collections::BTreeSet;

use gleaner_bitmap::{Layout, Remapped, Slot};

use super::Page;

fn shows(slot: &Slot, (block, page): Page) -> bool {
    slot.block == block && (slot.range.first..slot.range.end()).contains(&page)
}

/// Compares what a plan made of the dirty pages with what they say themselves.
pub fn compare(old: &Layout, new: &Layout, dirty: &BTreeSet<Page>, found: &Remapped) {
    let (mut carried, mut unmapped, mut retired) = (0, 0, 0);
    for page in dirty {
        let changed = |slot: &&Slot| new.slot(slot.key) != Some(slot);
        if new.block(page.0).is_none() {
            retired += 1;
        } else if old.slots().filter(changed).any(|slot| shows(slot, *page)) {
            if new.slots().any(|slot| shows(slot, *page)) {
                carried += 1;
            } else {
                unmapped += 1;
            }
        }
    }
    assert_eq!(
        (found.carried, found.unmapped, found.retired),
        (carried, unmapped, retired)
    );
    // A block that is new has no dirty pages yet.
    let created: Vec<&Slot> = new
        .slots()
        .filter(|slot| old.slot(slot.key) != Some(slot) && old.block(slot.block).is_some())
        .collect();
    assert_eq!(found.slots.len(), created.len());
    for slot in created {
        let bits = &found.slots[&slot.key];
        assert_eq!(bits.pages(), slot.range.pages);
        for page in 0..slot.range.pages {
            let expected = dirty.contains(&(slot.block, slot.range.first + page));
            assert_eq!(bits.get(page), expected, "page {page} of {}", slot.key);
        }
    }
}
