//! Single properties of the list call: each one tried with pages that are written at the worst moment.

use std::collections::BTreeMap;

use gleaner_bitmap::{PAGE_SIZE, PageRange, Slot, SlotKey};
use gleaner_ring::model::{Going, ListKvm, Listed, ModelConfig};
use gleaner_ring::{DirtyRing, Kvm, MemslotCall, Mode, Region, Vcpu};
use serde::Serialize;

use super::guest::Guest;
use super::listener::region;
use crate::{Block, Result};

/// One property, tried.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Trial {
    /// What was done.
    pub what: &'static str,
    /// Dirty pages that the call handed out.
    pub fetched: u64,
    /// Pages that nobody will copy.
    pub lost: u64,
}

/// Pages of the slot that everything begins with.
const WHOLE: u64 = (64 << 20) / PAGE_SIZE;
/// Where it is cut.
const CUT: u64 = WHOLE / 2;
/// Pages on either side of the cut that vCPUs write to: words of pages that a RESET gathers reach across it.
const NEAR: u64 = 24;
const RING_BYTES: u32 = 1 << 20;
/// Far away from the slot.
const ELSEWHERE: u64 = 4 * WHOLE;

/// All trials.
pub(super) fn all() -> Result<Vec<Trial>> {
    let block = Block::memfd("trial", WHOLE * PAGE_SIZE)?;
    let part = Part(&block);
    let whole = part.slot(0, 0, 0, WHOLE);
    let delete = MemslotCall::Delete(whole.clone());
    let hole = [
        delete.clone(),
        MemslotCall::Create(part.slot(0, 0, 0, CUT - NEAR)),
        MemslotCall::Create(part.slot(1, CUT + NEAR, CUT + NEAR, WHOLE - CUT - NEAR)),
    ];
    let away = part.slot(0, ELSEWHERE, 0, WHOLE);
    let moved = [MemslotCall::Move {
        from: whole.clone(),
        to: away.clone(),
    }];
    let made_anew = [delete.clone(), MemslotCall::Create(away)];
    let split = |lower: u16, upper: u16| {
        [
            delete.clone(),
            MemslotCall::Create(part.slot(lower, 0, 0, CUT)),
            MemslotCall::Create(part.slot(upper, CUT, CUT, WHOLE - CUT)),
        ]
    };
    let bitmap = |what, pml, going, calls: &[MemslotCall]| {
        Trial::with_bitmap(what, &block, pml, going, &whole, calls)
    };
    let ring = |what, reading, calls: &[MemslotCall]| {
        Trial::with_rings(what, &block, reading, &whole, calls)
    };
    let (at_once, invalid) = (Going::AtOnce, Going::InvalidFirst);
    Ok(vec![
        bitmap("hole, one swap", false, at_once, &hole)?,
        bitmap("hole, one swap, with PML", true, at_once, &hole)?,
        bitmap("hole, invalid first, with PML", true, invalid, &hole)?,
        bitmap("move, as a move, with PML", true, invalid, &moved)?,
        bitmap(
            "move, as delete and create, with PML",
            true,
            invalid,
            &made_anew,
        )?,
        bitmap("move, as a move, one swap, with PML", true, at_once, &moved)?,
        ring(
            "split, rings, id reused, read by the new slots",
            Reading::New,
            &split(0, 1),
        )?,
        ring(
            "split, rings, id reused, read by the slots of their time",
            Reading::OfItsTime,
            &split(0, 1),
        )?,
        ring("split, rings, new ids", Reading::ById, &split(1, 2))?,
    ])
}

/// Cuts slots from the block.
struct Part<'a>(&'a Block);

impl Part<'_> {
    fn slot(&self, id: u16, at: u64, first: u64, pages: u64) -> Region {
        let slot = Slot {
            key: id.into(),
            gpa: at * PAGE_SIZE,
            block: self.0.id(),
            range: PageRange::new(first, pages),
            readonly: false,
        };
        region(self.0, &slot)
    }
}

/// The slots that are there after the calls.
fn after(calls: &[MemslotCall]) -> Vec<Region> {
    let coming = calls.iter().filter_map(|call| match call {
        MemslotCall::Create(to) | MemslotCall::Move { to, .. } => Some(to.clone()),
        MemslotCall::Delete(_) | MemslotCall::Flags { .. } => None,
    });
    coming.collect()
}

impl Trial {
    /// vCPUs write around the cut, are harvested, and write there again before and while the list is applied.
    fn with_bitmap(
        what: &'static str,
        block: &Block,
        pml: bool,
        going: Going,
        whole: &Region,
        calls: &[MemslotCall],
    ) -> Result<Self> {
        let config = ModelConfig {
            pml,
            ..ModelConfig::default()
        };
        let mut guest = Guest::new(block, config, Mode::Bitmap)?;
        MemslotCall::Create(whole.clone()).apply(&guest.kvm)?;
        guest.go();
        let near = (CUT - NEAR) * PAGE_SIZE;
        guest.write_all(near, 2 * NEAR);
        guest.fetch(whole)?;
        guest.write_all(near, NEAR);
        guest.writing(|w| w.spots = vec![(near, 2 * NEAR)]);
        let listed = ListKvm::new(&guest.kvm, going).apply(calls)?;
        let fetched = pages(&listed);
        for log in &listed.fetched {
            guest.hand_out(log)?;
        }
        let lost = guest.lost(&after(calls))?;
        Ok(Self {
            what,
            fetched,
            lost,
        })
    }

    /// vCPUs write around the cut before the list is applied, below it also meanwhile and after; the rings are read after it.
    fn with_rings(
        what: &'static str,
        block: &Block,
        reading: Reading,
        whole: &Region,
        calls: &[MemslotCall],
    ) -> Result<Self> {
        let mode = Mode::Ring { bytes: RING_BYTES };
        let guest = Guest::new(block, ModelConfig::default(), mode)?;
        let mut rings = Vec::new();
        for (id, vcpu) in (0..).zip(&guest.vcpus) {
            rings.push(vcpu.ring(id, RING_BYTES)?);
        }
        MemslotCall::Create(whole.clone()).apply(&guest.kvm)?;
        guest.go();
        let near = (CUT - NEAR) * PAGE_SIZE;
        guest.write_all(near, 2 * NEAR);
        guest.writing(|w| w.spots = vec![(near, NEAR)]);
        let listed = ListKvm::new(&guest.kvm, Going::InvalidFirst).apply(calls)?;
        guest.writing(|w| w.spots.clear());
        let mut drain = Drain {
            rings,
            taken: vec![0; 2],
            old: whole.clone(),
            new: after(calls).into_iter().map(|r| (r.key, r)).collect(),
            boundary: listed.ring_entries.clone(),
            reading,
        };
        drain.run(&guest)?;
        // What was left unarmed shows now, below the cut. Pages above it, which are not written again, show what was misread.
        guest.write_all(near, NEAR);
        drain.run(&guest)?;
        Ok(Self {
            what,
            fetched: pages(&listed),
            lost: guest.owed(),
        })
    }
}

fn pages(listed: &Listed) -> u64 {
    let words = listed.fetched.iter().flat_map(|log| &log.words);
    words.map(|w| u64::from(w.count_ones())).sum()
}

/// How entries of rings are understood after a list call.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reading {
    /// As if the new slots had always been there.
    New,
    /// By the old slots up to the entry at which they changed, which the call has told.
    OfItsTime,
    /// By the only slot that ever had the id.
    ById,
}

/// Reads the rings, and resets them.
struct Drain {
    rings: Vec<DirtyRing>,
    /// Entries read so far.
    taken: Vec<u32>,
    old: Region,
    new: BTreeMap<SlotKey, Region>,
    boundary: Vec<u32>,
    reading: Reading,
}

impl Drain {
    fn run(&mut self, guest: &Guest) -> Result<()> {
        let mut read = Vec::new();
        let all = self.rings.iter_mut().zip(&mut self.taken);
        for ((ring, taken), boundary) in all.zip(&self.boundary) {
            while let Some((key, page)) = ring.pop() {
                let old = match self.reading {
                    Reading::New => false,
                    Reading::OfItsTime => *taken < *boundary,
                    Reading::ById => key == self.old.key,
                };
                *taken += 1;
                let slot = if old {
                    Some(&self.old)
                } else {
                    self.new.get(&key)
                };
                read.extend(slot.map(|slot| (slot.clone(), page)));
            }
        }
        // Re-armed, then copied.
        guest.kvm.reset_dirty_rings()?;
        for (slot, page) in read {
            guest.hand_out_page(&slot, page);
        }
        Ok(())
    }
}
