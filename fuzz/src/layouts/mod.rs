//! Histories of a guest's memory: slot transactions, writes, harvests that fail, consumers and leases, beside a copy that
//! knows nothing but sets of pages.
//!
//! An input is a row of steps, see [`code`]. Numbers in it are small or at the edges of arithmetic.

pub mod code;
mod edits;
mod owed;
mod remap;
mod sources;

use std::collections::BTreeSet;
use std::sync::Arc;

use gleaner_bitmap::{
    BlockId, Consumer, DirtySource, DirtyStore, Harvester, Layout, Lease, RemapPlan, Scope,
    SlotKey, Start,
};

use crate::MAX_INPUT;
use crate::allocations::capped;
use crate::bytes::Bytes;
use edits::Naive;
use owed::Owed;
use sources::{Device, Kvm};

/// A page, as its identity is everywhere.
type Page = (BlockId, u64);

/// What a history may allocate. Blocks are small, so nearly all of it is the copy's sets; a bitmap of a hostile length would
/// be far above.
const CAP: usize = 16 << 20;

/// Slot ids of this guest: few, so that they run out.
const SLOT_LIMIT: u32 = 7;
const CONSUMERS: usize = 3;

/// What a history came to.
#[derive(Clone, Copy, Default, Debug)]
pub struct Tally {
    /// Layouts that came into force.
    pub transactions: u64,
    /// Pages that were leased.
    pub leased: u64,
    /// Harvests that a source let fail.
    pub failed: u64,
}

/// Whatever happens: each page is owed by the consumers that the copy says, no more and no less, leases go around, and a
/// plan says of each dirty page what became of it.
///
/// # Panics
/// When something else holds.
pub fn run(input: &[u8]) {
    history(input);
}

/// [`run`], and what the history came to.
///
/// # Panics
/// As [`run`].
pub fn history(input: &[u8]) -> Tally {
    capped(CAP, || {
        let mut guest = Guest::new();
        let mut bytes = Bytes(&input[..input.len().min(MAX_INPUT)]);
        while guest.step(&mut bytes).is_some() {
            guest.compare_counts();
        }
        guest.end();
        guest.tally
    })
}

/// A consumer with its unfinished leases, oldest first.
struct Reader {
    consumer: Consumer,
    leases: Vec<Lease>,
    owed: Owed,
}

struct Guest {
    layout: Layout,
    naive: Naive,
    store: Arc<DirtyStore>,
    harvester: Harvester,
    kvm: Kvm,
    device: Device,
    readers: Vec<Reader>,
    /// Leases of consumers that are gone.
    orphans: Vec<Lease>,
    next_block: u64,
    tally: Tally,
}

impl Guest {
    fn new() -> Self {
        Self {
            layout: Layout::empty(SLOT_LIMIT),
            naive: Naive::default(),
            store: Arc::default(),
            harvester: Harvester::default(),
            kvm: Kvm::default(),
            device: Device::default(),
            readers: Vec::new(),
            orphans: Vec::new(),
            next_block: 0,
            tally: Tally::default(),
        }
    }

    /// One step; `None` at the end of the input.
    fn step(&mut self, bytes: &mut Bytes<'_>) -> Option<()> {
        match bytes.choice(code::STEPS)? {
            code::TRANSACTION => self.transaction(bytes)?,
            code::WRITE => {
                let (key, page) = (code::key(bytes)?, bytes.number()?);
                self.kvm.write(&self.layout, key, page);
            }
            code::DEVICE_WRITES => {
                let blocks: Vec<_> = self.layout.blocks().cloned().collect();
                let block = bytes.choice(blocks.len())?;
                let page = bytes.number()?;
                if let Some(block) = blocks.get(block) {
                    self.device.write(block.id, page % block.pages);
                }
            }
            code::HARVEST => {
                self.harvest(Scope::All);
            }
            code::FAULT => self.fault(bytes.byte()?),
            code::CONSUMER => self.consumer(bytes.byte()?),
            code::LEASE => {
                let (reader, max) = (self.reader(bytes)?, bytes.number()?);
                if let Some(reader) = reader {
                    self.tally.leased += reader.lease(max);
                }
            }
            code::ACK => {
                if let Some((lease, owed)) = self.reader(bytes)?.and_then(Reader::oldest) {
                    owed.ack(lease.extents());
                    lease.ack();
                }
            }
            code::FALL_BACK => {
                if let Some((lease, owed)) = self.reader(bytes)?.and_then(Reader::oldest) {
                    owed.fall_back(lease.extents());
                    drop(lease);
                }
            }
            code::LEAVE => {
                let reader = bytes.choice(self.readers.len())?;
                if reader < self.readers.len() {
                    let gone = self.readers.remove(reader);
                    self.orphans.extend(gone.leases);
                }
            }
            _ => self.orphans.clear(),
        }
        Some(())
    }

    fn reader(&mut self, bytes: &mut Bytes<'_>) -> Option<Option<&mut Reader>> {
        let reader = bytes.choice(self.readers.len())?;
        Some(self.readers.get_mut(reader))
    }

    fn fault(&mut self, byte: u8) {
        let fault = sources::Fault::of(byte);
        if byte & 64 == 0 {
            self.kvm.fault = fault;
        } else {
            self.device.fault = fault;
        }
    }

    /// Harvests; whether it came off. What the sources gave away is owed then, and not before.
    fn harvest(&mut self, scope: Scope<'_>) -> bool {
        let sources: [&mut dyn DirtySource; 2] = [&mut self.kvm, &mut self.device];
        let Ok(report) = self
            .harvester
            .harvest(sources, &self.layout, scope, &self.store)
        else {
            self.tally.failed += 1;
            return false;
        };
        let given = self.take_given();
        assert_eq!(report.pages, given.len() as u64);
        for reader in &mut self.readers {
            reader.owed.dirty.extend(&given);
        }
        true
    }

    /// All that the sources gave away since a harvest came off last.
    fn take_given(&mut self) -> BTreeSet<Page> {
        let mut given = std::mem::take(&mut self.kvm.given);
        given.append(&mut self.device.given);
        given
    }

    fn consumer(&mut self, byte: u8) {
        if self.readers.len() == CONSUMERS {
            return;
        }
        if self.readers.is_empty() {
            // Logging starts, and nobody is owed what was written before.
            let sources: [&mut dyn DirtySource; 2] = [&mut self.kvm, &mut self.device];
            if self.harvester.discard(sources, &self.layout).is_err() {
                self.tally.failed += 1;
                return;
            }
            self.take_given();
        }
        let start = if byte & 1 == 0 {
            Start::AllDirty
        } else {
            Start::Empty
        };
        let mut owed = Owed::new(start);
        for block in self.layout.blocks() {
            owed.add_block(block.id, block.pages);
        }
        self.readers.push(Reader {
            consumer: self.store.consumer(start),
            leases: Vec::new(),
            owed,
        });
    }

    /// A change of slots, as the tracker makes it: what is about to go is harvested first.
    fn transaction(&mut self, bytes: &mut Bytes<'_>) -> Option<()> {
        let mut editor = self.layout.edit();
        let mut naive = self.naive.clone();
        for _ in 0..bytes.choice(9)? {
            naive.edit(&mut editor, &mut self.next_block, bytes)?;
        }
        let new = match editor.finish() {
            Ok(new) => new,
            Err(error) => {
                assert!(!naive.is_layout(), "{error}");
                return Some(());
            }
        };
        naive.compare(&new);
        assert_eq!(new.generation().0, self.layout.generation().0 + 1);
        let old = self.layout.clone();
        let going: Vec<SlotKey> = old
            .slots()
            .filter(|slot| new.slot(slot.key) != Some(slot))
            .map(|slot| slot.key)
            .collect();
        if !self.harvest(Scope::Slots(&going)) {
            return Some(());
        }
        let plan = RemapPlan::between(&old, &new);
        let remapped = plan.apply(&self.store.snapshot(&plan.blocks()));
        let union = self.readers.iter().flat_map(|reader| reader.owed.all());
        remap::compare(&old, &new, &union.collect(), &remapped);
        for block in old.blocks().filter(|b| new.block(b.id).is_none()) {
            self.store.remove_block(block.id);
            self.harvester.remove_block(block.id);
            self.device.remove_block(block.id);
            for reader in &mut self.readers {
                reader.owed.remove_block(block.id);
            }
        }
        for block in new.blocks().filter(|b| old.block(b.id).is_none()) {
            self.store.add_block(block.id, block.pages);
            self.harvester.add_block(block.id, block.pages);
            for reader in &mut self.readers {
                reader.owed.add_block(block.id, block.pages);
            }
        }
        self.kvm.layout_changed(&going);
        (self.layout, self.naive) = (new, naive);
        self.tally.transactions += 1;
        self.compare_pages();
        Some(())
    }

    /// Each consumer is owed as many pages as the copy says: asked after each step, so it is quick.
    fn compare_counts(&self) {
        for reader in &self.readers {
            let dirty = reader.consumer.dirty_pages();
            assert_eq!(dirty, reader.owed.dirty.len() as u64);
        }
    }

    /// The pages that anybody is owed are those that the copy says.
    fn compare_pages(&self) {
        let blocks: Vec<BlockId> = self.layout.blocks().map(|block| block.id).collect();
        let snapshot = self.store.snapshot(&blocks);
        let mut found = BTreeSet::new();
        for (block, bits) in &snapshot {
            let pages = bits.runs().flat_map(|run| run.first..run.end());
            found.extend(pages.map(|page| (*block, page)));
        }
        let owed = self.readers.iter().flat_map(|reader| reader.owed.all());
        assert_eq!(found, owed.collect());
    }

    /// Sources are healed, leases fall back, and each consumer takes what it is owed.
    fn end(&mut self) {
        self.compare_pages();
        self.kvm.fault = None;
        self.device.fault = None;
        self.orphans.clear();
        assert!(self.harvest(Scope::All));
        assert!(self.kvm.is_clean() && self.device.is_clean());
        for reader in &mut self.readers {
            while let Some((lease, owed)) = reader.oldest() {
                owed.fall_back(lease.extents());
                drop(lease);
            }
            while reader.lease(50) > 0 {
                let Some((lease, owed)) = reader.oldest() else {
                    break;
                };
                owed.ack(lease.extents());
                lease.ack();
            }
            assert_eq!(reader.consumer.dirty_pages(), 0);
        }
    }
}

impl Reader {
    /// Takes a lease and compares it; the pages in it.
    fn lease(&mut self, max: u64) -> u64 {
        let expected = self.owed.lease(max);
        let lease = self.consumer.lease(max);
        let extents = lease.as_ref().map_or(&[][..], Lease::extents);
        assert_eq!(owed::pages(extents).collect::<Vec<_>>(), expected);
        if let Some(lease) = lease {
            assert_eq!(lease.pages(), expected.len() as u64);
            self.leases.push(lease);
        }
        expected.len() as u64
    }

    fn oldest(&mut self) -> Option<(Lease, &mut Owed)> {
        (!self.leases.is_empty()).then(|| (self.leases.remove(0), &mut self.owed))
    }
}
