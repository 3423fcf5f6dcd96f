//! The fewest KVM calls between two layouts.

use std::collections::BTreeMap;

use gleaner_bitmap::{Layout, Slot, SlotKey};
use gleaner_ring::{MemslotCall, Region};

/// The calls, in the order in which KVM takes them: deletes, moves ordered by what they free, creates.
///
/// A slot that is the same in both layouts costs nothing, here neither. One that shows the same pages elsewhere is moved. Everything else
/// (another length, block, offset, access) is deleted and created: KVM has no other way. So is one move of each cycle.
pub fn plan(old: &Layout, new: &Layout, region: impl Fn(&Slot) -> Region) -> Vec<MemslotCall> {
    let mut deletes = Vec::new();
    let mut creates = Vec::new();
    let mut moves: BTreeMap<SlotKey, (Slot, Slot)> = BTreeMap::new();
    for (was, is) in old.slot_changes(new) {
        if let (Some(was), Some(is)) = (was, is)
            && is.same_backing(was)
        {
            moves.insert(was.key, (*was, *is));
        } else {
            deletes.extend(was);
            creates.extend(is);
        }
    }

    let mut ordered = Vec::new();
    while !moves.is_empty() {
        let free: Vec<SlotKey> = moves
            .values()
            .filter(|(from, to)| {
                !moves
                    .values()
                    .any(|(other, _)| other.key != from.key && other.overlaps(to))
            })
            .map(|(from, _)| from.key)
            .collect();
        if free.is_empty() {
            // Only cycles and what waits for them are left: break one.
            if let Some((_, (from, to))) = moves.pop_first() {
                deletes.push(from);
                creates.push(to);
            }
        }
        for key in free {
            // Two moves freed in the same turn don't meet: their targets are disjoint in the new layout.
            ordered.extend(moves.remove(&key));
        }
    }
    let deletes = deletes.iter().map(|s| MemslotCall::Delete(region(s)));
    let moves = ordered.iter().map(|(from, to)| MemslotCall::Move {
        from: region(from),
        to: region(to),
    });
    let creates = creates.iter().map(|s| MemslotCall::Create(region(s)));
    deletes.chain(moves).chain(creates).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Block;
    use gleaner_bitmap::{BlockInfo, LayoutEditor, PAGE_SIZE, PageRange};
    use proptest::prelude::*;

    fn block() -> Block {
        Block::memfd("ram", 64 * PAGE_SIZE).unwrap()
    }

    fn editor(block: &Block) -> LayoutEditor {
        let mut e = Layout::empty(100).edit();
        let info = BlockInfo::new(block.id(), "ram", 64 * PAGE_SIZE).unwrap();
        e.add_block(info).unwrap();
        e
    }

    fn slot(block: &Block, id: u16, gpa_page: u64, first: u64, pages: u64) -> Slot {
        Slot {
            key: id.into(),
            gpa: gpa_page * PAGE_SIZE,
            block: block.id(),
            range: PageRange::new(first, pages),
            readonly: false,
        }
    }

    fn region(block: &Block) -> impl Fn(&Slot) -> Region {
        let host = block.host();
        move |s| Region {
            key: s.key,
            gpa: s.gpa,
            host: host
                .part(s.range.first * PAGE_SIZE, s.range.pages * PAGE_SIZE)
                .unwrap(),
            log: true,
            readonly: s.readonly,
        }
    }

    /// What KVM would say: the layout after the calls, or the call that overlaps.
    fn simulate(calls: &[MemslotCall]) -> Result<Vec<(SlotKey, u64, u64, u64)>, String> {
        let mut table: BTreeMap<SlotKey, (u64, u64, u64)> = BTreeMap::new();
        for call in calls {
            let region = match call {
                MemslotCall::Delete(r) => {
                    table.remove(&r.key);
                    continue;
                }
                MemslotCall::Create(r)
                | MemslotCall::Move { to: r, .. }
                | MemslotCall::Flags { to: r, .. } => r,
            };
            let end = region.gpa + region.host.bytes();
            for (key, (gpa, bytes, _)) in &table {
                if *key != region.key && region.gpa < gpa + bytes && *gpa < end {
                    return Err(format!("EEXIST: {} over {key}", region.key));
                }
            }
            table.insert(
                region.key,
                (region.gpa, region.host.bytes(), region.host.addr()),
            );
        }
        Ok(table
            .into_iter()
            .map(|(k, (g, b, a))| (k, g, b, a))
            .collect())
    }

    fn layout(block: &Block, pieces: &[(u16, u64, u64, u64)]) -> Layout {
        let mut chosen: Vec<Slot> = Vec::new();
        for &(id, gpa, first, pages) in pieces {
            let piece = slot(block, id, gpa, first, pages.min(64 - first));
            if !chosen
                .iter()
                .any(|s| s.key == piece.key || s.overlaps(&piece))
            {
                chosen.push(piece);
            }
        }
        let mut e = editor(block);
        chosen.into_iter().for_each(|s| e.create(s).unwrap());
        e.finish().unwrap()
    }

    #[test]
    fn swapping_two_slots_breaks_the_cycle_with_one_delete_and_create() {
        let block = block();
        let old = layout(&block, &[(1, 0, 0, 8), (2, 8, 8, 8), (3, 16, 16, 8)]);
        let new = layout(&block, &[(1, 8, 0, 8), (2, 0, 8, 8), (3, 24, 16, 8)]);
        let calls = plan(&old, &new, region(&block));
        let kinds: Vec<_> = calls
            .iter()
            .map(|c| match c {
                MemslotCall::Delete(_) => 'd',
                MemslotCall::Move { .. } => 'm',
                MemslotCall::Create(_) => 'c',
                MemslotCall::Flags { .. } => 'f',
            })
            .collect();
        assert_eq!(kinds.iter().filter(|k| **k == 'd').count(), 1);
        assert_eq!(kinds.iter().filter(|k| **k == 'm').count(), 2);
        assert_eq!(calls.len(), 4);
    }

    #[test]
    fn a_chain_of_moves_needs_no_delete() {
        let block = block();
        let old = layout(&block, &[(1, 0, 0, 8), (2, 8, 8, 8), (3, 16, 16, 8)]);
        let new = layout(&block, &[(1, 4, 0, 8), (2, 12, 8, 8), (3, 20, 16, 8)]);
        let calls = plan(&old, &new, region(&block));
        assert!(calls.iter().all(|c| matches!(c, MemslotCall::Move { .. })));
        assert_eq!(calls.len(), 3);
    }

    proptest! {
        #[test]
        fn the_calls_lead_to_the_new_layout_and_never_overlap_on_the_way(
            a in proptest::collection::vec((0u16..6, 0u64..40, (0u64..4).prop_map(|n| n * 8), 1u64..12), 0..6),
            b in proptest::collection::vec((0u16..6, 0u64..40, (0u64..4).prop_map(|n| n * 8), 1u64..12), 0..6),
        ) {
            let block = block();
            let (old, new) = (layout(&block, &a), layout(&block, &b));
            let region = region(&block);
            let build: Vec<_> = old.slots().map(|s| MemslotCall::Create(region(s))).collect();
            let calls = plan(&old, &new, &region);
            let all: Vec<_> = build.iter().chain(&calls).cloned().collect();
            let want: Vec<_> = new.slots().map(|s| {
                let r = region(s);
                (r.key, r.gpa, r.host.bytes(), r.host.addr())
            }).collect();
            prop_assert_eq!(simulate(&all), Ok(want));
            prop_assert!(plan(&new, &new, &region).is_empty());
            // Undone in reverse, the old layout is back.
            let back: Vec<_> = all.iter().cloned().chain(calls.iter().rev().map(MemslotCall::inverse)).collect();
            let was: Vec<_> = old.slots().map(|s| {
                let r = region(s);
                (r.key, r.gpa, r.host.bytes(), r.host.addr())
            }).collect();
            prop_assert_eq!(simulate(&back), Ok(was));
        }
    }
}
