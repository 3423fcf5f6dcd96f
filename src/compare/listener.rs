//! What a VMM's memory listener makes of one view of memory after the other.

use std::collections::BTreeMap;
use std::sync::Arc;

use gleaner_bitmap::{Layout, PAGE_SIZE, PageRange, Slot, SlotKey};
use gleaner_ring::{MemslotCall, Region};

use crate::tracker::plan;
use crate::{Block, Result};

/// What the guest sees of the block, flat: (first page of guest-physical memory, pages of the block, read-only).
#[derive(Clone, Default)]
pub(super) struct View(Vec<(u64, PageRange, bool)>);

impl View {
    /// Shows pages of the block from a guest-physical page on. What continues what was shown last becomes one with it.
    pub(super) fn show(&mut self, at: u64, range: PageRange, readonly: bool) {
        if let Some((last_at, last, last_readonly)) = self.0.last_mut()
            && *last_at + last.pages == at
            && last.end() == range.first
            && *last_readonly == readonly
        {
            last.pages += range.pages;
        } else {
            self.0.push((at, range, readonly));
        }
    }

    /// Shows pages that stay apart from what was shown last.
    pub(super) fn show_apart(&mut self, at: u64, range: PageRange) {
        self.0.push((at, range, false));
    }
}

/// From one layout to the next.
pub(super) struct Commit {
    pub(super) old: Arc<Layout>,
    pub(super) new: Arc<Layout>,
    /// As the listener heard of it.
    pub(super) unmerged: Vec<MemslotCall>,
    /// The fewest.
    pub(super) merged: Vec<MemslotCall>,
}

impl Commit {
    /// Guest-physical memory that can be written before and after, and is the same pages: (address, pages).
    pub(super) fn lasting(&self) -> Vec<(u64, u64)> {
        let writable = |layout: &Arc<Layout>| -> Vec<Slot> {
            layout.slots().filter(|s| !s.readonly).copied().collect()
        };
        let new = writable(&self.new);
        let mut lasting = Vec::new();
        for before in writable(&self.old) {
            for after in &new {
                let start = before.gpa.max(after.gpa);
                let end = before.gpa_end().min(after.gpa_end());
                let page = |slot: &Slot| slot.range.first + (start - slot.gpa) / PAGE_SIZE;
                if start < end && page(&before) == page(after) {
                    lasting.push((start, (end - start) / PAGE_SIZE));
                }
            }
        }
        lasting
    }
}

/// Commits, one after the other.
pub(super) struct Series {
    pub(super) name: &'static str,
    pub(super) block: Block,
    /// The first one makes what is there from the beginning.
    pub(super) commits: Vec<Commit>,
    /// Pages that are dirty then.
    pub(super) dirty: u64,
}

/// Turns views into changes of slots: what is not the same goes, what is new comes, and gets the lowest id that is free.
pub(super) struct Listener {
    block: Block,
    slots: BTreeMap<SlotKey, Slot>,
    heard: Vec<MemslotCall>,
    layout: Arc<Layout>,
    commits: Vec<Commit>,
}

impl Listener {
    pub(super) fn new(pages: u64) -> Result<Self> {
        let block = Block::memfd("compared", pages * PAGE_SIZE)?;
        let mut editor = Layout::empty(1000).edit();
        editor.add_block(block.info().clone())?;
        Ok(Self {
            layout: Arc::new(editor.finish()?),
            slots: BTreeMap::new(),
            heard: Vec::new(),
            commits: Vec::new(),
            block,
        })
    }

    /// Hears of a view, inside of a transaction.
    pub(super) fn hear(&mut self, view: &View) {
        let mut coming = view.0.clone();
        let mut going = Vec::new();
        for slot in self.slots.values() {
            let shown = (slot.gpa / PAGE_SIZE, slot.range, slot.readonly);
            match coming.iter().position(|c| *c == shown) {
                Some(at) => drop(coming.remove(at)),
                None => going.push(*slot),
            }
        }
        for slot in going {
            self.slots.remove(&slot.key);
            self.heard
                .push(MemslotCall::Delete(region(&self.block, &slot)));
        }
        for (at, range, readonly) in coming {
            let mut ids = (0..u16::MAX).map(SlotKey::new);
            let Some(key) = ids.find(|key| !self.slots.contains_key(key)) else {
                return;
            };
            let slot = Slot {
                key,
                gpa: at * PAGE_SIZE,
                block: self.block.id(),
                range,
                readonly,
            };
            self.slots.insert(key, slot);
            self.heard
                .push(MemslotCall::Create(region(&self.block, &slot)));
        }
    }

    /// The transaction ends.
    pub(super) fn commit(&mut self) -> Result<()> {
        let mut editor = self.layout.edit();
        editor.clear_slots();
        for slot in self.slots.values() {
            editor.create(*slot)?;
        }
        let old = std::mem::replace(&mut self.layout, Arc::new(editor.finish()?));
        let new = Arc::clone(&self.layout);
        let merged = plan(&old, &new, |slot| region(&self.block, slot));
        self.commits.push(Commit {
            old,
            new,
            unmerged: std::mem::take(&mut self.heard),
            merged,
        });
        Ok(())
    }

    pub(super) fn series(self, name: &'static str, dirty: u64) -> Series {
        Series {
            name,
            block: self.block,
            commits: self.commits,
            dirty,
        }
    }
}

/// A slot as KVM is told of it.
pub(super) fn region(block: &Block, slot: &Slot) -> Region {
    let (offset, bytes) = (slot.range.first * PAGE_SIZE, slot.range.pages * PAGE_SIZE);
    Region {
        key: slot.key,
        gpa: slot.gpa,
        host: block
            .host()
            .part(offset, bytes)
            .unwrap_or_else(|| unreachable!("layouts only have slots inside of their block")),
        log: !slot.readonly,
        readonly: slot.readonly,
    }
}
