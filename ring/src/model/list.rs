//! A call that KVM does not have: a list of changes, all of them or none, while vCPUs run.
//!
//! It was proposed in 2022 as `KVM_SET_USER_MEMORY_REGION_LIST`. What it says here: each change carries its kind; the
//! dirty bitmaps of slots that go are handed out by the same call, taken when nothing can be marked in them any more; no
//! vCPU ever sees some of the changes without the others.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::Duration;

use gleaner_bitmap::{PAGE_SIZE, SlotKey};

use super::slots::Slot;
use super::sparse::Sparse;
use super::{Access, Call, ModelKvm, Point, State, check, errno, time};
use crate::{Error, HostRange, MemslotCall, Region, Result};

/// How the old slots go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Going {
    /// With the one swap that brings the new ones; their mappings are dropped after it.
    AtOnce,
    /// In two swaps, however many they are: all of them are invalid first, and accesses to them are tried again; their
    /// mappings are dropped, and every vCPU's page-modification log is flushed, while marks still find them.
    InvalidFirst,
}

/// The dirty bitmap of a slot that is gone, or that is logged no longer.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// What the slot was.
    pub region: Region,
    /// Its bitmap.
    pub words: Vec<u64>,
}

/// What a list call hands out.
#[derive(Clone, Debug, Default)]
pub struct Listed {
    /// Bitmaps of slots that are gone; none with rings.
    pub fetched: Vec<Fetched>,
    /// With rings: how many entries each vCPU's ring had got when the slots changed. Those before name the old ones.
    pub ring_entries: Vec<u32>,
    /// Virtual time for which accesses to the slots that went had to wait.
    pub window: Duration,
}

/// A virtual machine whose slots change by lists.
#[derive(Clone, Debug)]
pub struct ListKvm {
    kvm: ModelKvm,
    going: Going,
}

impl ListKvm {
    /// The list call of a virtual machine.
    #[must_use]
    pub fn new(kvm: &ModelKvm, going: Going) -> Self {
        Self {
            kvm: kvm.clone(),
            going,
        }
    }

    /// Makes all changes in their order, and shows vCPUs the last state alone.
    ///
    /// # Errors
    /// [`Error::SetRegion`] for the first change that could not be made after those before it; nothing has changed then.
    pub fn apply(&self, calls: &[MemslotCall]) -> Result<Listed> {
        let Some(first) = calls.first() else {
            return Ok(Listed::default());
        };
        let slot = Cell::new(first.key());
        let error = |source| Error::SetRegion {
            what: "list",
            slot: slot.get(),
            source,
        };
        self.kvm.call(Call::List, error, |state, at| {
            let mut table = Table::of(state);
            for call in calls {
                slot.set(call.key());
                table.make(call, state.config().slot_limit)?;
            }
            Ok(state.list(calls, self.going, at))
        })
    }
}

/// The slots as they would be, to see whether KVM would take a change.
struct Table(BTreeMap<SlotKey, Region>);

impl Table {
    fn of(state: &State) -> Self {
        let slots = state.slots.all().iter();
        Self(slots.map(|(key, slot)| (*key, slot.region(*key))).collect())
    }

    /// Makes one change, or says why not. The kind is as labelled: a slot that is created must not be there.
    fn make(&mut self, call: &MemslotCall, limit: u32) -> io::Result<()> {
        let there = self.0.get(&call.key());
        let fits = match call {
            MemslotCall::Delete(_) => there.is_some(),
            MemslotCall::Create(_) => there.is_none(),
            MemslotCall::Move { to, .. } => there.is_some_and(|r| alike(r, to)),
            MemslotCall::Flags { to, .. } => there.is_some_and(|r| alike(r, to) && r.gpa == to.gpa),
        };
        if !fits {
            return Err(errno(libc::EINVAL));
        }
        let to = match call {
            MemslotCall::Delete(region) => {
                self.0.remove(&region.key);
                return Ok(());
            }
            MemslotCall::Create(to)
            | MemslotCall::Move { to, .. }
            | MemslotCall::Flags { to, .. } => to,
        };
        check(to, limit)?;
        if self.0.values().any(|r| r.key != to.key && overlap(r, to)) {
            return Err(errno(libc::EEXIST));
        }
        self.0.insert(to.key, to.clone());
        Ok(())
    }
}

/// What no call changes in place.
fn alike(a: &Region, b: &Region) -> bool {
    a.host.addr() == b.host.addr() && a.host.bytes() == b.host.bytes() && a.readonly == b.readonly
}

fn overlap(a: &Region, b: &Region) -> bool {
    a.key.address_space == b.key.address_space
        && a.gpa < b.gpa + b.host.bytes()
        && b.gpa < a.gpa + a.host.bytes()
}

/// Of each slot that is there and goes or moves, the change that says so. What the list itself brings is not there yet.
fn leaves(calls: &[MemslotCall]) -> Vec<&MemslotCall> {
    let mut seen = BTreeSet::new();
    let first = calls.iter().filter(|call| match call {
        MemslotCall::Flags { .. } => false,
        MemslotCall::Create(_) | MemslotCall::Delete(_) | MemslotCall::Move { .. } => {
            seen.insert(call.key())
        }
    });
    first
        .filter(|c| !matches!(c, MemslotCall::Create(_)))
        .collect()
}

/// What a list call has under way.
#[derive(Debug, Default)]
pub(super) struct Listing {
    /// Accesses to invalid slots are tried again: they will find memory.
    retry: bool,
    /// Old slots whose mappings are still there, with nothing else of them.
    left_over: Vec<Slot>,
}

impl State {
    /// Makes changes that have been checked.
    fn list(
        &mut self,
        calls: &[MemslotCall],
        going: Going,
        at: &mut dyn FnMut(Point, &mut Self),
    ) -> Listed {
        let leaves = leaves(calls);
        let leaving: Vec<SlotKey> = leaves.iter().map(|call| call.key()).collect();
        // The same work as in calls of their own: what lists might save of it is not known.
        self.spend(calls.iter().map(time::change).sum());
        let mut window = 0;
        if going == Going::InvalidFirst && !leaving.is_empty() {
            self.listing.retry = true;
            self.slots.invalidate(&leaving);
            for key in &leaving {
                at(Point::Invalid(*key), self);
            }
            self.flush_all_pml();
            // New slots are made ready before; what is between the swaps is taking the old ones down.
            window = leaves.iter().map(|call| time::change(call)).sum();
        } else {
            for key in &leaving {
                if let Some(slot) = self.slots.get_mut(*key) {
                    self.listing.left_over.push(slot.take_mappings());
                }
            }
        }
        let ended = self.exchange(calls);
        let ring_entries = self.ring_entries_written();
        self.listing.retry = false;
        at(Point::Swapped, self);
        for mut slot in std::mem::take(&mut self.listing.left_over) {
            self.slots.zapped += slot.zap();
        }
        // Who loses mappings leaves, and its buffer goes by the slots of this moment.
        self.flush_all_pml();
        if !leaving.is_empty() {
            self.after_removal();
        }
        let words = |log: Sparse| (0..log.words()).map(|index| log.word(index)).collect();
        let ended = ended.into_iter().map(|(region, log)| Fetched {
            region,
            words: words(log),
        });
        let fetched: Vec<Fetched> = ended.collect();
        self.spend(fetched.iter().map(|log| time::fetch(&log.words)).sum());
        Listed {
            fetched,
            ring_entries,
            window: Duration::from_nanos(window),
        }
    }

    /// The one moment at which everything changes. The logs that end with it.
    fn exchange(&mut self, calls: &[MemslotCall]) -> Vec<(Region, Sparse)> {
        let (rings, all_set) = self.new_logs();
        let mut ended = Vec::new();
        self.slots.rewrite(|slots| {
            let mut new = BTreeSet::new();
            for call in calls {
                let key = call.key();
                let log = match call {
                    MemslotCall::Create(region) => {
                        new.insert(key);
                        let mut slot = Slot::new(region);
                        slot.start_log(region.log, rings, all_set);
                        slots.insert(key, slot);
                        continue;
                    }
                    MemslotCall::Delete(_) => false,
                    MemslotCall::Move { to, .. } | MemslotCall::Flags { to, .. } => to.log,
                };
                let Some(slot) = slots.get_mut(&key) else {
                    continue;
                };
                // A slot that the list itself brought was never seen by a vCPU.
                if let Some(dirty) = slot.dirty.take_if(|_| !log && !new.contains(&key)) {
                    ended.push((slot.region(key), dirty));
                }
                match call {
                    MemslotCall::Move { to, .. } | MemslotCall::Flags { to, .. } => {
                        slot.gpa = to.gpa;
                        if slot.log != log {
                            slot.start_log(log, rings, all_set);
                        }
                    }
                    MemslotCall::Create(_) | MemslotCall::Delete(_) => {
                        slots.remove(&key);
                    }
                }
            }
        });
        ended
    }

    /// What an access at `gpa` is that finds no slot it may use.
    pub(super) fn nothing_at(&self, gpa: u64) -> Access {
        let invalid = self.slots.find(gpa).is_none() && self.slots.find_log(gpa).is_some();
        if self.listing.retry && invalid {
            Access::Stalled
        } else {
            Access::Missed
        }
    }

    /// An old slot through whose mapping an access still goes, and the page of it.
    fn left_over(&self, gpa: u64, write: bool) -> Option<(usize, u64)> {
        let pml = self.config().pml;
        let mut slots = self.listing.left_over.iter().enumerate();
        slots.find_map(|(index, slot)| {
            let page = gpa.checked_sub(slot.gpa)? / PAGE_SIZE;
            let goes = page < slot.pages
                && slot.mapped.get(page)
                && (!write || (!slot.readonly && (pml || slot.writable.get(page))));
            goes.then_some((index, page))
        })
    }

    /// Where in this process a store at `gpa` would go now, if it finds memory.
    #[must_use]
    pub fn host_at(&self, gpa: u64) -> Option<u64> {
        let (slot, page) = match self.left_over(gpa, true) {
            Some((index, page)) => (&self.listing.left_over[index], page),
            None => {
                let (key, page) = self.slots.find(gpa)?;
                (self.slots.get(key)?, page)
            }
        };
        Some(slot.host.addr() + page * PAGE_SIZE + gpa % PAGE_SIZE)
    }

    /// An access through a mapping that is still there: the memory, and where in it. KVM hears nothing of it, but for the
    /// page-modification log.
    pub(super) fn through_left_over(
        &mut self,
        vcpu: usize,
        gpa: u64,
        write: bool,
    ) -> Option<(HostRange, u64)> {
        let (index, page) = self.left_over(gpa, write)?;
        let slot = &mut self.listing.left_over[index];
        let found = (slot.host.clone(), page * PAGE_SIZE + gpa % PAGE_SIZE);
        if write && !slot.writable.get(page) {
            slot.writable.set(page);
            if slot.log {
                self.log_by_cpu(vcpu, gpa / PAGE_SIZE * PAGE_SIZE);
            }
        }
        Some(found)
    }
}
