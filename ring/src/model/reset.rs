//! RESET of the dirty rings.

use gleaner_bitmap::SlotKey;

use super::State;
use super::rings::Ring;
use crate::Reset;

impl State {
    /// Protects a page and its successors whose bits are set in `mask`, as KVM does when it resets gathered ring entries: not at
    /// all if one of them is not there.
    fn protect(&mut self, key: SlotKey, first: u64, mask: u64) {
        let last = first + u64::from(63 - mask.leading_zeros());
        let Some(slot) = self.slots.get_mut(key).filter(|s| last < s.pages) else {
            self.counts.skipped += u64::from(mask.count_ones());
            return;
        };
        for page in (0..64)
            .filter(|bit| mask >> bit & 1 == 1)
            .map(|bit| first + bit)
        {
            slot.writable.clear_page(page);
        }
    }

    /// Resets the entries of all rings that user space has read.
    pub(super) fn reset_rings(&mut self, mut between: impl FnMut(&mut Self)) -> Reset {
        let cut = self.orders.cut;
        let mut reset = Reset::default();
        for vcpu in 0..self.vcpus.len() {
            let mut gathered: Option<(SlotKey, u64, u64)> = None;
            while let Some((key, page)) = self.take_reset(vcpu) {
                reset.entries += 1;
                gathered = match gathered {
                    Some(batch) => match join(batch, key, page) {
                        Some(joined) => Some(joined),
                        None => {
                            self.protect(batch.0, batch.1, batch.2);
                            between(self);
                            Some((key, page, 1))
                        }
                    },
                    None => Some((key, page, 1)),
                };
                if cut.is_some_and(|cut| reset.entries > cut.after) {
                    return self.stop_short(gathered, reset);
                }
            }
            if gathered.is_some() && cut.is_some() && !self.more_to_reset(vcpu) {
                return self.stop_short(gathered, reset);
            }
            if let Some((key, page, mask)) = gathered {
                self.protect(key, page, mask);
            }
        }
        reset
    }

    fn take_reset(&mut self, vcpu: usize) -> Option<(SlotKey, u64)> {
        self.vcpus[vcpu].ring.as_mut()?.take_reset()
    }

    fn more_to_reset(&self, after: usize) -> bool {
        let mut later = self.vcpus[after + 1..].iter();
        later.any(|v| v.ring.as_ref().is_some_and(Ring::has_reset))
    }

    /// What was gathered is counted, and not armed.
    fn stop_short(&mut self, gathered: Option<(SlotKey, u64, u64)>, mut reset: Reset) -> Reset {
        let cut = self.orders.cut.take();
        reset.disturbed = cut.is_some_and(|c| c.noticed);
        let left = gathered.map_or(0, |(_, _, mask)| mask.count_ones());
        self.counts.unarmed += u64::from(left);
        reset
    }
}

/// A ring entry joins those before it where one word of pages covers them all.
fn join(
    (key, first, mask): (SlotKey, u64, u64),
    next: SlotKey,
    page: u64,
) -> Option<(SlotKey, u64, u64)> {
    if next != key {
        return None;
    }
    if page >= first {
        let ahead = page - first;
        return (ahead < 64).then(|| (key, first, mask | 1 << ahead));
    }
    let back = first - page;
    (back < 64 && mask << back >> back == mask).then(|| (key, page, mask << back | 1))
}
