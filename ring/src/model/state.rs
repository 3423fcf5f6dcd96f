//! The model itself: what memory calls and accesses of vCPUs do to slots, pages, logs and rings.

use std::sync::Arc;

use gleaner_bitmap::{PAGE_SIZE, PageRange, SlotKey};

use super::list::Listing;
use super::memory;
use super::rings::Ring;
use super::schedule::Orders;
use super::slots::{Slot, Slots};
use super::time::Clock;
use super::{Bug, ModelConfig};
use crate::dirty_ring::Entries;
use crate::{Mode, Region};

/// Entries of a page-modification log.
const PML_ENTRIES: u32 = 512;
/// Bits of a ring's last entries that stay free, so that what a vCPU dirties on its way out has room.
const RING_RESERVE: u32 = 64;

/// What an access of a vCPU came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// It was done; a load's value.
    Done(u64),
    /// No slot is there, or a read-only one is written: the VMM has to carry it out.
    Missed,
    /// The page is mapped now, but the dirty ring is full: the vCPU has to leave, and to try again.
    RingFull,
    /// It needs KVM's memory lock, which is held, or a slot that a list call is about to change: it is tried again.
    Stalled,
}

/// A virtual vCPU, as the model knows it.
#[derive(Debug, Default)]
pub(super) struct Vcpu {
    inside: bool,
    /// Guest-physical addresses of pages whose dirtying is known to this buffer alone.
    pml: Vec<u64>,
    pub(super) ring: Option<Ring>,
}

/// What can be counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Swaps of the slot lists.
    pub swaps: u64,
    /// Mappings that deletes and moves dropped: each costs a fault at the next access.
    pub zapped: u64,
    /// Entries of rings that KVM skipped at a RESET, because their slot was gone or too short.
    pub skipped: u64,
    /// Dirtied pages that no log has: a full ring, a slot that went before its page-modification log was flushed.
    pub unlogged: u64,
    /// Entries that a RESET counted and did not arm.
    pub unarmed: u64,
    /// Logs that could not be switched on or off.
    pub unswitched: u64,
    /// Words of a dirty log that were written past the end of a buffer.
    pub overrun: u64,
}

/// Slots, pages, vCPUs and logs of one virtual machine.
#[derive(Debug)]
pub struct State {
    config: ModelConfig,
    mode: Option<Mode>,
    /// Manual protection, and whether new logs start with all bits set.
    manual: bool,
    initially_set: bool,
    pub(super) slots: Slots,
    pub(super) vcpus: Vec<Vcpu>,
    /// KVM's memory lock is held by a call: no fault can be served.
    locked: bool,
    /// What a list call has under way.
    pub(super) listing: Listing,
    pub(super) clock: Clock,
    pub(super) counts: Counts,
    /// What goes wrong.
    pub orders: Orders,
}

impl State {
    pub(super) fn new(config: ModelConfig) -> Self {
        Self {
            config,
            mode: None,
            manual: false,
            initially_set: false,
            slots: Slots::default(),
            vcpus: Vec::new(),
            locked: false,
            listing: Listing::default(),
            clock: Clock::default(),
            counts: Counts::default(),
            orders: Orders::default(),
        }
    }

    pub(super) const fn config(&self) -> &ModelConfig {
        &self.config
    }

    pub(super) fn has_bug(&self, bug: Bug) -> bool {
        self.config.bug == Some(bug)
    }

    /// What was counted so far.
    #[must_use]
    pub const fn counts(&self) -> Counts {
        Counts {
            swaps: self.slots.swaps,
            zapped: self.slots.zapped,
            ..self.counts
        }
    }

    pub(super) const fn count_overrun(&mut self) {
        self.counts.overrun += 1;
    }

    // ---- vCPUs

    /// Rings can't be enabled any more once there is one.
    pub(super) const fn has_vcpus(&self) -> bool {
        !self.vcpus.is_empty()
    }

    pub(super) fn add_vcpu(&mut self) -> std::io::Result<usize> {
        let ring = match self.mode {
            Some(Mode::Ring { bytes }) => {
                let pml = if self.config.pml { PML_ENTRIES } else { 0 };
                Some(Ring::new(bytes, RING_RESERVE + pml)?)
            }
            _ => None,
        };
        self.vcpus.push(Vcpu {
            ring,
            ..Vcpu::default()
        });
        Ok(self.vcpus.len() - 1)
    }

    pub(super) fn ring_entries(&self, vcpu: usize) -> Option<Arc<Entries>> {
        Some(self.vcpus[vcpu].ring.as_ref()?.entries())
    }

    pub(super) fn ring_entries_written(&self) -> Vec<u32> {
        let rings = self.vcpus.iter().filter_map(|v| v.ring.as_ref());
        rings.map(Ring::written).collect()
    }

    pub(super) fn anyone_inside(&self) -> bool {
        self.vcpus.iter().any(|v| v.inside)
    }

    /// Whether a vCPU is in `KVM_RUN`.
    #[must_use]
    pub fn is_inside(&self, vcpu: usize) -> bool {
        self.vcpus[vcpu].inside
    }

    /// A vCPU enters `KVM_RUN`. `false`: its ring is full, and it came out again at once.
    pub fn enter(&mut self, vcpu: usize) -> bool {
        let full = self.ring_full(vcpu);
        self.vcpus[vcpu].inside = !full;
        !full
    }

    /// A vCPU leaves `KVM_RUN`: its page-modification log is flushed.
    pub fn leave(&mut self, vcpu: usize) {
        if !self.has_bug(Bug::PmlLeftBehind) {
            self.flush_pml(vcpu);
        }
        self.vcpus[vcpu].inside = false;
    }

    /// Whether a vCPU's ring has reached its soft limit.
    #[must_use]
    pub fn ring_full(&self, vcpu: usize) -> bool {
        self.vcpus[vcpu].ring.as_ref().is_some_and(Ring::is_full)
    }

    /// Host addresses of pages whose dirtying is known to page-modification logs alone.
    #[must_use]
    pub fn pending(&self) -> Vec<u64> {
        let all = self.vcpus.iter().flat_map(|v| &v.pml);
        all.filter_map(|gpa| Some(self.peek(*gpa)?.0)).collect()
    }

    /// A vCPU's page-modification log goes to the logs of the slots that have its addresses now, invalid ones included.
    fn flush_pml(&mut self, vcpu: usize) {
        for gpa in std::mem::take(&mut self.vcpus[vcpu].pml) {
            match self.slots.find_log(gpa) {
                Some((key, page)) => self.mark(vcpu, key, page),
                None => self.counts.unlogged += 1,
            }
        }
    }

    pub(super) fn flush_all_pml(&mut self) {
        (0..self.vcpus.len()).for_each(|vcpu| self.flush_pml(vcpu));
    }

    /// The CPU enters an address into its page-modification log; a full one makes it leave.
    pub(super) fn log_by_cpu(&mut self, vcpu: usize, gpa: u64) {
        self.vcpus[vcpu].pml.push(gpa);
        if self.vcpus[vcpu].pml.len() >= PML_ENTRIES as usize {
            self.flush_pml(vcpu);
        }
    }

    /// Enters a dirtied page into the log of its slot.
    fn mark(&mut self, vcpu: usize, key: SlotKey, page: u64) {
        let Some(slot) = self.slots.get_mut(key).filter(|s| s.log) else {
            return;
        };
        if let Some(ring) = &mut self.vcpus[vcpu].ring {
            if !ring.push(key, page) {
                self.counts.unlogged += 1;
            }
        } else if let Some(dirty) = &mut slot.dirty {
            dirty.set(page);
        }
    }

    /// Makes a page accessible, as a page fault does. A fault that is to write enters the page into the log before the write.
    /// So does one that only reads, where the guest's own entry says that the page is dirty: it is mapped for writing.
    fn fault(&mut self, vcpu: usize, key: SlotKey, page: u64, write: bool) -> Access {
        let pml = self.config.pml;
        let Some(slot) = self.slots.get_mut(key) else {
            return Access::Missed;
        };
        let mapped = slot.mapped.get(page);
        if slot.writable.get(page) || (mapped && !write) {
            return Access::Done(0);
        }
        // With a page-modification log the CPU itself sets the dirty bit of a page that is mapped.
        let by_cpu = pml && mapped;
        if self.locked && !by_cpu {
            return Access::Stalled;
        }
        slot.mapped.set(page);
        if slot.readonly {
            return Access::Done(0);
        }
        slot.writable.set(page);
        if by_cpu && slot.log {
            let gpa = slot.gpa + page * PAGE_SIZE;
            self.log_by_cpu(vcpu, gpa);
        } else {
            self.mark(vcpu, key, page);
        }
        if self.ring_full(vcpu) {
            Access::RingFull
        } else {
            Access::Done(0)
        }
    }

    /// A vCPU stores 8 aligned bytes.
    pub fn write(&mut self, vcpu: usize, gpa: u64, value: u64) -> Access {
        self.access(vcpu, gpa, Some(value))
    }

    /// A vCPU loads 8 aligned bytes.
    pub fn read(&mut self, vcpu: usize, gpa: u64) -> Access {
        self.access(vcpu, gpa, None)
    }

    /// A vCPU has the fault of a store, and does not come to store.
    pub fn touch(&mut self, vcpu: usize, gpa: u64) -> Access {
        if self.through_left_over(vcpu, gpa, true).is_some() {
            return Access::Done(0);
        }
        match self.writable_slot(gpa) {
            Some((key, page)) => self.fault(vcpu, key, page, true),
            None => self.nothing_at(gpa),
        }
    }

    /// The host address that an access finds, and whether a store to it would go unnoticed; `None` where there is no memory.
    #[must_use]
    pub fn peek(&self, gpa: u64) -> Option<(u64, bool)> {
        let (key, page) = self.slots.find(gpa)?;
        let slot = self.slots.get(key)?;
        let at = slot.host.addr() + page * PAGE_SIZE + gpa % PAGE_SIZE;
        Some((at, slot.writable.get(page)))
    }

    fn writable_slot(&self, gpa: u64) -> Option<(SlotKey, u64)> {
        let (key, page) = self.slots.find(gpa)?;
        let readonly = self.slots.get(key).is_none_or(|s| s.readonly);
        (!readonly).then_some((key, page))
    }

    fn access(&mut self, vcpu: usize, gpa: u64, store: Option<u64>) -> Access {
        if let Some((host, at)) = self.through_left_over(vcpu, gpa, store.is_some()) {
            return Access::Done(memory::access(&host, at, store));
        }
        let found = if store.is_some() {
            self.writable_slot(gpa)
        } else {
            self.slots.find(gpa)
        };
        let Some((key, page)) = found else {
            return self.nothing_at(gpa);
        };
        match self.fault(vcpu, key, page, store.is_some()) {
            Access::Done(_) => {}
            other => return other,
        }
        let Some(slot) = self.slots.get(key) else {
            return Access::Missed;
        };
        let at = page * PAGE_SIZE + gpa % PAGE_SIZE;
        Access::Done(memory::access(&slot.host, at, store))
    }

    // ---- slots and logs; arguments have been checked

    pub(super) fn lock(&mut self, on: bool) {
        self.locked = on;
    }

    pub(super) fn set_mode(&mut self, mode: Mode) {
        self.mode = Some(mode);
        self.set_manual(mode == Mode::BitmapClear, false);
    }

    pub(super) const fn rings(&self) -> bool {
        matches!(self.mode, Some(Mode::Ring { .. }))
    }

    pub(super) fn set_manual(&mut self, on: bool, initially_set: bool) {
        (self.manual, self.initially_set) = (on, on && initially_set);
    }

    pub(super) const fn is_manual(&self) -> bool {
        self.manual
    }

    /// Whether there are rings, and whether the bits of a new log are all set.
    pub(super) const fn new_logs(&self) -> (bool, bool) {
        (self.rings(), self.initially_set)
    }

    /// The log of a slot begins or ends.
    pub(super) fn start_log(&mut self, key: SlotKey, log: bool) {
        let (rings, all_set) = self.new_logs();
        if let Some(slot) = self.slots.get_mut(key) {
            slot.start_log(log, rings, all_set);
        }
    }

    pub(super) fn create(&mut self, region: &Region) {
        self.slots.insert(region, Slot::new(region));
        self.start_log(region.key, region.log);
    }

    /// After a delete or a move: on default x86 VMs the mappings of all slots go.
    pub(super) fn after_removal(&mut self) {
        if self.config.zap_all {
            self.slots.zap_all();
        }
    }

    /// Word `index` of a slot's dirty bitmap, cleared and its pages protected: those of huge mappings only as long as INITIALLY_SET
    /// is on, else they stay writable (`kvm_arch_mmu_enable_log_dirty_pt_masked` of Linux on x86).
    pub(super) fn take_word(&mut self, key: SlotKey, index: u64, mask: u64) -> u64 {
        let initially_set = self.initially_set;
        let Some(slot) = self.slots.get_mut(key) else {
            return 0;
        };
        let hit = slot.dirty.as_mut().map_or(0, |d| d.clear(index, mask));
        if initially_set {
            slot.huge.clear(index, hit);
        }
        let huge = slot.huge.word(index);
        slot.writable.clear(index, hit & !huge);
        hit
    }

    pub(super) fn pages_in(&self, key: SlotKey) -> u64 {
        self.slots.get(key).map_or(0, |s| s.pages)
    }

    /// Whether `range` may be cleared.
    pub(super) fn may_clear(&self, key: SlotKey, range: PageRange) -> bool {
        let pages = self.pages_in(key);
        range.first.is_multiple_of(64)
            && range.end() <= pages
            && (range.pages.is_multiple_of(64) || range.end() == pages)
    }
}
