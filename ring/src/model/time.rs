//! Virtual time: what memory calls cost a VMM, and a guest that has to stand still for them.
//!
//! The costs are inputs, not results: medians measured on Linux 6.18 with a software KVM and two cores. They follow the size
//! of the slot, on a line between the two nearest sizes that were measured. What is not listed costs nothing here.

use std::time::Duration;

use gleaner_bitmap::PAGE_SIZE;

use super::State;
use crate::MemslotCall;

/// What an operation costs for a slot of 64 MiB, 1 GiB and 8 GiB, in nanoseconds.
pub(super) struct Cost([u64; 3]);

/// A new slot with a log.
pub(super) const CREATE: Cost = Cost([22_000, 234_000, 3_000_000]);
pub(super) const DELETE: Cost = Cost([22_000, 125_000, 1_100_000]);
pub(super) const MOVE: Cost = Cost([37_000, 408_000, 4_100_000]);
/// `KVM_GET_DIRTY_LOG` of a clean slot.
const GET: Cost = Cost([800, 4_000, 130_000]);
/// What each dirty page adds to it.
const GET_PAGE: u64 = 32;
/// From the kick until `KVM_RUN` has returned: 31 to 43 us.
const KICK: u64 = 37_000;

const SIZES: [u64; 3] = [
    (64 << 20) / PAGE_SIZE,
    (1 << 30) / PAGE_SIZE,
    (8 << 30) / PAGE_SIZE,
];

impl Cost {
    /// For a slot of so many pages: on the line through the two measured sizes that are nearest.
    pub(super) fn of(&self, pages: u64) -> u64 {
        let at = usize::from(pages > SIZES[1]);
        let (low, high) = (self.0[at], self.0[at + 1]);
        let rise = |pages: u64| (high - low).saturating_mul(pages) / (SIZES[at + 1] - SIZES[at]);
        match pages.checked_sub(SIZES[at]) {
            Some(more) => low.saturating_add(rise(more)),
            None => low.saturating_sub(rise(SIZES[at] - pages)),
        }
    }
}

/// What a change of a slot costs.
pub(super) fn change(call: &MemslotCall) -> u64 {
    match call {
        MemslotCall::Create(region) => CREATE.of(region.pages()),
        MemslotCall::Delete(region) => DELETE.of(region.pages()),
        MemslotCall::Move { to, .. } => MOVE.of(to.pages()),
        MemslotCall::Flags { .. } => 0,
    }
}

/// What fetching a dirty log costs.
pub(super) fn fetch(words: &[u64]) -> u64 {
    let dirty: u64 = words.iter().map(|w| u64::from(w.count_ones())).sum();
    GET.of(words.len() as u64 * 64) + dirty * GET_PAGE
}

/// How much virtual time has passed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Clock {
    now: u64,
    stopped: u64,
}

impl Clock {
    /// In all.
    #[must_use]
    pub const fn now(&self) -> Duration {
        Duration::from_nanos(self.now)
    }

    /// While no vCPU was in `KVM_RUN`, kicking them out included: the blackout.
    #[must_use]
    pub const fn stopped(&self) -> Duration {
        Duration::from_nanos(self.stopped)
    }
}

impl State {
    /// Virtual time.
    #[must_use]
    pub const fn clock(&self) -> Clock {
        self.clock
    }

    pub(super) fn spend(&mut self, nanoseconds: u64) {
        self.clock.now += nanoseconds;
        if !self.anyone_inside() {
            self.clock.stopped += nanoseconds;
        }
    }

    /// A vCPU is kicked out. They leave side by side: whoever is the last has all waiting for one kick.
    pub(super) fn kick(&mut self, vcpu: usize) {
        let was_inside = self.is_inside(vcpu);
        self.leave(vcpu);
        if was_inside && !self.anyone_inside() {
            self.spend(KICK);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cost_is_what_was_measured_and_lies_on_a_line_between() {
        for cost in [CREATE, DELETE, MOVE, GET] {
            for (pages, measured) in SIZES.into_iter().zip(cost.0) {
                assert_eq!(cost.of(pages), measured);
            }
            assert!(cost.of(1) > 0);
            let middle = (SIZES[1] + SIZES[2]) / 2;
            assert_eq!(cost.of(middle), (cost.0[1] + cost.0[2]) / 2);
            let beyond = 2 * SIZES[2] - SIZES[1];
            assert_eq!(cost.of(beyond), 2 * cost.0[2] - cost.0[1]);
        }
    }
}
