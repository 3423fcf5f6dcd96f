//! Switching the dirty log on for the first consumer and off after the last.

use gleaner_bitmap::mutant::{self, Mutant};
use gleaner_bitmap::{Extent, Start};
use gleaner_ring::{Mode, Region};

use super::{KvmLog, Shared, State};
use crate::{Error, Result};

impl Shared {
    /// The slots that can be logged, as KVM is told of them.
    pub(super) fn regions(&self, state: &State, log: bool) -> Vec<Region> {
        let slots = state.layout.slots().filter(|s| !s.readonly);
        slots
            .filter_map(|s| super::transaction::region(state, s, log))
            .collect()
    }

    /// Log on everywhere, for a first consumer that starts so; then whatever was known before is forgotten: nobody is owed it.
    ///
    /// With manual protection, and for a consumer that is owed all memory anyway, logs start with all bits set and nothing
    /// armed: KVM spares itself a walk over all memory, and leases arm what they take. That is for this start only: it is
    /// switched off again at once, so that slots which a transaction creates later start with zero bits and log the next
    /// write, and no page is sent again because of a split.
    pub(super) fn start_logging(&self, state: &mut State, start: Start) -> Result<()> {
        let unarmed = self.mode == Mode::BitmapClear
            && self.capabilities.initially_set
            && start == Start::AllDirty;
        if unarmed {
            self.kvm.set_manual_protect(true, true)?;
            if let KvmLog::Bitmap(source) = &mut state.log {
                source.all_unarmed(&state.layout);
            }
        }
        let switched = self.switch_on(state);
        let restored = if unarmed && !mutant::is_planted(Mutant::InitialBitsTaken) {
            self.kvm.set_manual_protect(true, false)
        } else {
            Ok(())
        };
        if let Err(error) = switched.and(restored) {
            self.stop_logging(state);
            return Err(error.into());
        }
        state.logging = true;
        let discarded = match self.discard_all(state) {
            // Bits may be held back; healing publishes them to nobody.
            Err(Error::Bitmap(gleaner_bitmap::Error::RearmShort { .. })) => {
                self.harvest_all(state).map(|_| ())
            }
            other => other,
        };
        discarded.inspect_err(|_| self.stop_logging(state))
    }

    /// Pages that are on lease from now on: their contents are about to be read.
    pub(super) fn arm(&self, state: &mut State, extents: &[Extent]) -> Result<()> {
        match &mut state.log {
            // After a failed rollback nobody writes, and slots may be missing.
            KvmLog::Bitmap(source) if !state.broken => Ok(source.arm(&state.layout, extents)?),
            _ => Ok(()),
        }
    }

    /// For a consumer that is owed nothing but what comes: writes to all memory have to be logged.
    pub(super) fn arm_all(&self, state: &mut State) -> Result<()> {
        let blocks = state.layout.blocks();
        let all: Vec<_> = blocks.map(|b| Extent::new(b.id, 0, b.pages)).collect();
        self.arm(state, &all)
    }

    /// Log off everywhere. Bits that are left are owed to nobody.
    pub(super) fn stop_logging(&self, state: &mut State) {
        for region in self.regions(state, false) {
            if let Err(error) = self.kvm.set_region("flags", &region) {
                // A log that goes on costs time, not pages: the next start discards what it has.
                tracing::warn!(%error, "the dirty log could not be switched off");
            }
        }
        if let KvmLog::Bitmap(source) = &mut state.log {
            source.none_unarmed();
        }
        state.logging = false;
    }

    pub(super) fn switch_on(&self, state: &State) -> gleaner_ring::Result<()> {
        let mut regions = self.regions(state, true).into_iter();
        regions.try_for_each(|region| self.kvm.set_region("flags", &region))
    }
}
