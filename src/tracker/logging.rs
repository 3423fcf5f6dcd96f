//! Switching the dirty log on for the first consumer and off after the last.

use gleaner_bitmap::mutant::{self, Mutant};
use gleaner_ring::{Mode, Region};

use super::{Shared, State};
use crate::{Error, Result};

impl Shared {
    /// The slots that can be logged, as KVM is told of them.
    pub(super) fn regions(&self, state: &State, log: bool) -> Vec<Region> {
        let slots = state.layout.slots().filter(|s| !s.readonly);
        slots
            .filter_map(|s| super::transaction::region(state, s, log))
            .collect()
    }

    /// Log on everywhere, then whatever was known before is forgotten: nobody is owed it.
    ///
    /// With manual protection logs start with all bits set, which spares the slot change a walk over all memory. That is
    /// for this start only: it is switched off again at once, so that slots which a transaction creates later start with
    /// zero bits and log the next write, and no page is sent again because of a split.
    pub(super) fn start_logging(&self, state: &mut State) -> Result<()> {
        let initially_set = self.mode == Mode::BitmapClear && self.capabilities.initially_set;
        if initially_set {
            self.kvm.set_manual_protect(true, true)?;
        }
        let switched = self.switch_on(state);
        let restored = if initially_set && !mutant::is_planted(Mutant::InitialBitsTaken) {
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

    /// Log off everywhere. Bits that are left are owed to nobody.
    pub(super) fn stop_logging(&self, state: &mut State) {
        for region in self.regions(state, false) {
            if let Err(error) = self.kvm.set_region("flags", &region) {
                // A log that goes on costs time, not pages: the next start discards what it has.
                tracing::warn!(%error, "the dirty log could not be switched off");
            }
        }
        state.logging = false;
    }

    pub(super) fn switch_on(&self, state: &State) -> gleaner_ring::Result<()> {
        let mut regions = self.regions(state, true).into_iter();
        regions.try_for_each(|region| self.kvm.set_region("flags", &region))
    }
}
