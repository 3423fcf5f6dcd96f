//! One simulated host: a guest on the model of KVM, with its tracker, all in one thread.

use gleaner::gate::Seat;
use gleaner::model::{ModelConfig, ModelKvm, StepVcpu};
use gleaner::{
    Block, BlockId, Consumer, Error, HarvestReport, PAGE_SIZE, Result, Start, Tracker, Tracking,
    WriteLog,
};
use std::sync::Arc;
use vm_memory::mmap::MmapRegionBuilder;

use crate::actors::{Actors, Stage, Vcpu};
use crate::random::Random;

/// What a world is like.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// How dirty pages are tracked.
    pub tracking: Tracking,
    /// The host.
    pub host: ModelConfig,
    /// vCPUs.
    pub vcpus: usize,
    /// Pages of a block at most.
    pub pages: u64,
}

impl Shape {
    /// Any shape.
    #[must_use]
    pub fn any(random: &mut Random) -> Self {
        let tracking = match random.below(4) {
            0 => Tracking::Bitmap,
            1 => Tracking::BitmapClear,
            // The smallest ring: it is full now and then.
            2 => Tracking::Ring { bytes: 4096 },
            _ => Tracking::Ring { bytes: 1 << 14 },
        };
        // A page-modification log takes 512 entries of each ring.
        let small = matches!(tracking, Tracking::Ring { bytes: 4096 });
        Self {
            tracking,
            host: ModelConfig {
                pml: !small && random.one_in(3),
                ..ModelConfig::default()
            },
            vcpus: 1 + usize::from(random.one_in(2)),
            pages: 8 + random.below(120),
        }
    }
}

/// A guest, its memory and who follows it.
pub struct World {
    /// The host's KVM.
    pub kvm: ModelKvm,
    /// Its tracker.
    pub tracker: Tracker,
    /// Who writes, and what is true.
    pub actors: Actors,
    /// Chance of what happens between calls.
    pub random: Random,
    pub(crate) shape: Shape,
    pub(crate) blocks: Vec<Block>,
    pub(crate) named: u64,
    vcpus: Vec<(Seat, StepVcpu)>,
    consumers: u64,
    all_dirty: Vec<u64>,
    meter: Option<(u64, Consumer)>,
    /// Slot transactions that were made.
    pub transactions: u64,
    /// Calls that failed, and resets that were cut short.
    pub troubles: u64,
    /// Nothing goes wrong any more.
    pub quiet: bool,
}

/// Anonymous memory as a block.
pub(crate) fn block(name: &str, pages: u64) -> Result<Block> {
    let log = WriteLog::new(BlockId::fresh(), pages);
    let bytes = usize::try_from(pages * PAGE_SIZE).unwrap_or(usize::MAX);
    let region = MmapRegionBuilder::new_with_bitmap(bytes, log)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE | libc::MAP_NORESERVE)
        .build()
        .map_err(|error| Error::Memory {
            block: name.into(),
            source: std::io::Error::other(error),
        })?;
    Block::from_region(name, Arc::new(region))
}

impl World {
    /// A guest that has not run yet.
    ///
    /// # Errors
    /// When the host has no memory for it.
    pub fn new(shape: Shape, mut random: Random) -> Result<Self> {
        let kvm = ModelKvm::new(shape.host);
        let tracker = Tracker::on(Arc::new(kvm.clone()))
            .tracking(shape.tracking)
            .without_reaper()
            .build()?;
        let actors = Actors::new(Stage::new(Random::new(random.next(), 0)));
        let mut vcpus = Vec::new();
        for id in 0..shape.vcpus {
            let vcpu = kvm.step_vcpu().map_err(|source| Error::RunPage {
                vcpu: id as u64,
                source,
            })?;
            vcpus.push((tracker.register(&vcpu, id as u64)?, vcpu));
            actors.stage().vcpus.push(Vcpu::default());
        }
        kvm.set_schedule(Some(Box::new(actors.clone())));
        let mut world = Self {
            kvm,
            tracker,
            actors,
            random,
            shape,
            blocks: Vec::new(),
            named: 0,
            vcpus,
            consumers: 0,
            all_dirty: Vec::new(),
            meter: None,
            transactions: 0,
            troubles: 0,
            quiet: false,
        };
        for _ in 0..3 {
            world.transact()?;
        }
        Ok(world)
    }

    /// The RAM blocks that there are.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// A consumer's number, before there is the consumer: what is written from here on it may be given.
    pub fn joins(&mut self, start: Start) -> u64 {
        self.consumers += 1;
        let all_dirty = start == Start::AllDirty;
        if all_dirty {
            self.all_dirty.push(self.consumers);
        }
        self.actors.stage().oracle.join(self.consumers, all_dirty);
        self.consumers
    }

    /// It is there. What was written while it came need not be known to one that starts empty.
    pub fn joined(&self, consumer: u64) {
        if !self.all_dirty.contains(&consumer) {
            self.actors.stage().oracle.forgive(consumer);
        }
    }

    /// A consumer is gone.
    pub fn parts(&mut self, consumer: u64) {
        self.all_dirty.retain(|c| *c != consumer);
        self.actors.stage().oracle.part(consumer);
    }

    pub(crate) fn starts_dirty(&self, consumer: u64) -> bool {
        self.all_dirty.contains(&consumer)
    }

    /// Some time passes: vCPUs run, the VMM writes.
    pub fn run(&mut self, accesses: u64) {
        for (seat, vcpu) in &self.vcpus {
            let left = std::mem::take(&mut self.actors.stage().vcpus[vcpu.index()].left);
            if left {
                seat.step_out();
            }
            let inside = self.kvm.state().is_inside(vcpu.index());
            if !inside && seat.step_in() && !self.kvm.state().enter(vcpu.index()) {
                // Its ring is full.
                seat.step_out();
            }
        }
        self.actors.stage().act(&mut self.kvm.state(), accesses);
        if self.random.one_in(3)
            && let Some(_writing) = self.tracker.writers().try_enter()
        {
            let mut stage = self.actors.stage();
            if let Some(page) = stage.any_page() {
                stage.vmm_writes(page);
            }
        }
    }

    /// Whether a vCPU waits for its ring to be emptied.
    fn ring_waits(&self) -> bool {
        let state = self.kvm.state();
        self.vcpus.iter().any(|(_, v)| state.ring_full(v.index()))
    }

    /// What the reaper does: empties the rings when one is full. An error is one that was ordered.
    pub fn reap(&mut self) {
        if self.ring_waits() && self.harvest().is_ok() {
            // Healed or not, entries that KVM could not reset take room until the next one.
            let _ = self.harvest();
        }
    }

    /// Some time passes, with everything that may happen in it.
    ///
    /// # Errors
    /// What no order explains.
    pub fn live(&mut self) -> Result<()> {
        let accesses = self.random.below(24);
        self.run(accesses);
        self.reap();
        if self.random.one_in(4) {
            self.transact()?;
        }
        if self.random.one_in(6) {
            self.measure()?;
        }
        Ok(())
    }

    /// A rate meter comes, takes what it is owed, or goes.
    fn measure(&mut self) -> Result<()> {
        match self.meter.take() {
            None => match self.consumer(Start::Empty) {
                Ok(meter) => self.meter = Some(meter),
                Err(error) => self.explain(error)?,
            },
            Some((number, consumer)) if self.random.one_in(3) => {
                drop(consumer);
                self.parts(number);
            }
            Some((number, consumer)) => {
                self.take(number, &consumer);
                self.meter = Some((number, consumer));
            }
        }
        Ok(())
    }

    /// A consumer takes some pages, and acknowledges them or not.
    pub fn take(&mut self, number: u64, consumer: &Consumer) {
        let most = 1 + self.random.below(200);
        let Some(lease) = consumer.lease(most).ok().flatten() else {
            return;
        };
        let extents: Vec<_> = lease.parts().iter().map(|(e, _)| *e).collect();
        let mut stage = self.actors.stage();
        stage.oracle.took(number, extents.iter().copied());
        if self.random.one_in(4) {
            stage.oracle.dropped(number, extents);
            drop(lease);
        } else {
            lease.ack();
        }
    }

    /// Something that harvests everything.
    ///
    /// # Errors
    /// As `harvest`.
    pub fn harvesting<T>(&self, harvest: impl FnOnce() -> Result<T>) -> Result<T> {
        self.actors.harvesting(&self.kvm, harvest)
    }

    /// A harvest of everything.
    ///
    /// # Errors
    /// As the tracker's.
    pub fn harvest(&self) -> Result<HarvestReport> {
        self.harvesting(|| self.tracker.harvest())
    }

    /// A consumer of the tracker's, and its number.
    ///
    /// # Errors
    /// As the tracker's.
    pub fn consumer(&mut self, start: Start) -> Result<(u64, Consumer)> {
        let number = self.joins(start);
        let consumer = self.harvesting(|| self.tracker.consumer(start));
        match &consumer {
            Ok(_) => self.joined(number),
            Err(_) => self.parts(number),
        }
        Ok((number, consumer?))
    }

    /// With the guest stopped and harvested: everything that the meter is owed it is given now. Pages that it is not.
    #[must_use]
    pub fn settle(&mut self) -> u64 {
        let Some((number, consumer)) = self.meter.take() else {
            return 0;
        };
        while let Ok(Some(lease)) = consumer.lease(u64::MAX) {
            let extents: Vec<_> = lease.parts().iter().map(|(e, _)| *e).collect();
            self.actors.stage().oracle.took(number, extents);
            lease.ack();
        }
        let lost = self.actors.stage().oracle.owed(number).len() as u64;
        self.meter = Some((number, consumer));
        lost
    }

    /// An error that was ordered is no news; any other is.
    pub(crate) fn explain(&mut self, error: Error) -> Result<()> {
        let ordered = std::mem::take(&mut self.kvm.state().orders.failed);
        self.troubles += ordered;
        if ordered > 0 { Ok(()) } else { Err(error) }
    }

    /// Takes the fault of the next call back if it did not come about.
    pub(crate) fn calm(&self) {
        let mut state = self.kvm.state();
        state.orders = gleaner::model::Orders::default();
        // Rings that can't be healed because their log can't be switched: everything is dirty from then on.
        if state.counts().unswitched > 0 {
            drop(state);
            self.actors.stage().oracle.excused = true;
        }
    }

    /// Pages that nobody was owed, given to somebody all the same.
    #[must_use]
    pub fn needless(&self) -> u64 {
        self.actors.stage().oracle.needless
    }
}
