//! All memory slots at one moment, and how one moment becomes the next.

use std::fmt;

use imbl::OrdMap;
use imbl::ordmap::DiffItem;
use serde::{Deserialize, Serialize};

use crate::coverage::Coverage;
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
/// names are unique. Names, places and coverage say of blocks and slots what these say themselves.
///
/// Copies share what is the same in them. So a change costs by what it changes and by the depth of a tree (the logarithm
/// of the number of slots), and so does finding out what changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Layout {
    generation: Generation,
    slot_limit: u32,
    blocks: OrdMap<BlockId, BlockInfo>,
    names: OrdMap<String, BlockId>,
    slots: OrdMap<SlotKey, Slot>,
    /// Where slots begin, and where each ends.
    places: OrdMap<Place, u64>,
    coverage: Coverage,
}

/// Where a slot begins: address space, guest-physical address. The key tells slots apart that overlap while a layout is
/// in the making.
type Place = (u16, u64, SlotKey);

const fn place(slot: &Slot) -> Place {
    (slot.key.address_space, slot.gpa, slot.key)
}

/// What was and what is, of something that two layouts do not have alike. One of both is there.
type Change<'a, T> = (Option<&'a T>, Option<&'a T>);

fn changes<'a, K: Ord, T: PartialEq>(
    old: &'a OrdMap<K, T>,
    new: &'a OrdMap<K, T>,
) -> impl Iterator<Item = Change<'a, T>> {
    old.diff(new).map(|item| match item {
        DiffItem::Add(_, is) => (None, Some(is)),
        DiffItem::Update {
            old: (_, was),
            new: (_, is),
        } => (Some(was), Some(is)),
        DiffItem::Remove(_, was) => (Some(was), None),
    })
}

impl Layout {
    /// The empty layout of a VM with `slot_limit` slot ids (`KVM_CAP_NR_MEMSLOTS`).
    #[must_use]
    pub fn empty(slot_limit: u32) -> Self {
        Self {
            generation: Generation::default(),
            slot_limit,
            blocks: OrdMap::new(),
            names: OrdMap::new(),
            slots: OrdMap::new(),
            places: OrdMap::new(),
            coverage: Coverage::default(),
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
        self.names.get(name).and_then(|id| self.blocks.get(id))
    }

    /// The slot that maps a guest-physical address in address space 0.
    #[must_use]
    pub fn slot_at(&self, gpa: u64) -> Option<&Slot> {
        let last = SlotKey {
            address_space: u16::MAX,
            id: u16::MAX,
        };
        let (&(address_space, _, key), &end) = self.places.get_prev(&(0, gpa, last))?;
        (address_space == 0 && gpa < end).then(|| self.slots.get(&key))?
    }

    /// The slots that `next` does not have as they are here, in order of their keys: what each was, and what it is there.
    pub fn slot_changes<'a>(&'a self, next: &'a Self) -> impl Iterator<Item = Change<'a, Slot>> {
        changes(&self.slots, &next.slots)
    }

    /// The blocks that `next` does not have as they are here, as with [`Layout::slot_changes`].
    pub fn block_changes<'a>(
        &'a self,
        next: &'a Self,
    ) -> impl Iterator<Item = Change<'a, BlockInfo>> {
        changes(&self.blocks, &next.blocks)
    }

    /// The pages of `range` that some slot maps, sorted, none twice.
    #[must_use]
    pub fn mapped(&self, block: BlockId, range: PageRange) -> Vec<PageRange> {
        self.coverage.within(block, range)
    }

    fn put(&mut self, slot: Slot) {
        self.places.insert(place(&slot), slot.gpa_end());
        self.coverage.add(slot.block, slot.range);
        self.slots.insert(slot.key, slot);
    }

    fn take(&mut self, key: SlotKey) -> Option<Slot> {
        let slot = self.slots.remove(&key)?;
        self.places.remove(&place(&slot));
        self.coverage.remove(slot.block, slot.range);
        Some(slot)
    }

    /// Starts a change. The layout itself stays as it is.
    #[must_use]
    pub fn edit(&self) -> LayoutEditor {
        LayoutEditor {
            base: self.slots.clone(),
            removed: Vec::new(),
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
    /// The slots that it came from, which do not overlap.
    base: OrdMap<SlotKey, Slot>,
    /// Blocks that were removed.
    removed: Vec<BlockId>,
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
        self.next.names.insert(info.name.clone(), info.id);
        self.next.blocks.insert(info.id, info);
        Ok(())
    }

    /// Removes a RAM block, its dirty pages with it. Its slots must be deleted in the same change.
    ///
    /// # Errors
    /// [`Error::UnknownBlock`].
    pub fn remove_block(&mut self, block: BlockId) -> Result<()> {
        let info = self.next.blocks.remove(&block);
        let info = info.ok_or(Error::UnknownBlock { block })?;
        self.next.names.remove(&info.name);
        self.removed.push(block);
        Ok(())
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
        self.next.put(slot);
        Ok(())
    }

    /// Removes a slot. Its block stays, and so do the block's dirty pages.
    ///
    /// # Errors
    /// [`Error::UnknownSlot`].
    pub fn delete(&mut self, key: SlotKey) -> Result<Slot> {
        self.next.take(key).ok_or(Error::UnknownSlot { slot: key })
    }

    /// Removes all slots.
    pub fn clear_slots(&mut self) {
        self.next.slots = OrdMap::new();
        self.next.places = OrdMap::new();
        self.next.coverage = Coverage::default();
    }

    /// Replaces a slot by a changed one of the same key, or leaves everything as it was.
    fn replace(&mut self, old: Slot, new: Slot) -> Result<()> {
        self.delete(old.key)?;
        self.create(new).inspect_err(|_| {
            self.next.put(old);
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
                self.next.put(b);
            })
    }

    /// The layout that results, its generation one above the one it came from.
    ///
    /// # Errors
    /// [`Error::Overlap`], [`Error::BlockInUse`].
    pub fn finish(self) -> Result<Layout> {
        let next = &self.next;
        // Where any two overlap, two that follow each other do, and one of these was not there before.
        let changed = changes(&self.base, &next.slots).filter_map(|(_, is)| is);
        let overlap = changed.flat_map(|slot| {
            let here = place(slot);
            let before = next.places.range(..here).next_back();
            let after = next.places.range(here..).nth(1);
            let slots = [before, Some((&here, &slot.gpa_end())), after]
                .map(|found| found.map(|(place, &end)| (*place, end)));
            [(slots[0], slots[1]), (slots[1], slots[2])]
        });
        let overlap = overlap
            .filter_map(|(lower, upper)| Some((upper?, lower?)))
            .filter(|((upper, _), (lower, end))| upper.0 == lower.0 && upper.1 < *end)
            .min();
        if let Some((((_, gpa, slot), end), ((.., other), _))) = overlap {
            return Err(Error::Overlap {
                slot,
                gpa,
                end,
                other,
            });
        }
        let gone = |block: &BlockId| !next.blocks.contains_key(block);
        if self
            .removed
            .iter()
            .any(|block| gone(block) && next.coverage.has(*block))
            && let Some(slot) = next.slots.values().find(|slot| gone(&slot.block))
        {
            return Err(Error::BlockInUse {
                block: slot.block,
                slot: slot.key,
            });
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
