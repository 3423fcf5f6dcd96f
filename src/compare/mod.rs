//! Two ways to apply the same changes of memory slots, side by side, on the model of KVM.
//!
//! KVM has one call for each slot, and so all vCPUs are kept out while several are made. A call that takes a list of changes
//! was proposed in 2022 and never came. What it would be worth, and what it would have to do, is tried here:
//!
//! * [`Row`]s: whole series of changes, applied in four ways, while two vCPUs write.
//! * [`Trial`]s: single properties of the list call, each with pages written at the worst moment.

mod boot;
mod guest;
mod listener;
mod trials;
mod ways;

use std::time::Duration;

use gleaner_bitmap::{PAGE_SIZE, PageRange};
use gleaner_ring::Mode;
use gleaner_ring::model::ModelConfig;
use serde::Serialize;

use crate::Result;
use guest::Guest;
use listener::{Listener, Series, View};

pub use trials::Trial;
pub use ways::Way;

/// A series of changes, applied in one way.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Row {
    /// Which series.
    pub scenario: &'static str,
    /// Whether each transaction was reduced to the fewest changes between its two layouts.
    pub merged: bool,
    /// In which way.
    pub way: Way,
    /// Transactions: all vCPUs are stopped once for each, or one list is passed.
    pub transactions: u64,
    /// Changes of a slot.
    pub changes: u64,
    /// Swaps of the slot lists.
    pub list_swaps: u64,
    /// Virtual time for which all vCPUs stood still, of all transactions, in microseconds.
    pub blackout_us: u64,
    /// Virtual time for which only vCPUs had to wait that touched a slot on its way out, in microseconds.
    pub wait_us: u64,
    /// Dirty pages of old slots that were fetched, and that new slots map.
    pub carried: u64,
    /// Pages that were written after they were last fetched, and that no log has.
    pub lost: u64,
    /// Accesses to memory that is there before and after, and that found none: the guest would go astray.
    pub missed: u64,
    /// Mappings that were dropped; each costs a fault.
    pub zapped: u64,
}

/// What was found.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Comparison {
    /// Series of changes.
    pub rows: Vec<Row>,
    /// Properties of the list call.
    pub trials: Vec<Trial>,
}

/// Applies everything in every way. The same each time.
///
/// # Errors
/// [`crate::Error::Memory`] when the system has no address space for 16 GiB of untouched memory.
pub fn compare() -> Result<Comparison> {
    let series = [punch()?, boot::boot()?];
    let mut rows = Vec::new();
    for series in &series {
        for merged in [false, true] {
            for way in Way::ALL {
                rows.push(row(series, merged, way)?);
            }
        }
    }
    Ok(Comparison {
        rows,
        trials: trials::all()?,
    })
}

/// A hole of 1 GiB at 1 GiB, punched into 16 GiB of memory; a listener hears of the cut and of the hole.
fn punch() -> Result<Series> {
    const GIB: u64 = (1 << 30) / PAGE_SIZE;
    let mut listener = Listener::new(16 * GIB)?;
    let mut whole = View::default();
    whole.show(0, PageRange::new(0, 16 * GIB), false);
    listener.hear(&whole);
    listener.commit()?;
    let mut cut = View::default();
    cut.show(0, PageRange::new(0, GIB), false);
    let mut punched = cut.clone();
    cut.show_apart(GIB, PageRange::new(GIB, 15 * GIB));
    punched.show(2 * GIB, PageRange::new(2 * GIB, 14 * GIB), false);
    listener.hear(&cut);
    listener.hear(&punched);
    listener.commit()?;
    // A tenth of it is dirty.
    Ok(listener.series("1 GiB hole in 16 GiB", 16 * GIB / 10))
}

fn row(series: &Series, merged: bool, way: Way) -> Result<Row> {
    let mut guest = Guest::new(&series.block, ModelConfig::default(), Mode::Bitmap)?;
    let mut row = Row {
        scenario: series.name,
        merged,
        way,
        transactions: series.commits.len() as u64 - 1,
        changes: 0,
        list_swaps: 0,
        blackout_us: 0,
        wait_us: 0,
        carried: 0,
        lost: 0,
        missed: 0,
        zapped: 0,
    };
    // The first commit is what is there from the beginning.
    let Some((first, later)) = series.commits.split_first() else {
        return Ok(row);
    };
    for call in &first.merged {
        call.apply(&guest.kvm)?;
    }
    guest.go();
    guest.write_at_random(&first.new, series.dirty);
    let (start, clock) = {
        let state = guest.kvm.state();
        (state.counts(), state.clock())
    };
    for commit in later {
        guest.writing(|w| w.spots = commit.lasting());
        let calls = if merged {
            &commit.merged
        } else {
            &commit.unmerged
        };
        row.changes += calls.len() as u64;
        let waited = ways::apply(way, &mut guest, calls)?;
        row.wait_us += microseconds(waited);
        row.carried += guest.take_fetched(&commit.new);
    }
    let end = guest.kvm.state().counts();
    row.list_swaps = end.swaps - start.swaps;
    row.zapped = end.zapped - start.zapped;
    let stopped = guest.kvm.state().clock().stopped() - clock.stopped();
    row.blackout_us = microseconds(stopped);
    row.missed = guest.writing(|w| w.missed);
    let slots = later.last().map_or(&first.new, |last| &last.new).slots();
    let slots: Vec<_> = slots.map(|s| listener::region(&series.block, s)).collect();
    row.lost = guest.lost(&slots)?;
    Ok(row)
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
