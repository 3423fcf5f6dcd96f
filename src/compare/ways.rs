//! Four ways to apply a list of changes.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use gleaner_ring::model::{Going, ListKvm};
use gleaner_ring::{MemslotCall, Region};
use serde::Serialize;

use super::guest::Guest;
use crate::Result;

/// In which way changes are applied.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// One call a slot while vCPUs run; the log of a slot is fetched before it is deleted.
    Naive,
    /// One call a slot while all vCPUs are out, after a harvest: what a [`crate::Transaction`] does.
    Stopped,
    /// A list while vCPUs run; the old slots are invalid before they go.
    List,
    /// A list while vCPUs run, in a single swap.
    ListOneSwap,
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Naive, Self::Stopped, Self::List, Self::ListOneSwap];
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Naive => "naive, running",
            Self::Stopped => "one by one, stopped",
            Self::List => "list, invalid first",
            Self::ListOneSwap => "list, one swap",
        })
    }
}

/// Applies changes. For how long vCPUs had to wait that touched what was going.
pub(super) fn apply(way: Way, guest: &mut Guest, calls: &[MemslotCall]) -> Result<Duration> {
    match way {
        Way::Naive => {
            for call in calls {
                if let MemslotCall::Delete(region) = call
                    && region.log
                {
                    guest.fetch(region)?;
                }
                call.apply(&guest.kvm)?;
            }
            Ok(Duration::ZERO)
        }
        Way::Stopped => {
            let going = going(calls);
            going.iter().try_for_each(|region| guest.fetch(region))?;
            guest.stop();
            going.iter().try_for_each(|region| guest.fetch(region))?;
            for call in calls {
                call.apply(&guest.kvm)?;
            }
            guest.go();
            Ok(Duration::ZERO)
        }
        Way::List => list(Going::InvalidFirst, guest, calls),
        Way::ListOneSwap => list(Going::AtOnce, guest, calls),
    }
}

fn list(going: Going, guest: &mut Guest, calls: &[MemslotCall]) -> Result<Duration> {
    let listed = ListKvm::new(&guest.kvm, going).apply(calls)?;
    for log in &listed.fetched {
        guest.hand_out(log)?;
    }
    Ok(listed.window)
}

/// Slots whose log goes; not those that come in the same list, which nobody can have written to.
fn going(calls: &[MemslotCall]) -> Vec<Region> {
    let mut seen = BTreeSet::new();
    let first = calls.iter().filter(|call| seen.insert(call.key()));
    first
        .filter_map(|call| match call {
            MemslotCall::Delete(region) if region.log => Some(region.clone()),
            _ => None,
        })
        .collect()
}
