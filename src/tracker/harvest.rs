//! Harvests, under the VM-wide lock, and the healing of a log that could not be re-armed.

use gleaner_bitmap::mutant::{self, Mutant};
use gleaner_bitmap::{Collected, DirtySource, HarvestReport, Layout, Rearm, Scope, WriteLog};
use gleaner_ring::MemslotCall;

use super::{KvmLog, Shared, State};
use crate::gate::Closed;
use crate::{Error, ExternalLog, Result};

/// Which sources a harvest asks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ask {
    /// All of them.
    All,
    /// Those that speak of slots or guest-physical addresses, which a transaction changes: not the VMM's own write logs,
    /// which belong to blocks.
    SlotBound,
    /// KVM's alone.
    Kvm,
}

/// An external log as a dirty source.
struct External<'a>(&'a mut dyn ExternalLog);

impl DirtySource for External<'_> {
    fn name(&self) -> String {
        self.0.name()
    }

    fn collect(
        &mut self,
        layout: &Layout,
        _: Scope<'_>,
        into: &mut Collected,
    ) -> gleaner_bitmap::Result<()> {
        self.0.harvest(layout, into)
    }

    /// Taking a bit from such a log is what arms it.
    fn rearm(&mut self) -> gleaner_bitmap::Result<Rearm> {
        Ok(Rearm::Complete)
    }
}

impl KvmLog {
    fn source(&mut self) -> &mut dyn DirtySource {
        match self {
            Self::Bitmap(source) => source,
            Self::Ring(source) => source,
        }
    }
}

impl Shared {
    /// Everything, healing the log if need be.
    pub(super) fn harvest_all(&self, state: &mut State) -> Result<HarvestReport> {
        match self.run(state, Ask::All, Scope::All) {
            Err(Error::Bitmap(gleaner_bitmap::Error::RearmShort { .. })) => {
                let closed = self.close_to_heal()?;
                self.heal(state, Ask::All, &closed)
            }
            other => other,
        }
    }

    /// The rings alone, healing the log if need be: the reaper's part.
    pub(super) fn reap(&self, state: &mut State) -> Result<()> {
        match self.run(state, Ask::Kvm, Scope::All) {
            Err(Error::Bitmap(gleaner_bitmap::Error::RearmShort { .. })) => {
                let closed = self.close_to_heal()?;
                self.heal(state, Ask::Kvm, &closed)?;
                Ok(())
            }
            other => other.map(|_| ()),
        }
    }

    /// Inside a transaction, with the gate closed: what the transaction could make unreadable.
    pub(super) fn harvest_closed(
        &self,
        state: &mut State,
        scope: Scope<'_>,
        closed: &Closed<'_>,
    ) -> Result<HarvestReport> {
        match self.run(state, Ask::SlotBound, scope) {
            Err(Error::Bitmap(gleaner_bitmap::Error::RearmShort { .. })) => {
                self.heal(state, Ask::SlotBound, closed)
            }
            other => other,
        }
    }

    /// Before a transaction, the guest running: whatever is taken now need not be taken inside.
    pub(super) fn harvest_ahead(
        &self,
        state: &mut State,
        scope: Scope<'_>,
    ) -> Result<HarvestReport> {
        match self.run(state, Ask::Kvm, scope) {
            // The transaction closes the gate at once, and heals there.
            Err(Error::Bitmap(gleaner_bitmap::Error::RearmShort { .. })) => {
                Ok(HarvestReport::default())
            }
            other => other,
        }
    }

    /// Throws away what every source knows: the start of logging.
    pub(super) fn discard_all(&self, state: &mut State) -> Result<()> {
        let layout = state.layout.clone();
        let (mut logs, external) = (write_logs(state), &mut state.external);
        let mut external: Vec<_> = external.iter_mut().map(|l| External(l.as_mut())).collect();
        let sources = sources(&mut state.log, &mut logs, &mut external);
        Ok(state.harvester.discard(sources, &layout)?)
    }

    fn run(&self, state: &mut State, ask: Ask, scope: Scope<'_>) -> Result<HarvestReport> {
        let layout = state.layout.clone();
        let mut logs = if ask == Ask::All {
            write_logs(state)
        } else {
            Vec::new()
        };
        let mut external: Vec<_> = match ask {
            Ask::Kvm => Vec::new(),
            Ask::All | Ask::SlotBound => state
                .external
                .iter_mut()
                .map(|l| External(l.as_mut()))
                .collect(),
        };
        // Without logging there is no bitmap to fetch, nor after a failed rollback, which has fetched what there was; rings
        // may still hold entries, which have to be drained.
        let kvm = (state.logging && !state.broken) || matches!(state.log, KvmLog::Ring(_));
        let all = sources(&mut state.log, &mut logs, &mut external).skip(usize::from(!kvm));
        Ok(state.harvester.harvest(all, &layout, scope, &self.store)?)
    }

    fn close_to_heal(&self) -> Result<Closed<'_>> {
        if mutant::is_planted(Mutant::HealedWhileRunning) {
            return Ok(self.gate.pretend_closed());
        }
        self.gate.close()
    }

    /// Arms every page again after a RESET that stopped early, or after ring entries were lost: with every vCPU out, drain,
    /// switch the log off and on for each slot, drain. Only then are the pages published that were held back.
    ///
    /// Switching with a vCPU running loses pages: a write between the two is in no log.
    fn heal(&self, state: &mut State, ask: Ask, closed: &Closed<'_>) -> Result<HarvestReport> {
        match self.run(state, Ask::Kvm, Scope::All) {
            Ok(_) | Err(Error::Bitmap(gleaner_bitmap::Error::RearmShort { .. })) => {}
            Err(error) => return Err(error),
        }
        let KvmLog::Ring(_) = state.log else {
            return Ok(HarvestReport::default());
        };
        tracing::warn!("dirty rings could not be re-armed in full; switching the log off and on");
        // Once the gate is closed for good nothing is written that would have to be seen, and a slot may be missing, which
        // setting its flags would create.
        let regions = if closed.is_kept() {
            Vec::new()
        } else {
            self.regions(state, state.logging)
        };
        for region in regions {
            let mut off = region.clone();
            off.log = false;
            let toggle = MemslotCall::Flags {
                from: region,
                to: off,
            };
            let toggled = toggle
                .apply(&*self.kvm)
                .and_then(|()| toggle.inverse().apply(&*self.kvm));
            if let Err(error) = toggled {
                // The slot may be without a log: from here on only "everything is dirty" is true.
                if let KvmLog::Ring(ring) = &mut state.log {
                    ring.lose();
                }
                return Err(error.into());
            }
        }
        if let KvmLog::Ring(ring) = &mut state.log {
            ring.healed();
        }
        self.run(state, ask, Scope::All)
    }
}

fn write_logs(state: &State) -> Vec<WriteLog> {
    state
        .blocks
        .values()
        .map(|b| b.write_log().clone())
        .collect()
}

/// KVM's log first, so that it can be skipped.
fn sources<'a>(
    kvm: &'a mut KvmLog,
    logs: &'a mut [WriteLog],
    external: &'a mut [External<'_>],
) -> impl Iterator<Item = &'a mut dyn DirtySource> {
    std::iter::once(kvm.source())
        .chain(logs.iter_mut().map(|l| l as &mut dyn DirtySource))
        .chain(external.iter_mut().map(|l| l as &mut dyn DirtySource))
}
