//! What an edit does to the layout is what it does to the pages that the guest sees, one by one; an edit that is refused
//! does nothing.
#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::collections::BTreeMap;

use gleaner_bitmap::{
    BlockId, BlockInfo, Generation, Layout, LayoutEditor, PAGE_SIZE, PageRange, Result, Slot,
    SlotKey,
};
use proptest::prelude::*;

const BLOCK_PAGES: u64 = 40;
const SLOT_LIMIT: u16 = 4;

/// Address space and guest page -> block, its page, and whether the guest may only read it.
type View = BTreeMap<(u16, u64), (BlockId, u64, bool)>;

fn pages(slot: &Slot) -> impl Iterator<Item = ((u16, u64), (BlockId, u64, bool))> {
    let slot = *slot;
    (0..slot.range.pages).map(move |n| {
        let page = slot.gpa / PAGE_SIZE + n;
        let backing = (slot.block, slot.range.first + n, slot.readonly);
        ((slot.key.address_space, page), backing)
    })
}

fn view(layout: &Layout) -> View {
    layout.slots().flat_map(pages).collect()
}

#[derive(Clone, Copy, Debug)]
enum Edit {
    Create(Slot),
    Delete(SlotKey),
    Move(SlotKey, u64),
    Readonly(SlotKey, bool),
    Resize(SlotKey, u64),
    Split(SlotKey, u64, SlotKey),
    Punch(SlotKey, PageRange, SlotKey),
    Merge(SlotKey, SlotKey),
}

fn apply(editor: &mut LayoutEditor, edit: Edit) -> Result<()> {
    match edit {
        Edit::Create(slot) => editor.create(slot),
        Edit::Delete(key) => editor.delete(key).map(drop),
        Edit::Move(key, gpa) => editor.move_to(key, gpa),
        Edit::Readonly(key, readonly) => editor.set_readonly(key, readonly),
        Edit::Resize(key, pages) => editor.resize(key, pages),
        Edit::Split(key, at, upper) => editor.split(key, at, upper),
        Edit::Punch(key, hole, upper) => editor.punch(key, hole, upper),
        Edit::Merge(lower, upper) => editor.merge(lower, upper),
    }
}

/// The view with some slots replaced by others; none when the others do not fit.
fn replaced(layout: &Layout, gone: &[Slot], new: &[Slot]) -> Option<View> {
    let mut after = view(layout);
    for (page, _) in gone.iter().flat_map(pages) {
        after.remove(&page);
    }
    for slot in new {
        let fits = slot.range.pages > 0 && slot.range.end() <= BLOCK_PAGES;
        let taken = layout.slot(slot.key).is_some() && gone.iter().all(|old| old.key != slot.key);
        if !fits || taken || slot.key.id >= SLOT_LIMIT {
            return None;
        }
        for (page, backing) in pages(slot) {
            if after.insert(page, backing).is_some() {
                return None;
            }
        }
    }
    Some(after)
}

/// What the guest must see after an edit; none when it must be refused.
fn expected(layout: &Layout, edit: Edit) -> Option<View> {
    let get = |key| layout.slot(key).copied();
    let cut = |old: Slot, first: u64, pages: u64, key| Slot {
        key,
        gpa: old.gpa + first * PAGE_SIZE,
        range: PageRange::new(old.range.first + first, pages),
        ..old
    };
    match edit {
        Edit::Create(slot) => replaced(layout, &[], &[slot]),
        Edit::Delete(key) => replaced(layout, &[get(key)?], &[]),
        Edit::Move(key, gpa) => {
            let old = get(key)?;
            replaced(layout, &[old], &[Slot { gpa, ..old }])
        }
        Edit::Readonly(key, readonly) => {
            let old = get(key)?;
            replaced(layout, &[old], &[Slot { readonly, ..old }])
        }
        Edit::Resize(key, pages) => {
            let old = get(key)?;
            replaced(layout, &[old], &[cut(old, 0, pages, key)])
        }
        Edit::Split(key, at, upper) => {
            expected(layout, Edit::Punch(key, PageRange::new(at, 0), upper))
        }
        Edit::Punch(key, hole, upper) => {
            let old = get(key)?;
            let above = old.range.pages.checked_sub(hole.end())?;
            let parts = [
                cut(old, 0, hole.first, key),
                cut(old, hole.end(), above, upper),
            ];
            let together = key != upper && key.address_space == upper.address_space;
            together.then(|| replaced(layout, &[old], &parts))?
        }
        Edit::Merge(lower, upper) => {
            let (a, b) = (get(lower)?, get(upper)?);
            let joined = cut(a, 0, a.range.pages + b.range.pages, lower);
            // Two slots may become one where the guest sees no difference.
            replaced(layout, &[a, b], &[joined]).filter(|after| *after == view(layout))
        }
    }
}

fn keys() -> impl Strategy<Value = SlotKey> {
    (prop_oneof![4 => Just(0u16), 1 => Just(1)], 0..=SLOT_LIMIT)
        .prop_map(|(address_space, id)| SlotKey { address_space, id })
}

fn edits() -> impl Strategy<Value = Edit> {
    let gpas = || (0u64..50).prop_map(|page| page * PAGE_SIZE);
    let ranges =
        || (0..BLOCK_PAGES, 0u64..30).prop_map(|(first, pages)| PageRange::new(first, pages));
    let holes = (0u64..12, 0u64..6).prop_map(|(first, pages)| PageRange::new(first, pages));
    let slot = (keys(), gpas(), 0u64..2, ranges(), any::<bool>());
    let slot = slot.prop_map(|(key, gpa, block, range, readonly)| Slot {
        key,
        gpa,
        block: BlockId(block),
        range,
        readonly,
    });
    prop_oneof![
        4 => slot.prop_map(Edit::Create),
        1 => keys().prop_map(Edit::Delete),
        2 => (keys(), gpas()).prop_map(|(key, gpa)| Edit::Move(key, gpa)),
        1 => (keys(), any::<bool>()).prop_map(|(key, readonly)| Edit::Readonly(key, readonly)),
        2 => (keys(), 0u64..30).prop_map(|(key, pages)| Edit::Resize(key, pages)),
        4 => (keys(), 0u64..12, keys()).prop_map(|(key, at, upper)| Edit::Split(key, at, upper)),
        2 => (keys(), holes, keys()).prop_map(|(key, hole, upper)| Edit::Punch(key, hole, upper)),
        4 => (keys(), keys()).prop_map(|(lower, upper)| Edit::Merge(lower, upper)),
    ]
}

fn blocks() -> Vec<BlockInfo> {
    let block = |id| BlockInfo::new(BlockId(id), format!("b{id}"), BLOCK_PAGES * PAGE_SIZE);
    (0..2).map(|id| block(id).unwrap()).collect()
}

proptest! {
    #[test]
    fn an_edit_changes_what_the_guest_sees_as_it_says_or_is_refused_and_changes_nothing(
        edits in proptest::collection::vec(edits(), 1..60),
    ) {
        let mut editor = Layout::empty(u32::from(SLOT_LIMIT)).edit();
        blocks().into_iter().for_each(|block| editor.add_block(block).unwrap());
        let mut layout = editor.finish().unwrap();
        for edit in edits {
            let want = expected(&layout, edit);
            let mut editor = layout.edit();
            let edited = apply(&mut editor, edit);
            if edited.is_err() {
                let same = editor.finish().unwrap();
                prop_assert_eq!(want, None, "{:?} was refused: {:?}", edit, edited);
                prop_assert!(same.slots().eq(layout.slots()) && same.blocks().eq(layout.blocks()));
                continue;
            }
            let Ok(next) = editor.finish() else {
                prop_assert_eq!(want, None, "{:?} was refused", edit);
                continue;
            };
            prop_assert_eq!(Some(view(&next)), want, "{:?}", edit);
            prop_assert_eq!(next.generation(), Generation(layout.generation().0 + 1));
            if let Edit::Split(lower, _, upper) = edit {
                let mut editor = next.edit();
                editor.merge(lower, upper).unwrap();
                prop_assert!(editor.finish().unwrap().slots().eq(layout.slots()), "split, then merged");
            }
            layout = next;
            for page in 0..100 {
                let slot = layout.slot_at(page * PAGE_SIZE + 7).map(|slot| slot.key);
                let want = layout.slots().find(|slot| pages(slot).any(|(at, _)| at == (0, page)));
                prop_assert_eq!(slot, want.map(|slot| slot.key));
            }
            let (blocks, slots) = (layout.blocks().cloned().collect(), layout.slots().copied().collect());
            let copy = Layout::from_parts(layout.generation(), blocks, slots).unwrap();
            prop_assert_eq!(copy.generation(), layout.generation());
            prop_assert!(copy.slots().eq(layout.slots()) && copy.blocks().eq(layout.blocks()));
        }
    }
}
