//! The dirty rings of all vCPUs as one dirty source.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use gleaner_bitmap::mutant::{self, Mutant};
use gleaner_bitmap::{Collected, DirtySource, Layout, Rearm, Scope, Slot, SlotKey};

use crate::{DirtyRing, Error, Kvm, Reset, Result, VcpuIdentity, with_signals_blocked};

/// Calls of RESET without progress after which the rest is left to healing.
const RESET_ATTEMPTS: u32 = 64;
/// Pages gathered before they are handed over, so that the block is looked up once for many.
const BATCH: usize = 512;

/// What a vCPU thread shares with the source that reads its ring.
#[derive(Debug, Default)]
pub struct RingHandle {
    full: AtomicBool,
}

impl RingHandle {
    /// The vCPU came back with a full ring.
    pub fn set_full(&self) {
        self.full.store(true, Ordering::Release);
    }
}

#[derive(Debug)]
struct Ring {
    vcpu: u64,
    /// To tell the vCPU from another of the same id.
    identity: VcpuIdentity,
    ring: DirtyRing,
    handle: Arc<RingHandle>,
    /// Entries taken so far.
    taken: u64,
    /// Times in a row that the vCPU found its ring full and no entry could be read.
    full_but_empty: u32,
}

/// What can be seen of a ring without emptying it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RingLevel {
    /// The vCPU's id.
    pub vcpu: u64,
    /// Pages that it has dirtied so far; a page counts again when it is written after a harvest.
    pub dirtied: u64,
    /// Entries that nobody has taken.
    pub waiting: u32,
    /// Entries that the ring has.
    pub entries: u32,
}

/// All rings of a VM.
///
/// Invariants:
/// * `unreset` counts the entries read since the last RESET that was complete; while it is not zero, pages are unarmed.
/// * `short` is set when a RESET stopped early: up to 64 pages were counted as reset and left unarmed, which is healed
///   only by switching the log off and on with every vCPU out of `KVM_RUN`. Until then nothing collected is published.
/// * `stale` counts the entries that were healed before KVM had reset them. Their pages are armed; what they still take is
///   room in the ring. They may name slots that are gone, for which KVM skips a whole batch: so they are reset before
///   new ones are read, and where they can't be, new ones count as cut short.
/// * An entry is interpreted by the layout that is passed in, and all rings are drained and reset before that layout
///   changes; so a slot id can be used again at once.
pub struct RingSource {
    kvm: Arc<dyn Kvm>,
    rings: Vec<Ring>,
    unreset: u64,
    stale: u64,
    short: bool,
    /// Something was dirtied that no entry names: only "everything is dirty" is true.
    lost: bool,
}

impl RingSource {
    /// No rings yet.
    #[must_use]
    pub fn new(kvm: Arc<dyn Kvm>) -> Self {
        Self {
            kvm,
            rings: Vec::new(),
            unreset: 0,
            stale: 0,
            short: false,
            lost: false,
        }
    }

    /// Makes a vCPU's ring known, before that vCPU runs. A ring is known for as long as its VM exists: a vCPU that comes
    /// again, with another thread, goes on where it was, and so must its reader.
    ///
    /// # Errors
    /// [`Error::MapRing`] when another vCPU is known by this id; else that of `map`, which is asked for a ring that is not
    /// known yet.
    pub fn add(
        &mut self,
        vcpu: u64,
        identity: VcpuIdentity,
        map: impl FnOnce() -> Result<DirtyRing>,
    ) -> Result<Arc<RingHandle>> {
        if let Some(known) = self.rings.iter().find(|r| r.vcpu == vcpu) {
            if known.identity != identity {
                // Another vCPU under this id: its own ring would be in no harvest.
                return Err(Error::MapRing {
                    vcpu,
                    source: io::ErrorKind::AlreadyExists.into(),
                });
            }
            return Ok(Arc::clone(&known.handle));
        }
        let handle = Arc::new(RingHandle::default());
        if mutant::is_planted(Mutant::RingUnmapped) {
            return Ok(handle);
        }
        self.rings.push(Ring {
            vcpu,
            identity,
            ring: map()?,
            handle: Arc::clone(&handle),
            taken: 0,
            full_but_empty: 0,
        });
        Ok(handle)
    }

    /// How full each ring is. Makes no call.
    pub fn levels(&self) -> impl Iterator<Item = RingLevel> {
        self.rings.iter().map(|ring| {
            let waiting = ring.ring.waiting();
            RingLevel {
                vcpu: ring.vcpu,
                dirtied: ring.taken + u64::from(waiting),
                waiting,
                entries: ring.ring.entries(),
            }
        })
    }

    /// How many pages each vCPU has dirtied so far, by its id.
    pub fn dirtied(&self) -> impl Iterator<Item = (u64, u64)> {
        self.levels().map(|level| (level.vcpu, level.dirtied))
    }

    /// Pages may be without a log: the next harvest reports everything as dirty, and healing is due.
    pub const fn lose(&mut self) {
        self.lost = true;
    }

    /// The log was switched off and on for every slot, with every vCPU out of `KVM_RUN` and the rings drained: all
    /// pages are armed again.
    pub fn healed(&mut self) {
        self.short = false;
        self.stale += std::mem::take(&mut self.unreset);
    }

    /// One RESET; returns how many entries it did. One that was disturbed counts as cut short; if it was not, that costs a
    /// healing.
    fn reset(&mut self) -> Result<u64> {
        let Reset {
            entries: done,
            disturbed,
        } = with_signals_blocked(|| self.kvm.reset_dirty_rings())??;
        self.short |= done > 0 && disturbed;
        let stale = done.min(self.stale);
        self.stale -= stale;
        self.unreset = self.unreset.saturating_sub(done - stale);
        Ok(done)
    }

    /// Lets KVM reset what healing left, and whatever else keeps a ring full of which nothing can be read.
    fn reset_stale(&mut self) -> Result<()> {
        let mut attempts = 0;
        let stuck = self.rings.iter().any(|r| r.full_but_empty > 0);
        while (self.stale > 0 || stuck && attempts == 0) && attempts < RESET_ATTEMPTS {
            attempts = if self.reset()? == 0 { attempts + 1 } else { 1 };
        }
        Ok(())
    }
}

/// Drains one ring. Returns whether it makes sense: `false` when entries must have been lost.
fn drain(
    ring: &mut Ring,
    layout: &Layout,
    into: &mut Collected,
    taken: &mut u64,
) -> gleaner_bitmap::Result<bool> {
    let mut batch: Vec<u64> = Vec::with_capacity(BATCH);
    let mut slot: Option<(SlotKey, Option<Slot>)> = None;
    let mut sane = true;
    let entries = u64::from(ring.ring.entries());
    let mut count = 0;
    let full = ring.handle.full.swap(false, Ordering::AcqRel);
    while count < entries {
        let Some((key, page)) = ring.ring.pop() else {
            break;
        };
        count += 1;
        if slot.is_none_or(|(current, _)| current != key) || batch.len() == BATCH {
            flush(&mut batch, slot, into)?;
            slot = Some((key, layout.slot(key).copied()));
        }
        match slot {
            Some((_, Some(slot))) if page < slot.range.pages => batch.push(slot.range.first + page),
            // No slot of that name, or past its end: the kernel skips whole batches at RESET for it.
            _ => sane = false,
        }
    }
    flush(&mut batch, slot, into)?;
    *taken += count;
    ring.taken += count;
    ring.full_but_empty = match (full, count) {
        (_, 1..) => 0,
        (true, 0) => ring.full_but_empty + 1,
        (false, 0) => ring.full_but_empty,
    };
    // Once may be a harvest that came between the exit and this one; twice means the kernel's index is not ours.
    Ok(sane && count < entries && ring.full_but_empty < 2)
}

fn flush(
    batch: &mut Vec<u64>,
    slot: Option<(SlotKey, Option<Slot>)>,
    into: &mut Collected,
) -> gleaner_bitmap::Result<()> {
    if let Some((_, Some(slot))) = slot {
        into.mark_pages(slot.block, batch)?;
    }
    batch.clear();
    Ok(())
}

impl DirtySource for RingSource {
    fn name(&self) -> String {
        "dirty rings".into()
    }

    /// Drains every ring, whatever the scope: an entry that stays would be read by the next layout.
    fn collect(
        &mut self,
        layout: &Layout,
        scope: Scope<'_>,
        into: &mut Collected,
    ) -> gleaner_bitmap::Result<()> {
        if scope != Scope::All && mutant::is_planted(Mutant::RingsNotDrained) {
            return Ok(());
        }
        if self.unreset == 0 {
            self.reset_stale()?;
        }
        for ring in &mut self.rings {
            self.lost |= !drain(ring, layout, into, &mut self.unreset)?;
        }
        #[cfg(target_arch = "aarch64")]
        crate::backup::collect(&*self.kvm, layout, into)?;
        self.short |= self.stale > 0 && self.unreset > 0;
        if self.lost {
            for block in layout.blocks() {
                into.mark_range(block.id, block.all())?;
            }
            for ring in &mut self.rings {
                ring.ring.resynchronise();
                ring.full_but_empty = 0;
            }
            self.short = true;
            self.lost = false;
        }
        Ok(())
    }

    fn rearm(&mut self) -> gleaner_bitmap::Result<Rearm> {
        let collected = self.unreset;
        if collected > 0 {
            let mut attempts = 0;
            while self.unreset > 0 && attempts < RESET_ATTEMPTS {
                let done = self.reset()?;
                // Whatever later calls return: where it stopped, pages may be counted and unarmed.
                self.short |= self.unreset > 0;
                attempts = if done == 0 { attempts + 1 } else { 0 };
            }
        }
        Ok(
            if self.short && !mutant::is_planted(Mutant::ShortResetTaken) {
                Rearm::Short {
                    collected,
                    rearmed: collected - self.unreset,
                }
            } else {
                Rearm::Complete
            },
        )
    }
}
