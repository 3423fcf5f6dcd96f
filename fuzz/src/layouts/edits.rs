//! A layout that knows nothing but pages, beside the editor.

use std::collections::{BTreeMap, BTreeSet};

use gleaner_bitmap::{
    BlockId, BlockInfo, Layout, LayoutEditor, PAGE_SIZE, PageRange, Slot, SlotKey,
};

use super::code;
use crate::bytes::Bytes;

/// Blocks at one moment, and their longest length in pages: more than two words of a bitmap.
const BLOCKS: usize = 4;
const PAGES: u64 = 150;

/// A page of a slot: the guest's page, and what it shows.
type Shown = (u64, BlockId, u64);

#[derive(Clone, Default)]
pub struct Naive {
    blocks: BTreeMap<BlockId, BlockInfo>,
    /// Whether it is read-only, and its pages.
    slots: BTreeMap<SlotKey, (bool, Vec<Shown>)>,
}

fn shown(slot: &Slot) -> Vec<Shown> {
    (0..slot.range.pages)
        .map(|n| (slot.gpa / PAGE_SIZE + n, slot.block, slot.range.first + n))
        .collect()
}

/// A guest-physical address: a page's, or an edge as it is.
fn gpa(bytes: &mut Bytes<'_>) -> Option<u64> {
    let number = bytes.number()?;
    Some(if number < 256 {
        number * PAGE_SIZE
    } else {
        number
    })
}

impl Naive {
    /// Makes an edit in both; a refused one changes neither.
    pub fn edit(
        &mut self,
        editor: &mut LayoutEditor,
        next_block: &mut u64,
        bytes: &mut Bytes<'_>,
    ) -> Option<()> {
        match bytes.choice(code::EDITS)? {
            code::ADD_BLOCK => {
                let id = BlockId(*next_block);
                let pages = bytes.number()? % PAGES + 1;
                let info = BlockInfo::new(id, format!("ram{}", id.0), pages * PAGE_SIZE).ok()?;
                if self.blocks.len() < BLOCKS && editor.add_block(info.clone()).is_ok() {
                    *next_block += 1;
                    self.blocks.insert(id, info);
                }
            }
            code::REMOVE_BLOCK => {
                let block = self.block(bytes)?;
                let removed = editor.remove_block(block).is_ok();
                assert_eq!(removed, self.blocks.remove(&block).is_some());
            }
            code::CREATE => {
                let slot = Slot {
                    key: code::key(bytes)?,
                    gpa: gpa(bytes)?,
                    block: self.block(bytes)?,
                    range: PageRange::new(bytes.number()?, bytes.number()?),
                    readonly: false,
                };
                if editor.create(slot).is_ok() {
                    let before = self.slots.insert(slot.key, (false, shown(&slot)));
                    assert!(before.is_none());
                }
            }
            code::DELETE => {
                let key = code::key(bytes)?;
                let deleted = editor.delete(key).is_ok();
                assert_eq!(deleted, self.slots.remove(&key).is_some());
            }
            code::CLEAR => {
                editor.clear_slots();
                self.slots.clear();
            }
            code::MOVE => {
                let (key, gpa) = (code::key(bytes)?, gpa(bytes)?);
                if editor.move_to(key, gpa).is_ok() {
                    for (page, n) in self.pages(key).iter_mut().zip(0..) {
                        page.0 = gpa / PAGE_SIZE + n;
                    }
                }
            }
            code::ACCESS => {
                let (key, readonly) = (code::key(bytes)?, bytes.byte()? & 1 == 1);
                if editor.set_readonly(key, readonly).is_ok() {
                    self.slots.get_mut(&key)?.0 = readonly;
                }
            }
            code::RESIZE => {
                let (key, length) = (code::key(bytes)?, bytes.number()?);
                if editor.resize(key, length).is_ok() {
                    let pages = self.pages(key);
                    let (gpa, block, first) = pages[0];
                    *pages = (0..length).map(|n| (gpa + n, block, first + n)).collect();
                }
            }
            code::SPLIT => {
                let (key, at, upper) = (code::key(bytes)?, bytes.number()?, code::key(bytes)?);
                if editor.split(key, at, upper).is_ok() {
                    self.cut(key, at, 0, upper);
                }
            }
            code::PUNCH => {
                let (key, at, pages) = (code::key(bytes)?, bytes.number()?, bytes.number()?);
                let upper = code::key(bytes)?;
                if editor.punch(key, PageRange::new(at, pages), upper).is_ok() {
                    self.cut(key, at, pages, upper);
                }
            }
            _ => {
                let (lower, upper) = (code::key(bytes)?, code::key(bytes)?);
                if editor.merge(lower, upper).is_ok() {
                    let (_, mut pages) = self.slots.remove(&upper).expect("the upper slot");
                    self.pages(lower).append(&mut pages);
                }
            }
        }
        Some(())
    }

    fn block(&self, bytes: &mut Bytes<'_>) -> Option<BlockId> {
        let choice = bytes.choice(BLOCKS)?;
        let known = self.blocks.keys().nth(choice).copied();
        Some(known.unwrap_or(BlockId(u64::MAX)))
    }

    fn pages(&mut self, key: SlotKey) -> &mut Vec<Shown> {
        &mut self.slots.get_mut(&key).expect("a slot that was changed").1
    }

    fn cut(&mut self, key: SlotKey, at: u64, hole: u64, upper: SlotKey) {
        let index = |n: u64| usize::try_from(n).expect("a page of a slot");
        let readonly = self.slots[&key].0;
        let above = self.pages(key).split_off(index(at + hole));
        self.pages(key).truncate(index(at));
        assert!(!above.is_empty() && at > 0);
        let before = self.slots.insert(upper, (readonly, above));
        assert!(before.is_none());
    }

    /// Whether this may be in force: no page of the guest is shown twice, and what is shown is there.
    pub fn is_layout(&self) -> bool {
        let mut taken = BTreeSet::new();
        self.slots.iter().all(|(key, (_, pages))| {
            pages.iter().all(|(gpa, block, page)| {
                let there = self.blocks.get(block).is_some_and(|b| *page < b.pages);
                there && taken.insert((key.address_space, *gpa))
            })
        })
    }

    /// The layout that came out is this one.
    pub fn compare(&self, layout: &Layout) {
        assert!(self.is_layout());
        let blocks = layout.blocks().map(|block| (block.id, block.clone()));
        assert_eq!(blocks.collect::<BTreeMap<_, _>>(), self.blocks);
        let slots = layout
            .slots()
            .map(|slot| (slot.key, (slot.readonly, shown(slot))));
        assert_eq!(slots.collect::<BTreeMap<_, _>>(), self.slots);
    }
}
