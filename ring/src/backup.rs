//! arm64's backup bitmap: what is dirtied while no vCPU runs (the interrupt controller's tables, as they are saved) has no
//! ring to go to, and goes to a bitmap beside the rings.

use gleaner_bitmap::{Collected, Layout};

use crate::{Error, Kvm, Result};

/// Takes the backup bitmaps of all slots. Fetching clears them, and is all the arming that such writes need: no page is
/// protected for them. A slot that is not logged has none.
pub fn collect(kvm: &dyn Kvm, layout: &Layout, into: &mut Collected) -> gleaner_bitmap::Result<()> {
    let mut words = Vec::new();
    for slot in layout.slots().filter(|s| !s.readonly) {
        words.clear();
        words.resize(
            usize::try_from(slot.range.pages.div_ceil(64)).unwrap_or(usize::MAX),
            0,
        );
        if fetch(kvm, slot.key, &mut words)? {
            into.or_slot(slot, &words)?;
        }
    }
    Ok(())
}

/// Whether the slot has a log, which is in `words` then.
fn fetch(kvm: &dyn Kvm, key: gleaner_bitmap::SlotKey, words: &mut [u64]) -> Result<bool> {
    match kvm.get_dirty_log(key, words) {
        Ok(()) => Ok(true),
        Err(Error::GetDirtyLog { source, .. }) if source.raw_os_error() == Some(libc::ENOENT) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}
