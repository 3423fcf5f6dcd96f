//! Both ends of a simulated migration: the tracker as its source, and memory as its destination.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use gleaner::gate::StoppedVcpus;
use gleaner::migrate::{
    Destination, Error, Harvested, LeaseId, MappedMemory, Memory, NewMemory, PageLease, Result,
    Source, Throttle, Throttles,
};
use gleaner::model::{Call, Failure, ModelKvm};
use gleaner::{BlockId, BlockInfo, Extent, Hooks, Layout, LocalSource};

use crate::actors::Actors;

/// Where the guest runs: told by those who let it run.
#[derive(Clone, Debug, Default)]
pub struct Whereabouts(Arc<Flags>);

#[derive(Debug, Default)]
struct Flags {
    stopped_here: AtomicBool,
    runs_there: AtomicBool,
    twice: AtomicBool,
}

impl Whereabouts {
    fn look(&self) {
        let flags = &self.0;
        if flags.runs_there.load(Ordering::SeqCst) && !flags.stopped_here.load(Ordering::SeqCst) {
            flags.twice.store(true, Ordering::SeqCst);
        }
    }

    fn here(&self, runs: bool) {
        self.0.stopped_here.store(!runs, Ordering::SeqCst);
        self.look();
    }

    fn there(&self) {
        self.0.runs_there.store(true, Ordering::SeqCst);
        self.look();
    }

    /// Whether it runs at the source.
    #[must_use]
    pub fn runs_here(&self) -> bool {
        !self.0.stopped_here.load(Ordering::SeqCst)
    }

    /// Whether it was let run at the destination.
    #[must_use]
    pub fn runs_there(&self) -> bool {
        self.0.runs_there.load(Ordering::SeqCst)
    }

    /// Whether it ever ran at both.
    #[must_use]
    pub fn ran_twice(&self) -> bool {
        self.0.twice.load(Ordering::SeqCst)
    }
}

/// What goes wrong at the ends of one attempt.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// The harvest of this number meets a KVM that fails.
    pub harvest: Option<u64>,
    /// The device state can't be saved.
    pub save: bool,
    /// The destination fails at its call of this number.
    pub destination: Option<u64>,
}

/// What the VMM does at a switchover.
pub struct SimHooks {
    /// Who writes.
    pub actors: Actors,
    /// Where the guest runs.
    pub whereabouts: Whereabouts,
    /// It fails to save.
    pub fails: bool,
}

impl Hooks for SimHooks {
    fn pause_devices(&mut self) -> std::result::Result<(), String> {
        self.whereabouts.here(false);
        Ok(())
    }

    /// Saving writes guest memory.
    fn save(&mut self, _: &StoppedVcpus) -> std::result::Result<Vec<u8>, String> {
        let mut stage = self.actors.stage();
        for _ in 0..stage.random.below(3) {
            if let Some(page) = stage.any_page() {
                stage.vmm_writes(page);
            }
        }
        if self.fails {
            return Err("a device can't be saved".into());
        }
        Ok(b"state".to_vec())
    }

    fn resume(&mut self) {
        self.whereabouts.here(true);
    }

    fn migrated_away(&mut self) {}
}

/// A [`LocalSource`] under the oracle's eyes.
pub struct Watched {
    /// The source itself.
    pub inner: LocalSource,
    /// Its consumer's number.
    pub number: u64,
    /// Who writes.
    pub actors: Actors,
    /// The host's KVM.
    pub kvm: ModelKvm,
    /// What goes wrong.
    pub faults: Faults,
    /// Harvests so far.
    pub harvests: u64,
    /// Pages of a lease, at most: a round of several of them is harvested on its way.
    pub most: u64,
    /// Pages of leases that have not ended.
    pub leases: BTreeMap<LeaseId, Vec<Extent>>,
}

const HARVEST: &[Call] = &[Call::Get, Call::Clear, Call::Reset];

impl Source for Watched {
    fn layout(&mut self) -> Result<Layout> {
        self.inner.layout()
    }

    fn harvest(&mut self) -> Result<Harvested> {
        if self.faults.harvest == Some(self.harvests) {
            self.kvm.state().orders.failure = Some(Failure {
                calls: HARVEST,
                after: 0,
                times: 1,
                errno: libc::EIO,
            });
        }
        self.harvests += 1;
        let (kvm, actors, inner) = (&self.kvm, &self.actors, &mut self.inner);
        let harvested = actors.harvesting(kvm, || inner.harvest());
        kvm.state().orders.failure = None;
        harvested
    }

    fn lease(&mut self, max_pages: u64) -> Result<Option<PageLease>> {
        let lease = self.inner.lease(max_pages.min(self.most))?;
        if let Some(lease) = &lease {
            let extents: Vec<Extent> = lease.parts.iter().map(|p| p.extent()).collect();
            let mut stage = self.actors.stage();
            stage.oracle.took(self.number, extents.iter().copied());
            self.leases.insert(lease.id, extents);
        }
        Ok(lease)
    }

    fn ack(&mut self, lease: LeaseId) -> Result<()> {
        self.leases.remove(&lease);
        self.inner.ack(lease)
    }

    fn release(&mut self, lease: LeaseId) -> Result<()> {
        if let Some(extents) = self.leases.remove(&lease) {
            self.actors.stage().oracle.dropped(self.number, extents);
        }
        self.inner.release(lease)
    }

    fn throttles(&mut self) -> Result<Throttles> {
        self.inner.throttles()
    }

    fn throttle(&mut self, throttle: Throttle) -> Result<()> {
        self.inner.throttle(throttle)
    }

    fn stop(&mut self) -> Result<()> {
        self.inner.stop()
    }

    fn state(&mut self) -> Result<Vec<u8>> {
        self.inner.state()
    }

    fn memory(&mut self, block: BlockId) -> Result<Memory> {
        self.inner.memory(block)
    }

    fn relinquish(&mut self) -> Result<()> {
        self.inner.relinquish()
    }

    fn complete(&mut self) -> Result<()> {
        self.inner.complete()
    }

    fn resume(&mut self) -> Result<()> {
        self.inner.resume()
    }

    fn transactions(&mut self) -> Result<u64> {
        self.inner.transactions()
    }
}

/// What arrived.
#[derive(Default)]
pub struct Arrived {
    /// Blocks by the source's ids.
    pub blocks: BTreeMap<BlockId, (BlockInfo, Arc<MappedMemory>)>,
    /// The last layout.
    pub layout: Option<Layout>,
}

/// Compares what arrived with the stopped source: pages that differ.
pub type Compare<'a> = &'a (dyn Fn(&Arrived) -> u64 + Sync);

/// A destination that compares everything before it says that it is ready.
pub struct Place<'a> {
    arrived: Arrived,
    whereabouts: Whereabouts,
    compare: Compare<'a>,
    fails: Option<u64>,
    calls: u64,
    /// Pages that differed when everything should have been there.
    pub differing: u64,
}

impl<'a> Place<'a> {
    /// Empty memory.
    #[must_use]
    pub fn new(whereabouts: Whereabouts, faults: Faults, compare: Compare<'a>) -> Self {
        Self {
            arrived: Arrived::default(),
            whereabouts,
            compare,
            fails: faults.destination,
            calls: 0,
            differing: 0,
        }
    }

    fn call(&mut self) -> Result<&mut Arrived> {
        let now = self.calls;
        self.calls += 1;
        if self.fails == Some(now) {
            return Err(Error::destination("no room"));
        }
        Ok(&mut self.arrived)
    }
}

impl Destination for Place<'_> {
    fn add_block(&mut self, block: &BlockInfo) -> Result<NewMemory> {
        let arrived = self.call()?;
        let memory = Arc::new(MappedMemory::anonymous(block.pages)?);
        arrived
            .blocks
            .insert(block.id, (block.clone(), Arc::clone(&memory)));
        Ok(NewMemory::zero(memory))
    }

    fn remove_block(&mut self, block: &BlockInfo) -> Result<()> {
        self.call()?.blocks.remove(&block.id);
        Ok(())
    }

    fn layout(&mut self, layout: &Layout) -> Result<()> {
        self.call()?.layout = Some(layout.clone());
        Ok(())
    }

    fn ready(&mut self, _: Vec<u8>) -> Result<()> {
        let compare = self.compare;
        let differing = compare(self.call()?);
        self.differing += differing;
        Ok(())
    }

    fn run(&mut self) -> Result<()> {
        self.call()?;
        self.whereabouts.there();
        Ok(())
    }

    fn abort(&mut self) {}
}
