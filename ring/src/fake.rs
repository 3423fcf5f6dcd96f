//! A KVM for tests of what is cleared: it has a log, and hands on what it is told to clear.

use gleaner_bitmap::{PageRange, SlotKey};

use crate::{Capabilities, Kvm, Mode, Region, Reset, Result};

/// See the module.
pub(crate) struct FakeKvm<C> {
    /// What every slot has dirty.
    pub log: Vec<u64>,
    /// What CLEAR does.
    pub clear: C,
}

impl<C: Fn(SlotKey, PageRange, &[u64]) -> Result<()> + Send + Sync> Kvm for FakeKvm<C> {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            slot_limit: 8,
            ring_bytes_max: 0,
            manual_protect: true,
            initially_set: true,
            readonly: true,
            slot_zap_all_quirk: false,
        }
    }

    fn enable(&self, _: Mode) -> Result<()> {
        Ok(())
    }

    fn set_region(&self, _: &'static str, _: &Region) -> Result<()> {
        Ok(())
    }

    fn delete_region(&self, _: SlotKey) -> Result<()> {
        Ok(())
    }

    fn get_dirty_log(&self, _: SlotKey, words: &mut [u64]) -> Result<()> {
        words.copy_from_slice(&self.log);
        Ok(())
    }

    fn clear_dirty_log(&self, key: SlotKey, range: PageRange, words: &[u64]) -> Result<()> {
        (self.clear)(key, range, words)
    }

    fn reset_dirty_rings(&self) -> Result<Reset> {
        Ok(Reset::default())
    }

    fn set_manual_protect(&self, _: bool, _: bool) -> Result<()> {
        Ok(())
    }
}
