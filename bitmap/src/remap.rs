//! From one layout to the next: where the dirty pages are afterwards.

use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;

use crate::{BlockId, Layout, PageBitmap, PageRange, Slot, SlotKey};

/// What changes for dirty pages between two layouts. It looks only at slots that differ, so its cost follows the change.
///
/// The bits themselves live by (block, page) and do not move; a plan says what becomes of them and produces the bitmaps
/// of the slots that are new, for those who think in slots.
#[derive(Debug)]
pub struct RemapPlan {
    /// Slots of the new layout that the old one does not have in this form.
    created: Vec<Slot>,
    /// Pages that slots showed which no longer exist in this form, by block, disjoint and sorted.
    left: BTreeMap<BlockId, Vec<PageRange>>,
    /// Of the pages in `left`: those that the new layout maps, disjoint and sorted.
    mapped: BTreeMap<BlockId, Vec<PageRange>>,
    retired: Vec<BlockId>,
}

/// What a plan made of a set of dirty pages.
#[derive(Debug, Default)]
pub struct Remapped {
    /// Bitmaps of the slots that are new or changed.
    pub slots: BTreeMap<SlotKey, PageBitmap>,
    /// Dirty pages of changed slots that the new layout maps.
    pub carried: u64,
    /// Dirty pages of changed slots that no slot maps any more; they stay dirty in their block.
    pub unmapped: u64,
    /// Dirty pages of blocks that the change removed.
    pub retired: u64,
}

/// Sorts ranges and joins those that meet.
fn union(mut ranges: Vec<PageRange>) -> Vec<PageRange> {
    ranges.sort_unstable();
    let mut joined: Vec<PageRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.first <= last.end() => {
                last.pages = last.pages.max(range.end() - last.first);
            }
            _ => joined.push(range),
        }
    }
    joined
}

impl RemapPlan {
    /// The plan from `old` to `new`.
    #[must_use]
    pub fn between(old: &Layout, new: &Layout) -> Self {
        let mut created = Vec::new();
        let mut left: BTreeMap<BlockId, Vec<PageRange>> = BTreeMap::new();
        for (was, is) in old.slot_changes(new) {
            created.extend(is.copied());
            if let Some(slot) = was {
                left.entry(slot.block).or_default().push(slot.range);
            }
        }
        let mut mapped: BTreeMap<BlockId, Vec<PageRange>> = BTreeMap::new();
        for (&block, ranges) in &mut left {
            *ranges = union(std::mem::take(ranges));
            let still = ranges.iter().flat_map(|range| new.mapped(block, *range));
            mapped.insert(block, still.collect());
        }
        let retired = old
            .block_changes(new)
            .filter_map(|(was, is)| is.is_none().then_some(was?.id))
            .collect();
        Self {
            created,
            left,
            mapped,
            retired,
        }
    }

    /// The blocks whose dirty pages [`RemapPlan::apply`] wants to see.
    #[must_use]
    pub fn blocks(&self) -> Vec<BlockId> {
        let mut all: BTreeSet<BlockId> = self.left.keys().copied().collect();
        all.extend(self.created.iter().map(|s| s.block));
        all.extend(&self.retired);
        all.into_iter().collect()
    }

    /// Applies the plan to the dirty pages of [`RemapPlan::blocks`], slots in parallel. Blocks that `dirty` lacks are clean.
    #[must_use]
    pub fn apply(&self, dirty: &BTreeMap<BlockId, PageBitmap>) -> Remapped {
        let slots = self
            .created
            .par_iter()
            .filter_map(|slot| Some((slot.key, dirty.get(&slot.block)?.slice(slot.range))))
            .collect();
        let mut out = Remapped {
            slots,
            ..Remapped::default()
        };
        for block in &self.retired {
            out.retired += dirty.get(block).map_or(0, PageBitmap::count);
        }
        for (block, ranges) in &self.left {
            let Some(bits) = dirty.get(block) else {
                continue;
            };
            if self.retired.contains(block) {
                continue;
            }
            let still = self.mapped.get(block).map_or(&[][..], |v| v);
            for range in ranges {
                let carried: u64 = overlaps(still, range)
                    .map(|part| bits.count_range(part))
                    .sum();
                out.carried += carried;
                out.unmapped += bits.count_range(*range) - carried;
            }
        }
        out
    }
}

/// Parts of `range` that lie in sorted, disjoint `ranges`.
fn overlaps<'a>(
    ranges: &'a [PageRange],
    range: &'a PageRange,
) -> impl Iterator<Item = PageRange> + 'a {
    let from = ranges.partition_point(|r| r.end() <= range.first);
    ranges[from..].iter().map_while(|r| r.intersect(range))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BlockInfo, LayoutEditor, PAGE_SIZE};
    use proptest::prelude::*;

    fn slot(id: u16, gpa_page: u64, block: u64, first: u64, pages: u64) -> Slot {
        Slot {
            key: id.into(),
            gpa: gpa_page * PAGE_SIZE,
            block: BlockId(block),
            range: PageRange::new(first, pages),
            readonly: false,
        }
    }

    fn editor() -> LayoutEditor {
        let mut e = Layout::empty(1000).edit();
        for id in 0..2 {
            e.add_block(BlockInfo::new(BlockId(id), format!("b{id}"), 300 * PAGE_SIZE).unwrap())
                .unwrap();
        }
        e
    }

    /// A layout made of random pieces; pieces that do not fit are left out.
    fn layout(pieces: &[(u16, u64, u64, u64, u64)]) -> Layout {
        let mut chosen: Vec<Slot> = Vec::new();
        for &(id, gpa, block, first, pages) in pieces {
            let piece = slot(
                id,
                gpa,
                block,
                first.min(299),
                pages.clamp(1, 300 - first.min(299)),
            );
            if !chosen
                .iter()
                .any(|s| s.key == piece.key || s.overlaps(&piece))
            {
                chosen.push(piece);
            }
        }
        let mut e = editor();
        for piece in chosen {
            e.create(piece).unwrap();
        }
        e.finish().unwrap()
    }

    fn pieces() -> impl Strategy<Value = Vec<(u16, u64, u64, u64, u64)>> {
        proptest::collection::vec((0u16..6, 0u64..900, 0u64..2, 0u64..300, 1u64..300), 0..6)
    }

    proptest! {
        #[test]
        fn every_dirty_page_of_a_changed_slot_is_carried_or_unmapped_and_in_every_slot_that_maps_it(
            old in pieces(), new in pieces(), drop_block in any::<bool>(),
            pages in proptest::collection::btree_set((0u64..2, 0u64..300), 0..200),
        ) {
            let old = layout(&old);
            let mut new = layout(&new);
            if drop_block {
                let mut e = new.edit();
                for key in new.slots().filter(|s| s.block == BlockId(1)).map(|s| s.key).collect::<Vec<_>>() {
                    e.delete(key).unwrap();
                }
                e.remove_block(BlockId(1)).unwrap();
                new = e.finish().unwrap();
            }
            let mut dirty: BTreeMap<BlockId, PageBitmap> = (0..2).map(|b| (BlockId(b), PageBitmap::new(300))).collect();
            for &(b, p) in &pages { dirty.get_mut(&BlockId(b)).unwrap().set(p); }
            let plan = RemapPlan::between(&old, &new);
            dirty.retain(|block, _| plan.blocks().contains(block));
            let out = plan.apply(&dirty);

            let shows = |l: &Layout, b, p, changed_to: Option<&Layout>| l.slots().any(|s|
                s.block == BlockId(b) && (s.range.first..s.range.end()).contains(&p)
                && changed_to.is_none_or(|other| other.slot(s.key) != Some(s)));
            let (mut carried, mut unmapped, mut retired) = (0, 0, 0);
            for &(b, p) in &pages {
                if new.block(BlockId(b)).is_none() { retired += 1; continue; }
                if !shows(&old, b, p, Some(&new)) { continue; }
                if shows(&new, b, p, None) { carried += 1 } else { unmapped += 1 }
            }
            prop_assert_eq!((out.carried, out.unmapped, out.retired), (carried, unmapped, retired));
            for s in new.slots().filter(|s| old.slot(s.key) != Some(s)) {
                let bits = &out.slots[&s.key];
                for p in 0..s.range.pages {
                    prop_assert_eq!(bits.get(p), pages.contains(&(s.block.0, s.range.first + p)));
                }
            }
        }
    }
}
