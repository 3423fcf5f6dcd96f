//! The slot table: two lists, of which one is active, and what each change of it costs.

use std::collections::BTreeMap;

use gleaner_bitmap::{PAGE_SIZE, SlotKey};

use super::sparse::Sparse;
use crate::{HostRange, Region};

/// A slot, with the state of its pages.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) gpa: u64,
    pub(super) host: HostRange,
    pub(super) pages: u64,
    pub(super) log: bool,
    pub(super) readonly: bool,
    /// The dirty bitmap, while it is logged and there are no rings.
    pub(super) dirty: Option<Sparse>,
    /// Pages that vCPUs have mapped.
    pub(super) mapped: Sparse,
    /// Those of them that can be written without anybody noticing: a write to such a page is not logged again.
    pub(super) writable: Sparse,
    /// Those that may be part of huge mappings: writable when the log began with all bits set, and not protected since.
    pub(super) huge: Sparse,
}

impl Slot {
    pub(super) fn new(region: &Region) -> Self {
        let pages = region.pages();
        Self {
            gpa: region.gpa,
            host: region.host.clone(),
            pages,
            log: region.log,
            readonly: region.readonly,
            dirty: None,
            mapped: Sparse::new(pages),
            writable: Sparse::new(pages),
            huge: Sparse::new(pages),
        }
    }

    /// As KVM was told of it.
    pub(super) fn region(&self, key: SlotKey) -> Region {
        Region {
            key,
            gpa: self.gpa,
            host: self.host.clone(),
            log: self.log,
            readonly: self.readonly,
        }
    }

    /// Its log begins, with all bits set or none, or ends. With rings it has no bits.
    pub(super) fn start_log(&mut self, log: bool, rings: bool, all_set: bool) {
        self.log = log;
        self.dirty = (log && !rings).then(|| Sparse::new(self.pages));
        if let Some(dirty) = self.dirty.as_mut().filter(|_| all_set) {
            dirty.fill(true);
        }
        // Where all bits are set, protecting is left to the clearing of them; also with rings, which have no bits.
        if log && all_set {
            self.huge = self.writable.clone();
        } else if log {
            self.writable.fill(false);
            self.huge.fill(false);
        }
    }

    /// What is mapped, where it was mapped, and nothing else; it has no mappings then.
    pub(super) fn take_mappings(&mut self) -> Self {
        let none = Sparse::new(self.pages);
        Self {
            host: self.host.clone(),
            dirty: None,
            mapped: std::mem::replace(&mut self.mapped, none.clone()),
            writable: std::mem::replace(&mut self.writable, none.clone()),
            huge: std::mem::replace(&mut self.huge, none),
            ..*self
        }
    }

    /// Drops its mappings: the next access to each page is a fault. How many there were.
    pub(super) fn zap(&mut self) -> u64 {
        let zapped = self.mapped.count();
        self.mapped.fill(false);
        self.writable.fill(false);
        self.huge.fill(false);
        zapped
    }
}

/// A slot, as a list has it.
#[derive(Clone, Copy, Debug)]
struct Entry {
    key: SlotKey,
    gpa: u64,
    end: u64,
    /// On its way out or elsewhere: accesses find no memory.
    invalid: bool,
}

impl Entry {
    fn of(region: &Region) -> Self {
        Self {
            key: region.key,
            gpa: region.gpa,
            end: region.gpa + region.host.bytes(),
            invalid: false,
        }
    }

    const fn page(&self, gpa: u64) -> (SlotKey, u64) {
        (self.key, (gpa - self.gpa) / PAGE_SIZE)
    }
}

/// All slots. vCPUs look at the active list; a change is made in the inactive one, and then they are swapped. What passes
/// through an invalid slot (delete, move) costs two swaps, anything else one.
///
/// Invariant: between two calls both lists are the same, but for the order in which they came to be.
#[derive(Debug, Default)]
pub(super) struct Slots {
    lists: [Vec<Entry>; 2],
    active: usize,
    all: BTreeMap<SlotKey, Slot>,
    pub(super) swaps: u64,
    pub(super) zapped: u64,
}

impl Slots {
    pub(super) fn get(&self, key: SlotKey) -> Option<&Slot> {
        self.all.get(&key)
    }

    pub(super) fn get_mut(&mut self, key: SlotKey) -> Option<&mut Slot> {
        self.all.get_mut(&key)
    }

    pub(super) const fn all(&self) -> &BTreeMap<SlotKey, Slot> {
        &self.all
    }

    pub(super) fn zap_all(&mut self) {
        self.zapped += self.all.values_mut().map(Slot::zap).sum::<u64>();
    }

    fn entry(&self, gpa: u64) -> Option<&Entry> {
        let list = &self.lists[self.active];
        let after = list.partition_point(|e| e.key.address_space == 0 && e.gpa <= gpa);
        list[..after].last().filter(|e| gpa < e.end)
    }

    /// The slot and the page of it that an access in address space 0 finds.
    pub(super) fn find(&self, gpa: u64) -> Option<(SlotKey, u64)> {
        let entry = self.entry(gpa).filter(|e| !e.invalid)?;
        Some(entry.page(gpa))
    }

    /// The slot and the page of it that a mark in a log finds: an invalid slot still has its log.
    pub(super) fn find_log(&self, gpa: u64) -> Option<(SlotKey, u64)> {
        Some(self.entry(gpa)?.page(gpa))
    }

    /// Whether another slot of the same address space is in the way.
    pub(super) fn is_taken(&self, region: &Region) -> bool {
        let wanted = Entry::of(region);
        self.lists[self.active].iter().any(|e| {
            e.key != wanted.key
                && e.key.address_space == wanted.key.address_space
                && e.gpa < wanted.end
                && wanted.gpa < e.end
        })
    }

    /// Makes a change in the inactive list, and swaps.
    fn change(&mut self, change: impl FnOnce(&mut Vec<Entry>)) {
        let mut next = self.lists[self.active].clone();
        change(&mut next);
        next.sort_unstable_by_key(|e| (e.key.address_space, e.gpa));
        self.active = 1 - self.active;
        self.lists[self.active] = next;
        self.swaps += 1;
    }

    pub(super) fn insert(&mut self, region: &Region, slot: Slot) {
        self.all.insert(region.key, slot);
        self.change(|list| list.push(Entry::of(region)));
    }

    /// The first half of deletes and moves.
    pub(super) fn invalidate(&mut self, keys: &[SlotKey]) {
        self.change(|list| {
            for entry in list.iter_mut().filter(|e| keys.contains(&e.key)) {
                entry.invalid = true;
            }
        });
        for key in keys {
            self.zapped += self.get_mut(*key).map_or(0, Slot::zap);
        }
    }

    /// Whatever changes in the table, vCPUs see it at once.
    pub(super) fn rewrite(&mut self, rewrite: impl FnOnce(&mut BTreeMap<SlotKey, Slot>)) {
        rewrite(&mut self.all);
        let entries = self.all.iter().map(|(key, slot)| Entry {
            key: *key,
            gpa: slot.gpa,
            end: slot.gpa + slot.pages * PAGE_SIZE,
            invalid: false,
        });
        let next: Vec<Entry> = entries.collect();
        self.change(|list| *list = next);
    }

    /// The second half of a delete.
    pub(super) fn remove(&mut self, key: SlotKey) -> Option<Slot> {
        self.change(|list| list.retain(|e| e.key != key));
        self.all.remove(&key)
    }

    /// The second half of a move.
    pub(super) fn place(&mut self, region: &Region) {
        if let Some(slot) = self.get_mut(region.key) {
            slot.gpa = region.gpa;
        }
        self.change(|list| {
            list.retain(|e| e.key != region.key);
            list.push(Entry::of(region));
        });
    }

    /// A change of flags replaces the slot by a copy of itself.
    pub(super) fn replace(&mut self) {
        self.change(|_| ());
    }
}
