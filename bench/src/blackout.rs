//! How long a slot transaction stops the guest, beside the KVM calls that nobody could do without.
//!
//! Two guests of the same make write at random to the same number of pages. In the one a tracker cuts a hole into the slot
//! and fills it again while the vCPU runs; in the other the same calls are made by hand with the vCPU stopped. Both had
//! harvested just before, so that what a harvest inside finds is what the guest wrote since.

use std::time::{Duration, Instant};

use gleaner::vmm::guest::HOME;
use gleaner::{Blackout, PAGE_SIZE, Tracking, TransactionReport};
use gleaner_bitmap::{PageRange, SlotKey};
use gleaner_ring::{DirtyRing, Kvm as _, Mode, Region, with_signals_blocked};
use vm_memory::GuestAddress;

use crate::row::{Aim, Row};
use crate::sample::Spread;
use crate::vm::{BareVm, MODES, RunningVcpu, SLOT, TrackedVm};
use crate::{Plan, Result};

/// Percent of the bare calls' time that Gleaner may add.
const AIM_PERCENT: f64 = 10.0;
/// Bytes that the guest writes to. The hole lies outside.
const HOT: u64 = 32 << 20;
/// Writes after which the guest leaves. What the bare harvest finds: the other one finds what the vCPU wrote while the
/// gate closed, which is not the same number, so the harvest is told apart in the row.
const BATCH: u32 = 16;
/// Batches between two transactions.
const BATCHES: u64 = 128;

const LOWER: SlotKey = SlotKey::new(SLOT);
const UPPER: SlotKey = SlotKey::new(2);
const FILL: SlotKey = SlotKey::new(3);

/// Where the hole is, in pages of the slot.
fn hole(pages: u64) -> PageRange {
    PageRange::new(pages / 2 + 64, pages / 8)
}

/// What one kind of transaction cost, turn about.
#[derive(Default)]
struct Samples {
    blackouts: Vec<Blackout>,
    bare: Vec<Duration>,
}

/// The guest behind a tracker.
struct Tracked {
    // The vCPU's thread ends before the tracker that it uses.
    vcpu: RunningVcpu,
    vm: TrackedVm,
}

impl Tracked {
    fn split(&self) -> Result<TransactionReport> {
        self.vcpu.run_for(BATCHES)?;
        let mut tx = self.vm.tracker.transaction();
        tx.punch(LOWER, hole(self.vm.parts.home().pages), UPPER);
        let report = tx.commit()?;
        self.vcpu.pause()?;
        Ok(report)
    }

    fn merge(&self) -> Result<TransactionReport> {
        self.vcpu.run_for(BATCHES)?;
        let home = self.vm.parts.home();
        let hole = hole(home.pages);
        let filling = PageRange::new(home.first + hole.first, hole.pages);
        let mut tx = self.vm.tracker.transaction();
        tx.create(
            FILL,
            GuestAddress(HOME + hole.first * PAGE_SIZE),
            self.vm.parts.ram.extent(filling),
        )
        .merge(LOWER, FILL)
        .merge(LOWER, UPPER);
        let report = tx.commit()?;
        self.vcpu.pause()?;
        Ok(report)
    }
}

/// The guest whose calls are made by hand.
struct Bare {
    vm: BareVm,
    rings: Vec<DirtyRing>,
    /// The whole slot, and what is below and above the hole.
    whole: Region,
    lower: Region,
    upper: Region,
    buffer: Vec<u64>,
}

impl Bare {
    fn new(tracking: Tracking, slot: u64) -> Result<Self> {
        let vm = BareVm::new(tracking, slot, HOT, 1, BATCH)?;
        let home = vm.parts.home();
        let hole = hole(home.pages);
        let above = PageRange::new(home.first + hole.end(), home.pages - hole.end());
        Ok(Self {
            rings: vm.rings()?,
            whole: vm.region(SLOT, HOME, home)?,
            lower: vm.region(SLOT, HOME, PageRange::new(home.first, hole.first))?,
            upper: vm.region(UPPER.id, HOME + hole.end() * PAGE_SIZE, above)?,
            buffer: vec![0; home.pages.div_ceil(64) as usize],
            vm,
        })
    }

    /// Fetches and arms what some slots have dirty.
    fn harvest(&mut self, slots: &[(SlotKey, u64)]) -> Result<()> {
        let kvm = &*self.vm.kvm;
        let mut any = false;
        if let Mode::Ring { .. } = self.vm.mode {
            for ring in &mut self.rings {
                while ring.pop().is_some() {
                    any = true;
                }
            }
            if any {
                with_signals_blocked(|| kvm.reset_dirty_rings())??;
            }
            return Ok(());
        }
        for (key, pages) in slots {
            let words = &mut self.buffer[..pages.div_ceil(64) as usize];
            kvm.get_dirty_log(*key, words)?;
            if self.vm.mode == Mode::BitmapClear && words.iter().any(|w| *w != 0) {
                kvm.clear_dirty_log(*key, PageRange::new(0, *pages), words)?;
            }
        }
        Ok(())
    }

    /// Runs the guest as the other one runs, harvests, lets it write a little, and then times `calls`.
    fn timed(
        &mut self,
        slots: &[(SlotKey, u64)],
        calls: impl FnOnce(&Self) -> Result<()>,
    ) -> Result<Duration> {
        self.vm.run_for(BATCHES)?;
        self.harvest(slots)?;
        self.vm.run_for(1)?;
        let start = Instant::now();
        self.harvest(slots)?;
        calls(self)?;
        Ok(start.elapsed())
    }

    fn split(&mut self) -> Result<Duration> {
        self.timed(&[(LOWER, self.whole.pages())], |this| {
            let kvm = &*this.vm.kvm;
            kvm.delete_region(LOWER)?;
            kvm.set_region("create", &this.lower)?;
            Ok(kvm.set_region("create", &this.upper)?)
        })
    }

    fn merge(&mut self) -> Result<Duration> {
        let slots = [(LOWER, self.lower.pages()), (UPPER, self.upper.pages())];
        self.timed(&slots, |this| {
            let kvm = &*this.vm.kvm;
            kvm.delete_region(LOWER)?;
            kvm.delete_region(UPPER)?;
            Ok(kvm.set_region("create", &this.whole)?)
        })
    }
}

pub fn rows(plan: &Plan) -> Result<Vec<Row>> {
    let mut sizes = vec![("256M", 256 << 20, 200), ("1G", 1 << 30, 100)];
    if plan.long {
        sizes.push(("8G", 8 << 30, 30));
    }
    let mut rows = Vec::new();
    for (mode, tracking) in MODES {
        for (label, slot, rounds) in &sizes {
            let names = ["split", "merge"].map(|kind| format!("blackout/{mode}/{label}/{kind}"));
            if names.iter().any(|name| plan.wants(name)) {
                let samples = measure(tracking, *slot, plan.pick(*rounds, 3))?;
                let both = names.into_iter().zip(&samples);
                rows.extend(both.filter_map(|(name, s)| plan.wants(&name).then(|| row(name, s))));
            }
        }
    }
    Ok(rows)
}

fn measure(tracking: Tracking, slot: u64, rounds: usize) -> Result<[Samples; 2]> {
    let vm = TrackedVm::new(tracking, slot, HOT, BATCH)?;
    let tracked = Tracked {
        vcpu: RunningVcpu::spawn(&vm)?,
        vm,
    };
    let mut bare = Bare::new(tracking, slot)?;
    let mut samples = [Samples::default(), Samples::default()];
    // Some turns until both guests have touched what they write to.
    let warm_up = rounds / 5 + 1;
    for turn in 0..rounds + warm_up {
        let turns = [
            (tracked.split()?, bare.split()?),
            (tracked.merge()?, bare.merge()?),
        ];
        if turn < warm_up {
            continue;
        }
        for (into, (report, took)) in samples.iter_mut().zip(turns) {
            if report.calls != 3 {
                return Err(format!("3 calls were expected, {} were made", report.calls).into());
            }
            into.blackouts.push(report.blackout);
            into.bare.push(took);
        }
    }
    Ok(samples)
}

fn row(name: String, samples: &Samples) -> Row {
    let micros = |times: &mut dyn Iterator<Item = Duration>| {
        Spread::of(times.map(|t| t.as_secs_f64() * 1e6).collect()).median
    };
    let part = |of: fn(&Blackout) -> Duration| micros(&mut samples.blackouts.iter().map(of));
    let bare = micros(&mut samples.bare.iter().copied());
    // Each turn against the median of the bare calls: two single times would add their noise.
    let share = samples
        .blackouts
        .iter()
        .map(|b| ((b.total() - b.kick).as_secs_f64() * 1e6 - bare) / bare * 100.0)
        .collect();
    Row::new(
        name,
        Aim::AtMost(AIM_PERCENT),
        Spread::of(share),
        "%",
        format!(
            "added to the bare calls' {bare:.0} us; blackout {:.0} us = kick {:.0} + harvest {:.0} + calls {:.0} + rest {:.0}",
            part(Blackout::total),
            part(|b| b.kick),
            part(|b| b.harvest),
            part(|b| b.calls),
            part(|b| b.rest),
        ),
    )
}
