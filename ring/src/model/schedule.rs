//! Who runs when, and what goes wrong: the simulation's part in each call.

use gleaner_bitmap::SlotKey;

use super::State;

/// The kinds of calls.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Call {
    /// A slot is created, moved, or its flags change.
    Set,
    /// A slot is deleted.
    Delete,
    /// A list of changes, all at once.
    List,
    /// `KVM_GET_DIRTY_LOG`.
    Get,
    /// `KVM_CLEAR_DIRTY_LOG`.
    Clear,
    /// `KVM_RESET_DIRTY_RINGS`.
    Reset,
    /// Manual protection is switched.
    Manual,
}

/// A moment inside a call at which vCPUs may run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Point {
    /// A call begins.
    Before(Call),
    /// A slot is invalid: accesses to it find no memory.
    Invalid(SlotKey),
    /// A list call has made its new slots visible. Unless the old ones were invalid first, their mappings are still there.
    Swapped,
    /// The dirty log is being taken, page after page. KVM's memory lock is held: what needs a fault has to wait.
    Taking,
    /// Some ring entries have been reset.
    Resetting,
    /// A call ends.
    After(Call),
}

/// Decides what vCPUs do at each [`Point`]. With the same decisions everything happens in the same way.
pub trait Schedule: Send {
    /// The vCPUs that are inside may act now.
    fn at(&mut self, point: Point, state: &mut State);
}

/// Calls that are to fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Failure {
    /// Of these kinds.
    pub calls: &'static [Call],
    /// After so many that do not.
    pub after: u32,
    /// So many.
    pub times: u32,
    /// With this error number.
    pub errno: i32,
}

/// A RESET that stops early.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cut {
    /// After so many entries. Those that are being gathered then, up to 64, are counted and stay unarmed; so it is if there are
    /// no more than these.
    pub after: u64,
    /// The caller can tell that its thread was away.
    pub noticed: bool,
}

/// What goes wrong, to order.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Orders {
    /// Calls that fail and change nothing.
    pub failure: Option<Failure>,
    /// The next RESET that has entries to reset stops early.
    pub cut: Option<Cut>,
    /// Failures that happened.
    pub failed: u64,
}

impl Orders {
    /// The error number, if this call is to fail.
    pub(super) fn due(&mut self, call: Call) -> Option<i32> {
        let failure = self
            .failure
            .as_mut()
            .filter(|f| f.times > 0 && f.calls.contains(&call))?;
        if failure.after > 0 {
            failure.after -= 1;
            return None;
        }
        failure.times -= 1;
        self.failed += 1;
        Some(failure.errno)
    }
}
