//! A software KVM: the memory calls of a VM, and vCPUs that are virtual.
//!
//! It behaves as KVM does where that matters for dirty pages, traps included, and does so again in the same way when the
//! same is done to it. Where interleavings, terabytes and faults are tested, and what runs where `/dev/kvm` does not open.
//!
//! | of KVM | here |
//! |---|---|
//! | slot lists | an active and an inactive one; create and flags swap once, delete and move twice, through an invalid slot |
//! | an invalid slot, a hole, a write to a read-only slot | the access misses: the VMM has to carry it out |
//! | re-protection | a state of each page: a write to a page that is not protected is *not* logged |
//! | dirty bitmaps | plain GET clears and protects; with manual protection CLEAR does, of what it is handed; INITIALLY_SET |
//! | page-modification log | one for each vCPU, flushed when it leaves or is full, by the slots of that moment |
//! | rings | soft limit, RESET in batches of 64 pages, batches skipped for entries of no page, RESET that stops early |
//! | SLOT_ZAP_ALL | a delete or move drops the mappings of all slots, and pages merely read afterwards count as dirty |
//! | time | virtual, from what calls cost on a real KVM ([`Clock`]) |
//! | errors | EEXIST, EINVAL, ENOENT, ENXIO for their causes; any other to order ([`Orders`]) |
//!
//! One call is none of KVM's: a list of changes, all of them or none ([`ListKvm`]).
//!
//! Memory is real: virtual vCPUs load and store in the blocks themselves. Bitmaps are in chunks that take no memory while
//! they are all clear or all set.

mod bitmaps;
mod list;
mod memory;
mod reset;
mod rings;
mod schedule;
mod slots;
mod sparse;
mod state;
mod time;
mod vcpu;

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gleaner_bitmap::mutant::{self, Mutant};
use gleaner_bitmap::{PAGE_SIZE, PageRange, SlotKey};

pub use list::{Fetched, Going, ListKvm, Listed};
pub use schedule::{Call, Cut, Failure, Orders, Point, Schedule};
pub use state::{Access, Counts, State};
pub use time::Clock;
pub use vcpu::{ModelExit, ModelVcpu, Program, StepVcpu};

use crate::kvm::check_log;
use crate::{Capabilities, Error, Kvm, Mode, Region, Reset, Result};

/// Words of a dirty log between two moments at which vCPUs may run.
const WORDS_BETWEEN: u64 = 16;

/// What a model is like.
#[derive(Clone, Copy, Debug)]
pub struct ModelConfig {
    /// CPUs have a page-modification log.
    pub pml: bool,
    /// Deletes and moves drop the mappings of all slots.
    pub zap_all: bool,
    /// Slot ids.
    pub slot_limit: u32,
    /// A bug of a kernel, to see that it is found.
    pub bug: Option<Bug>,
}

impl Default for ModelConfig {
    /// As an x86 host with its quirk switched off.
    fn default() -> Self {
        Self {
            pml: false,
            zap_all: false,
            slot_limit: 32_764,
            bug: None,
        }
    }
}

/// Bugs that kernels had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bug {
    /// GET protects pages, and only then takes the bitmap.
    ProtectBeforeTake,
    /// A vCPU leaves without its page-modification log being flushed.
    PmlLeftBehind,
    /// Clearing a bitmap does not protect its pages.
    ClearWithoutProtect,
}

/// A software KVM. Clones share the one virtual machine.
#[derive(Clone)]
pub struct ModelKvm {
    state: Arc<Mutex<State>>,
    /// How many want the state and are not vCPUs. A mutex keeps no order: vCPUs, which always come back at once, would keep
    /// everybody else out, so they let these pass.
    waiting: Arc<AtomicUsize>,
    schedule: Arc<Mutex<Option<Box<dyn Schedule>>>>,
}

impl std::fmt::Debug for ModelKvm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelKvm").finish_non_exhaustive()
    }
}

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

impl ModelKvm {
    /// A virtual machine without slots and vCPUs.
    #[must_use]
    pub fn new(config: ModelConfig) -> Self {
        Self {
            state: Arc::new(Mutex::new(State::new(config))),
            waiting: Arc::default(),
            schedule: Arc::default(),
        }
    }

    /// The virtual machine. Calls wait for as long as this is held.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let state = self.lock();
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        state
    }

    /// The virtual machine for a vCPU's turn.
    fn turn(&self) -> MutexGuard<'_, State> {
        while self.waiting.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
        self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets `schedule` decide what vCPUs do inside of calls.
    pub fn set_schedule(&self, schedule: Option<Box<dyn Schedule>>) {
        *self.schedule.lock().unwrap_or_else(PoisonError::into_inner) = schedule;
    }

    /// One call, from its first moment to its last.
    fn call<T>(
        &self,
        call: Call,
        error: impl FnOnce(io::Error) -> Error,
        work: impl FnOnce(&mut State, &mut dyn FnMut(Point, &mut State)) -> io::Result<T>,
    ) -> Result<T> {
        let mut schedule = self.schedule.lock().unwrap_or_else(PoisonError::into_inner);
        let mut at = |point, state: &mut State| {
            if let Some(schedule) = &mut *schedule {
                schedule.at(point, state);
            }
        };
        let mut state = self.state();
        at(Point::Before(call), &mut state);
        let done = match state.orders.due(call) {
            Some(number) => Err(errno(number)),
            None => work(&mut state, &mut at),
        };
        at(Point::After(call), &mut state);
        done.map_err(error)
    }
}

/// Why KVM would refuse a region, whatever is there already.
fn check(region: &Region, limit: u32) -> io::Result<()> {
    let end = region.gpa.checked_add(region.host.bytes());
    let good = region.gpa.is_multiple_of(PAGE_SIZE)
        && region.host.bytes().is_multiple_of(PAGE_SIZE)
        && region.host.bytes() > 0
        && region.host.addr().is_multiple_of(PAGE_SIZE)
        && end.is_some()
        && u32::from(region.key.id) < limit;
    if good {
        Ok(())
    } else {
        Err(errno(libc::EINVAL))
    }
}

/// A slot is created, moved, or its flags change.
fn set(
    state: &mut State,
    region: &Region,
    at: &mut dyn FnMut(Point, &mut State),
) -> io::Result<()> {
    check(region, state.config().slot_limit)?;
    let log = region.log;
    let Some(slot) = state.slots.get(region.key) else {
        if state.slots.is_taken(region) {
            return Err(errno(libc::EEXIST));
        }
        state.create(region);
        state.spend(time::CREATE.of(region.pages()));
        return Ok(());
    };
    let fixed = slot.pages == region.pages()
        && slot.host.addr() == region.host.addr()
        && slot.readonly == region.readonly;
    if !fixed {
        return Err(errno(libc::EINVAL));
    }
    let (moves, switches) = (slot.gpa != region.gpa, slot.log != log);
    if moves {
        if state.slots.is_taken(region) {
            return Err(errno(libc::EEXIST));
        }
        state.slots.invalidate(&[region.key]);
        at(Point::Invalid(region.key), state);
        state.slots.place(region);
        state.after_removal();
        state.spend(time::MOVE.of(region.pages()));
    } else if switches {
        state.slots.replace();
    }
    if switches {
        state.start_log(region.key, log);
    }
    Ok(())
}

impl Kvm for ModelKvm {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            slot_limit: self.state().config().slot_limit,
            ring_bytes_max: 1 << 20,
            manual_protect: true,
            initially_set: true,
            readonly: true,
            slot_zap_all_quirk: false,
        }
    }

    fn enable(&self, mode: Mode) -> Result<()> {
        let mut state = self.state();
        if matches!(mode, Mode::Ring { .. }) && state.has_vcpus() {
            return Err(Error::EnableCapability {
                capability: "KVM_CAP_DIRTY_LOG_RING_ACQ_REL",
                number: kvm_bindings::KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
                source: errno(libc::EINVAL),
                hint: " (rings are enabled once, before the first vCPU)",
            });
        }
        state.set_mode(mode);
        Ok(())
    }

    fn set_region(&self, what: &'static str, region: &Region) -> Result<()> {
        let slot = region.key;
        let error = |source| Error::SetRegion { what, slot, source };
        let done = self.call(Call::Set, error, |state, at| set(state, region, at));
        if done.is_err() && what == "flags" {
            self.state().counts.unswitched += 1;
        }
        done
    }

    fn delete_region(&self, key: SlotKey) -> Result<()> {
        let error = |source| Error::SetRegion {
            what: "delete",
            slot: key,
            source,
        };
        self.call(Call::Delete, error, |state, at| {
            if state.slots.get(key).is_none() {
                return Err(errno(libc::EINVAL));
            }
            let pages = state.pages_in(key);
            state.slots.invalidate(&[key]);
            at(Point::Invalid(key), state);
            state.slots.remove(key);
            state.after_removal();
            state.spend(time::DELETE.of(pages));
            Ok(())
        })
    }

    fn get_dirty_log(&self, key: SlotKey, words: &mut [u64]) -> Result<()> {
        if !mutant::is_planted(Mutant::BufferUnchecked) {
            check_log(key, self.state().pages_in(key), words)?;
        }
        let error = |source| Error::GetDirtyLog { slot: key, source };
        self.call(Call::Get, error, |state, at| {
            if state.rings() {
                return Err(errno(libc::ENXIO));
            }
            state.get(key, words, at)?;
            state.spend(time::fetch(words));
            Ok(())
        })
    }

    fn clear_dirty_log(&self, key: SlotKey, range: PageRange, words: &[u64]) -> Result<()> {
        if (words.len() as u64) < range.pages.div_ceil(64) {
            return Err(Error::LogBuffer {
                slot: key,
                pages: range.pages,
                words: words.len(),
            });
        }
        let error = |source| Error::ClearDirtyLog {
            slot: key,
            first: range.first,
            pages: range.pages,
            source,
        };
        self.call(Call::Clear, error, |state, at| {
            if state.rings() {
                return Err(errno(libc::ENXIO));
            }
            if !state.may_clear(key, range) {
                return Err(errno(libc::EINVAL));
            }
            state.clear(key, range, words, at)
        })
    }

    fn reset_dirty_rings(&self) -> Result<Reset> {
        let error = |source| Error::ResetRings { source };
        self.call(Call::Reset, error, |state, at| {
            Ok(state.reset_rings(|state| at(Point::Resetting, state)))
        })
    }

    fn set_manual_protect(&self, on: bool, initially_set: bool) -> Result<()> {
        let error = |source| Error::EnableCapability {
            capability: "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
            number: kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            source,
            hint: "",
        };
        self.call(Call::Manual, error, |state, _| {
            state.set_manual(on, initially_set);
            Ok(())
        })
    }
}
