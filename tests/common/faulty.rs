//! A KVM whose calls fail to order.

use std::io;
use std::sync::{Arc, Mutex};

use gleaner::{PageRange, SlotKey, TrackerBuilder};
use gleaner_ring::{Capabilities, Error, Kvm, Mode, Region, Reset, Result};

/// The calls of a VM.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Call {
    Set,
    Delete,
    Get,
    Clear,
    Reset,
    Manual,
}

/// Those that change slots.
pub const CHANGES: &[Call] = &[Call::Set, Call::Delete];
/// Those that make a harvest.
pub const HARVEST: &[Call] = &[Call::Get, Call::Clear, Call::Reset];
/// All of them.
pub const ANY: &[Call] = &[
    Call::Set,
    Call::Delete,
    Call::Get,
    Call::Clear,
    Call::Reset,
    Call::Manual,
];

/// Which calls fail: of these kinds, after so many that do not, so many.
#[derive(Clone, Copy, Debug)]
struct Order {
    kinds: &'static [Call],
    after: u64,
    failures: u64,
}

#[derive(Default)]
struct State {
    order: Option<Order>,
    failed: u64,
    short: u64,
    cut: u64,
    withheld: u64,
}

/// Orders failures of a tracker's KVM.
#[derive(Clone, Default)]
pub struct Faults(Arc<Mutex<State>>);

impl Faults {
    /// For [`TrackerBuilder::between`].
    pub fn stand(&self, builder: TrackerBuilder) -> TrackerBuilder {
        let faults = self.clone();
        builder.between(move |kvm| Arc::new(Faulty { kvm, faults }))
    }

    /// The call of these kinds that comes after `after` others fails.
    pub fn fail(&self, kinds: &'static [Call], after: u64) {
        self.order(kinds, after, 1);
    }

    /// That one, and all after it.
    pub fn fail_from(&self, kinds: &'static [Call], after: u64) {
        self.order(kinds, after, u64::MAX);
    }

    fn order(&self, kinds: &'static [Call], after: u64, failures: u64) {
        let mut state = self.0.lock().unwrap();
        state.order = Some(Order {
            kinds,
            after,
            failures,
        });
        state.failed = 0;
    }

    /// No more failures; returns how many there were.
    pub fn heal(&self) -> u64 {
        let mut state = self.0.lock().unwrap();
        state.order = None;
        std::mem::take(&mut state.failed)
    }

    /// The next RESETs that have something to reset say that they did less than they did.
    pub fn cut_resets(&self, count: u64) {
        self.0.lock().unwrap().short = count;
    }

    /// The next RESETs do nothing.
    pub fn withhold_resets(&self, count: u64) {
        self.0.lock().unwrap().withheld = count;
    }

    /// RESETs that are still to do nothing.
    pub fn withheld(&self) -> u64 {
        self.0.lock().unwrap().withheld
    }

    /// RESETs that said so.
    pub fn cut(&self) -> u64 {
        self.0.lock().unwrap().cut
    }

    fn due(&self, call: Call) -> bool {
        let mut state = self.0.lock().unwrap();
        let Some(order) = state.order.as_mut().filter(|o| o.kinds.contains(&call)) else {
            return false;
        };
        if order.after > 0 {
            order.after -= 1;
            return false;
        }
        let due = order.failures > 0;
        order.failures = order.failures.saturating_sub(1);
        state.failed += u64::from(due);
        due
    }
}

struct Faulty {
    kvm: Arc<dyn Kvm>,
    faults: Faults,
}

fn eio() -> io::Error {
    io::Error::from_raw_os_error(libc::EIO)
}

impl Kvm for Faulty {
    fn capabilities(&self) -> Capabilities {
        self.kvm.capabilities()
    }

    fn enable(&self, mode: Mode) -> Result<()> {
        self.kvm.enable(mode)
    }

    fn set_region(&self, what: &'static str, region: &Region) -> Result<()> {
        if self.faults.due(Call::Set) {
            return Err(Error::SetRegion {
                what,
                slot: region.key,
                source: eio(),
            });
        }
        self.kvm.set_region(what, region)
    }

    fn delete_region(&self, key: SlotKey) -> Result<()> {
        if self.faults.due(Call::Delete) {
            return Err(Error::SetRegion {
                what: "delete",
                slot: key,
                source: eio(),
            });
        }
        self.kvm.delete_region(key)
    }

    fn get_dirty_log(&self, key: SlotKey, words: &mut [u64]) -> Result<()> {
        if self.faults.due(Call::Get) {
            return Err(Error::GetDirtyLog {
                slot: key,
                source: eio(),
            });
        }
        self.kvm.get_dirty_log(key, words)
    }

    fn clear_dirty_log(&self, key: SlotKey, range: PageRange, words: &[u64]) -> Result<()> {
        if self.faults.due(Call::Clear) {
            return Err(Error::ClearDirtyLog {
                slot: key,
                first: range.first,
                pages: range.pages,
                source: eio(),
            });
        }
        self.kvm.clear_dirty_log(key, range, words)
    }

    fn reset_dirty_rings(&self) -> Result<Reset> {
        if self.faults.due(Call::Reset) {
            return Err(Error::ResetRings { source: eio() });
        }
        let mut state = self.faults.0.lock().unwrap();
        if state.withheld > 0 {
            state.withheld -= 1;
            return Ok(Reset::default());
        }
        let mut done = self.kvm.reset_dirty_rings()?;
        if done.entries > 0 && state.short > 0 {
            state.short -= 1;
            state.cut += 1;
            done.entries -= 1;
        }
        Ok(done)
    }

    fn set_manual_protect(&self, on: bool, initially_set: bool) -> Result<()> {
        if self.faults.due(Call::Manual) {
            return Err(Error::EnableCapability {
                capability: "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
                number: 168,
                source: eio(),
                hint: "",
            });
        }
        self.kvm.set_manual_protect(on, initially_set)
    }
}
