//! All memory slots at one moment, and how one moment becomes the next.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{BlockId, BlockInfo, Error, PAGE_SIZE, PageRange, Result, Slot, SlotKey};

/// Stamps a layout. Grows by one with each transaction; a dirty bit is interpreted by the layout it was recorded under.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize,
)]
pub struct Generation(pub u64);

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "generation {}", self.0)
    }
}

/// The guest-physical address space ends here (52 bits, the most that x86 has).
const GPA_END: u64 = 1 << 52;

/// All slots and RAM blocks at one moment.
///
/// Invariants: slots do not overlap within an address space, lie inside their blocks and below the slot limit; block
/// names are unique.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Layout {
    generation: Generation,
    slot_limit: u32,
    blocks: BTreeMap<BlockId, BlockInfo>,
    slots: BTreeMap<SlotKey, Slot>,
}

impl Layout {
    /// The empty layout of a VM with `slot_limit` slot ids (`KVM_CAP_NR_MEMSLOTS`).
    #[must_use]
    pub fn empty(slot_limit: u32) -> Self {
        Self {
            generation: Generation::default(),
            slot_limit,
            blocks: BTreeMap::new(),
            slots: BTreeMap::new(),
        }
    }

    /// A layout as a peer describes it.
    ///
    /// # Errors
    /// Whatever breaks an invariant of [`Layout`].
    pub fn from_parts(
        generation: Generation,
        blocks: Vec<BlockInfo>,
        slots: Vec<Slot>,
    ) -> Result<Self> {
        let mut editor = Self::empty(u32::from(u16::MAX) + 1).edit();
        for block in blocks {
            editor.add_block(block)?;
        }
        for slot in slots {
            editor.create(slot)?;
        }
        let mut layout = editor.finish()?;
        layout.generation = generation;
        Ok(layout)
    }

    /// Its stamp.
    #[must_use]
    pub const fn generation(&self) -> Generation {
        self.generation
    }

    /// Its slots, by key.
    pub fn slots(&self) -> impl ExactSizeIterator<Item = &Slot> {
        self.slots.values()
    }

    /// Its blocks, by id.
    pub fn blocks(&self) -> impl ExactSizeIterator<Item = &BlockInfo> {
        self.blocks.values()
    }

    /// A slot by its key.
    #[must_use]
    pub fn slot(&self, key: SlotKey) -> Option<&Slot> {
        self.slots.get(&key)
    }

    /// A block by its id.
    #[must_use]
    pub fn block(&self, id: BlockId) -> Option<&BlockInfo> {
        self.blocks.get(&id)
    }

    /// The block of a name.
    #[must_use]
    pub fn block_named(&self, name: &str) -> Option<&BlockInfo> {
        self.blocks.values().find(|b| b.name == name)
    }

    /// The slot that maps a guest-physical address in address space 0.
    #[must_use]
    pub fn slot_at(&self, gpa: u64) -> Option<&Slot> {
        self.slots
            .values()
            .find(|s| s.key.address_space == 0 && (s.gpa..s.gpa_end()).contains(&gpa))
    }

    /// Starts a change. The layout itself stays as it is.
    #[must_use]
    pub fn edit(&self) -> LayoutEditor {
        LayoutEditor {
            next: Self {
                generation: Generation(self.generation.0 + 1),
                ..self.clone()
            },
        }
    }
}

/// A layout in the making. Each step checks what it can see; what only the whole can show (overlaps, blocks that are
/// removed but mapped) is checked by [`LayoutEditor::finish`], so that slots may swap places in any order of steps.
#[derive(Debug)]
pub struct LayoutEditor {
    next: Layout,
}

impl LayoutEditor {
    fn get(&self, key: SlotKey) -> Result<Slot> {
        self.next
            .slots
            .get(&key)
            .copied()
            .ok_or(Error::UnknownSlot { slot: key })
    }

    /// Adds a RAM block, which no slot maps yet.
    ///
    /// # Errors
    /// [`Error::BlockName`], [`Error::BlockNameTaken`].
    pub fn add_block(&mut self, info: BlockInfo) -> Result<()> {
        info.check_name()?;
        let taken = self.next.block_named(&info.name).is_some();
        if taken || self.next.blocks.contains_key(&info.id) {
            return Err(Error::BlockNameTaken { name: info.name });
        }
        self.next.blocks.insert(info.id, info);
        Ok(())
    }

    /// Removes a RAM block, its dirty pages with it. Its slots must be deleted in the same change.
    ///
    /// # Errors
    /// [`Error::UnknownBlock`].
    pub fn remove_block(&mut self, block: BlockId) -> Result<()> {
        match self.next.blocks.remove(&block) {
            Some(_) => Ok(()),
            None => Err(Error::UnknownBlock { block }),
        }
    }

    /// Adds a slot.
    ///
    /// # Errors
    /// [`Error::SlotExists`], [`Error::TooManySlots`], [`Error::UnknownBlock`], [`Error::OutsideBlock`],
    /// [`Error::Unaligned`], [`Error::OutOfAddressSpace`].
    pub fn create(&mut self, slot: Slot) -> Result<()> {
        let key = slot.key;
        if self.next.slots.contains_key(&key) {
            return Err(Error::SlotExists { slot: key });
        }
        if u32::from(key.id) >= self.next.slot_limit {
            return Err(Error::TooManySlots {
                slot: key,
                limit: self.next.slot_limit,
            });
        }
        let block = self
            .next
            .blocks
            .get(&slot.block)
            .ok_or(Error::UnknownBlock { block: slot.block })?;
        if slot.range.pages == 0 || !block.all().contains(&slot.range) {
            return Err(Error::OutsideBlock {
                block: slot.block,
                pages: block.pages,
                range: slot.range,
            });
        }
        if !slot.gpa.is_multiple_of(PAGE_SIZE) {
            return Err(Error::Unaligned {
                what: "guest-physical address",
                value: slot.gpa,
            });
        }
        if slot.gpa_end() > GPA_END {
            return Err(Error::OutOfAddressSpace {
                slot: key,
                gpa: slot.gpa,
                pages: slot.range.pages,
            });
        }
        self.next.slots.insert(key, slot);
        Ok(())
    }

    /// Removes a slot. Its block stays, and so do the block's dirty pages.
    ///
    /// # Errors
    /// [`Error::UnknownSlot`].
    pub fn delete(&mut self, key: SlotKey) -> Result<Slot> {
        self.next
            .slots
            .remove(&key)
            .ok_or(Error::UnknownSlot { slot: key })
    }

    /// Removes all slots.
    pub fn clear_slots(&mut self) {
        self.next.slots.clear();
    }

    /// Replaces a slot by a changed one of the same key, or leaves everything as it was.
    fn replace(&mut self, old: Slot, new: Slot) -> Result<()> {
        self.delete(old.key)?;
        self.create(new).inspect_err(|_| {
            self.next.slots.insert(old.key, old);
        })
    }

    /// Moves a slot to another guest-physical address.
    ///
    /// # Errors
    /// [`Error::UnknownSlot`], and those of [`LayoutEditor::create`].
    pub fn move_to(&mut self, key: SlotKey, gpa: u64) -> Result<()> {
        let old = self.get(key)?;
        self.replace(old, Slot { gpa, ..old })
    }

    /// Makes a slot read-only, or writable again.
    ///
    /// # Errors
    /// [`Error::UnknownSlot`].
    pub fn set_readonly(&mut self, key: SlotKey, readonly: bool) -> Result<()> {
        let old = self.get(key)?;
        self.replace(old, Slot { readonly, ..old })
    }

    /// Gives a slot another length, its start unchanged.
    ///
    /// # Errors
    /// [`Error::UnknownSlot`], and those of [`LayoutEditor::create`].
    pub fn resize(&mut self, key: SlotKey, pages: u64) -> Result<()> {
        let old = self.get(key)?;
        let range = PageRange::new(old.range.first, pages);
        self.replace(old, Slot { range, ..old })
    }

    /// Cuts a slot in two at page `at` of the slot. The lower part keeps the id, the upper one becomes `upper`.
    ///
    /// # Errors
    /// [`Error::UnknownSlot`], [`Error::SlotExists`], [`Error::BadCut`].
    pub fn split(&mut self, key: SlotKey, at: u64, upper: SlotKey) -> Result<()> {
        self.punch(key, PageRange::new(at, 0), upper)
    }

    /// Cuts a hole (in pages of the slot) into a slot. What is below keeps the id, what is above becomes `upper`; the
    /// hole's pages stay in the block, unmapped.
    ///
    /// # Errors
    /// [`Error::UnknownSlot`], [`Error::SlotExists`], [`Error::BadCut`] when nothing would be left on either side, or `upper`
    /// is of another address space.
    pub fn punch(&mut self, key: SlotKey, hole: PageRange, upper: SlotKey) -> Result<()> {
        let old = self.get(key)?;
        let apart = upper.address_space != key.address_space;
        if apart || hole.first == 0 || hole.end() >= old.range.pages {
            return Err(Error::BadCut {
                slot: key,
                what: if apart {
                    "a cut into another address space"
                } else {
                    "a cut"
                },
                at: hole.first,
                pages: old.range.pages,
            });
        }
        if self.next.slots.contains_key(&upper) {
            return Err(Error::SlotExists { slot: upper });
        }
        self.create(Slot {
            key: upper,
            gpa: old.gpa + hole.end() * PAGE_SIZE,
            range: PageRange::new(old.range.first + hole.end(), old.range.pages - hole.end()),
            ..old
        })?;
        self.resize(key, hole.first)
    }

    /// Joins two slots that continue each other in guest-physical space and in their block; the lower id stays.
    ///
    /// # Errors
    /// [`Error::UnknownSlot`], [`Error::NotAdjacent`], [`Error::UnknownBlock`] when their block was removed.
    pub fn merge(&mut self, lower: SlotKey, upper: SlotKey) -> Result<()> {
        let (a, b) = (self.get(lower)?, self.get(upper)?);
        let joined = a.key.address_space == b.key.address_space
            && a.block == b.block
            && a.readonly == b.readonly
            && a.gpa_end() == b.gpa
            && a.range.end() == b.range.first;
        if !joined {
            return Err(Error::NotAdjacent {
                left: lower,
                right: upper,
            });
        }
        self.delete(upper)?;
        self.resize(lower, a.range.pages + b.range.pages)
            .inspect_err(|_| {
                // Their block was removed, say.
                self.next.slots.insert(upper, b);
            })
    }

    /// The layout that results, its generation one above the one it came from.
    ///
    /// # Errors
    /// [`Error::Overlap`], [`Error::BlockInUse`].
    pub fn finish(self) -> Result<Layout> {
        let mut order: Vec<&Slot> = self.next.slots.values().collect();
        order.sort_unstable_by_key(|s| (s.key.address_space, s.gpa));
        for pair in order.windows(2) {
            if pair[0].overlaps(pair[1]) {
                return Err(Error::Overlap {
                    slot: pair[1].key,
                    gpa: pair[1].gpa,
                    end: pair[1].gpa_end(),
                    other: pair[0].key,
                });
            }
        }
        let mut seen = BTreeSet::new();
        for slot in self.next.slots.values() {
            if seen.insert(slot.block) && !self.next.blocks.contains_key(&slot.block) {
                return Err(Error::BlockInUse {
                    block: slot.block,
                    slot: slot.key,
                });
            }
        }
        Ok(self.next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> LayoutEditor {
        let mut editor = Layout::empty(32_764).edit();
        editor
            .add_block(BlockInfo::new(BlockId(0), "ram", 1000 * PAGE_SIZE).unwrap())
            .unwrap();
        editor.create(slot(1, 0, 0, 500)).unwrap();
        editor
    }

    fn slot(id: u16, gpa_page: u64, first: u64, pages: u64) -> Slot {
        Slot {
            key: id.into(),
            gpa: gpa_page * PAGE_SIZE,
            block: BlockId(0),
            range: PageRange::new(first, pages),
            readonly: false,
        }
    }

    #[test]
    fn bad_slots_are_refused_and_change_nothing() {
        let mut e = base();
        assert!(matches!(
            e.create(slot(1, 900, 0, 1)),
            Err(Error::SlotExists { .. })
        ));
        assert!(matches!(
            e.create(slot(32_764, 900, 0, 1)),
            Err(Error::TooManySlots { .. })
        ));
        assert!(matches!(
            e.create(slot(2, 900, 999, 2)),
            Err(Error::OutsideBlock { .. })
        ));
        assert!(matches!(
            e.create(slot(2, 900, u64::MAX, 2)),
            Err(Error::OutsideBlock { .. })
        ));
        assert!(matches!(
            e.create(slot(2, 900, 0, 0)),
            Err(Error::OutsideBlock { .. })
        ));
        let odd = Slot {
            gpa: 4097,
            ..slot(2, 0, 0, 1)
        };
        assert!(matches!(e.create(odd), Err(Error::Unaligned { .. })));
        let high = Slot {
            gpa: GPA_END - PAGE_SIZE,
            ..slot(2, 0, 0, 2)
        };
        assert!(matches!(
            e.create(high),
            Err(Error::OutOfAddressSpace { .. })
        ));
        let stranger = Slot {
            block: BlockId(9),
            ..slot(2, 900, 0, 1)
        };
        assert!(matches!(
            e.create(stranger),
            Err(Error::UnknownBlock { .. })
        ));
        assert!(matches!(
            e.resize(1.into(), 1001),
            Err(Error::OutsideBlock { .. })
        ));
        assert!(matches!(
            e.punch(1.into(), PageRange::new(400, 100), 2.into()),
            Err(Error::BadCut { .. })
        ));
        assert!(matches!(
            e.split(1.into(), 0, 2.into()),
            Err(Error::BadCut { .. })
        ));
        let mut untouched = base().finish().unwrap();
        untouched.generation = e.next.generation;
        assert_eq!(e.finish().unwrap(), untouched);
    }

    #[test]
    fn a_block_is_found_by_its_id_and_by_its_name() {
        let layout = base().finish().unwrap();
        let by_id = layout.block(BlockId(0)).unwrap();
        assert_eq!(Some(by_id), layout.block_named("ram"));
        assert_eq!(layout.block(BlockId(1)), None);
    }

    #[test]
    fn overlap_and_mapped_block_show_at_the_end() {
        let mut e = base();
        e.create(slot(2, 499, 600, 4)).unwrap();
        assert!(matches!(e.finish(), Err(Error::Overlap { .. })));
        let mut e = base();
        e.remove_block(BlockId(0)).unwrap();
        assert!(matches!(e.finish(), Err(Error::BlockInUse { .. })));
    }

    #[test]
    fn slots_may_swap_places_whatever_the_order_of_steps() {
        let mut e = base();
        e.create(slot(2, 500, 500, 500)).unwrap();
        e.move_to(1.into(), 500 * PAGE_SIZE).unwrap();
        e.move_to(2.into(), 0).unwrap();
        assert!(e.finish().is_ok());
    }

    #[test]
    fn a_refused_merge_leaves_both_slots() {
        let mut e = base();
        e.split(1.into(), 200, 2.into()).unwrap();
        e.remove_block(BlockId(0)).unwrap();
        let merged = e.merge(1.into(), 2.into());
        assert!(matches!(merged, Err(Error::UnknownBlock { .. })));
        assert_eq!(e.delete(1.into()).unwrap().range, PageRange::new(0, 200));
        assert_eq!(e.delete(2.into()).unwrap().range, PageRange::new(200, 300));
    }

    #[test]
    fn a_hole_filled_and_merged_gives_the_slot_back() {
        let mut e = base();
        e.punch(1.into(), PageRange::new(101, 33), 2.into())
            .unwrap();
        e.create(slot(3, 101, 101, 33)).unwrap();
        assert!(matches!(
            e.merge(1.into(), 2.into()),
            Err(Error::NotAdjacent { .. })
        ));
        e.merge(1.into(), 3.into()).unwrap();
        e.merge(1.into(), 2.into()).unwrap();
        assert_eq!(e.finish().unwrap(), base().finish().unwrap());
    }

    #[test]
    fn a_peers_layout_may_use_every_slot_id_and_keeps_its_generation() {
        let block = BlockInfo::new(BlockId(0), "ram", PAGE_SIZE).unwrap();
        let last = slot(u16::MAX, 0, 0, 1);
        let layout = Layout::from_parts(Generation(7), vec![block], vec![last]).unwrap();
        assert_eq!(layout.slot(last.key), Some(&last));
        assert_eq!(layout.generation().to_string(), "generation 7");
        assert!(Layout::from_parts(Generation(7), vec![], vec![last]).is_err());
    }

    #[test]
    fn the_last_page_of_guest_physical_space_can_be_mapped() {
        let mut e = base();
        let last = Slot {
            gpa: GPA_END - PAGE_SIZE,
            ..slot(2, 0, 600, 1)
        };
        e.create(last).unwrap();
        let layout = e.finish().unwrap();
        assert_eq!(layout.slot_at(GPA_END - 1), Some(&last));
    }

    #[test]
    fn blocks_are_found_by_name_and_their_names_are_theirs_alone() {
        let mut e = base();
        let block = |id, name| BlockInfo::new(BlockId(id), name, PAGE_SIZE).unwrap();
        for taken in [block(1, "ram"), block(0, "other")] {
            assert!(matches!(
                e.add_block(taken),
                Err(Error::BlockNameTaken { .. })
            ));
        }
        e.add_block(block(1, "other")).unwrap();
        assert!(matches!(
            e.remove_block(BlockId(9)),
            Err(Error::UnknownBlock { .. })
        ));
        e.clear_slots();
        let layout = e.finish().unwrap();
        assert_eq!(layout.slots().len(), 0);
        let named = |name| layout.block_named(name).map(|block| block.id);
        assert_eq!(named("other"), Some(BlockId(1)));
        assert_eq!(named("ram"), Some(BlockId(0)));
        assert_eq!(named("none"), None);
    }
}
