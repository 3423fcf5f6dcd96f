//! Switching the dirty log on for the first consumer and off after the last.

use gleaner_ring::{MemslotCall, Mode, Region};

use super::{Shared, State, transaction::apply};
use crate::{Error, Result};

impl Shared {
    /// The slots as KVM knows them that carry the log flag now.
    pub(super) fn logged_regions(&self, state: &State) -> Vec<Region> {
        let slots = state.layout.slots().filter(|s| !s.readonly);
        slots
            .filter_map(|s| super::transaction::region(state, s, state.logging))
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
        let switched = self.switch(state, true);
        if initially_set {
            self.kvm.set_manual_protect(true, false)?;
        }
        switched?;
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
        if let Err(error) = self.switch(state, false) {
            // Logging that goes on costs time, not pages; the next start finds the flags set, which KVM takes as no change.
            tracing::warn!(%error, "the dirty log could not be switched off");
        }
        state.logging = false;
    }

    fn switch(&self, state: &mut State, on: bool) -> Result<()> {
        let calls: Vec<MemslotCall> = state
            .layout
            .slots()
            .filter(|s| !s.readonly)
            .filter_map(|s| {
                let to = super::transaction::region(state, s, on)?;
                let from = Region {
                    log: !on,
                    ..to.clone()
                };
                Some(MemslotCall::Flags { from, to })
            })
            .collect();
        apply(&*self.kvm, &calls).inspect_err(|error| {
            if let Error::RollbackFailed { .. } = error {
                state.broken = true;
            }
        })
    }
}
