//! Toy dirty sources: KVM's bitmap of each slot, and a device that knows blocks. They fail when they are told to.

use std::collections::{BTreeMap, BTreeSet};

use gleaner_bitmap::{
    BlockId, Collected, DirtySource, Error, Layout, Rearm, Result, Scope, Slot, SlotKey,
};

use super::Page;

/// How a source fails, until it is healed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Collecting fails after so many slots or pages.
    Collect(usize),
    /// Re-arming says that it fell short.
    Short,
    /// Re-arming fails.
    Rearm,
}

impl Fault {
    /// The fault of an input's byte; `None` heals.
    pub fn of(byte: u8) -> Option<Self> {
        match byte & 3 {
            1 => Some(Self::Collect(usize::from(byte >> 2 & 7))),
            2 => Some(Self::Short),
            3 => Some(Self::Rearm),
            _ => None,
        }
    }
}

fn failed() -> Error {
    Error::Source {
        source_name: "toy".into(),
        cause: "as told".into(),
    }
}

fn rearm(fault: Option<Fault>) -> Result<Rearm> {
    match fault {
        Some(Fault::Short) => Ok(Rearm::Short {
            collected: 2,
            rearmed: 1,
        }),
        Some(Fault::Rearm) => Err(failed()),
        _ => Ok(Rearm::Complete),
    }
}

/// KVM's log: a bitmap for each slot that can be written, which goes with its slot.
#[derive(Default)]
pub struct Kvm {
    pub fault: Option<Fault>,
    /// Given away since a harvest came off last.
    pub given: BTreeSet<Page>,
    written: BTreeMap<SlotKey, BTreeSet<u64>>,
}

impl Kvm {
    /// A vCPU writes page `page` of a slot, counted around.
    pub fn write(&mut self, layout: &Layout, key: SlotKey, page: u64) {
        if let Some(slot) = layout.slot(key).filter(|slot| !slot.readonly) {
            let written = self.written.entry(key).or_default();
            written.insert(page % slot.range.pages);
        }
    }

    /// These slots went, or became others.
    pub fn layout_changed(&mut self, going: &[SlotKey]) {
        self.written.retain(|key, _| !going.contains(key));
    }

    pub fn is_clean(&self) -> bool {
        self.written.values().all(BTreeSet::is_empty)
    }
}

/// The bitmap as KVM copies it out. Bits past the slot's last page are set: they mean nothing.
fn words(slot: &Slot, written: &BTreeSet<u64>) -> Vec<u64> {
    (0..slot.range.pages.div_ceil(64))
        .map(|word| {
            let set = |bit: &u64| {
                let page = word * 64 + bit;
                page >= slot.range.pages || written.contains(&page)
            };
            (0..64).filter(set).map(|bit| 1 << bit).sum()
        })
        .collect()
}

impl DirtySource for Kvm {
    fn name(&self) -> String {
        "kvm".into()
    }

    fn collect(&mut self, layout: &Layout, scope: Scope<'_>, into: &mut Collected) -> Result<()> {
        let slots = layout.slots().filter(|slot| scope.covers(slot.key));
        for (done, slot) in slots.enumerate() {
            if self.fault == Some(Fault::Collect(done)) {
                return Err(failed());
            }
            let Some(written) = self.written.get_mut(&slot.key) else {
                continue;
            };
            into.or_slot(slot, &words(slot, written))?;
            let pages = std::mem::take(written).into_iter();
            self.given
                .extend(pages.map(|page| (slot.block, slot.range.first + page)));
        }
        Ok(())
    }

    fn rearm(&mut self) -> Result<Rearm> {
        rearm(self.fault)
    }
}

/// The VMM's own writes, and a device's: by block, whether a slot maps the page or not.
#[derive(Default)]
pub struct Device {
    pub fault: Option<Fault>,
    /// Given away since a harvest came off last.
    pub given: BTreeSet<Page>,
    written: BTreeSet<Page>,
}

impl Device {
    pub fn write(&mut self, block: BlockId, page: u64) {
        self.written.insert((block, page));
    }

    pub fn remove_block(&mut self, gone: BlockId) {
        self.written.retain(|(block, _)| *block != gone);
    }

    pub fn is_clean(&self) -> bool {
        self.written.is_empty()
    }
}

impl DirtySource for Device {
    fn name(&self) -> String {
        "device".into()
    }

    fn collect(&mut self, layout: &Layout, _: Scope<'_>, into: &mut Collected) -> Result<()> {
        for (done, block) in layout.blocks().enumerate() {
            if self.fault == Some(Fault::Collect(done)) {
                return Err(failed());
            }
            let pages: Vec<u64> = (0..block.pages)
                .filter(|page| self.written.contains(&(block.id, *page)))
                .collect();
            // Three ways to say the same.
            match pages.len() % 3 {
                0 => into.mark_pages(block.id, &pages)?,
                1 => {
                    for page in &pages {
                        into.mark(block.id, *page)?;
                    }
                }
                _ => {
                    for page in &pages {
                        let page = gleaner_bitmap::PageRange::new(*page, 1);
                        into.mark_range(block.id, page)?;
                    }
                }
            }
            for page in pages {
                self.written.remove(&(block.id, page));
                self.given.insert((block.id, page));
            }
        }
        Ok(())
    }

    fn rearm(&mut self) -> Result<Rearm> {
        rearm(self.fault)
    }
}
