//! Bugs to plant, for the project's own tests: a test that never fails shows nothing.
//!
//! They are planted in the whole process, one at a time, and only with the feature `mutants`; without it there is none, and
//! asking costs nothing. Bugs of kernels are the model's, not these.

#[cfg(feature = "mutants")]
use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU8, Ordering},
};

/// A bug that a test plants, to see that it is found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Mutant {
    /// Transactions don't close the gate: vCPUs run while slots change.
    GateOpen = 1,
    /// Transactions harvest nothing, neither before nor inside: a slot is gone before its log was read.
    HarvestLeftOut,
    /// Harvests publish first, and re-arm what they published when the next harvest begins. Plain bitmaps can't have this
    /// bug: fetching is re-arming.
    RearmLate,
    /// Logging is switched off and on again around a change of slots.
    LoggingToggled,
    /// CLEAR is handed whole words, bits that were never fetched among them.
    ClearedUnfetched,
    /// What was fetched from several slots is cleared in the first of them alone.
    ClearedInOneSlot,
    /// A vCPU runs whose ring is not mapped.
    RingUnmapped,
    /// A transaction leaves entries in the rings, and the next layout reads them.
    RingsNotDrained,
    /// A RESET that returned early is taken for a whole one.
    ShortResetTaken,
    /// What the VMM itself writes is not marked.
    WritesUnmarked,
    /// What a harvest had collected when it failed is dropped.
    ErrorDropsBits,
    /// The place in the block is counted along, and not advanced over slots that are clean.
    CleanSlotNotPassed,
    /// The next attempt goes on with the bits that the last one left.
    AttemptOnConsumedBits,
    /// Devices are saved after the last harvest.
    StateSavedLast,
    /// A device goes without its log being harvested.
    LogDroppedAtDetach,
    /// A device that reports nothing is taken for clean.
    SilentDeviceTaken,
    /// Logs go on starting with all bits set, which are taken for truth.
    InitialBitsTaken,
    /// Memory whose log started with all bits set is leased without being armed.
    LeasedUnarmed,
    /// It is armed with INITIALLY_SET off, which leaves huge mappings writable.
    HugeLeftWritable,
    /// Buffers for dirty logs are not checked against the slot, in the model of KVM.
    BufferUnchecked,
    /// A bitmap that is too short for its range is taken for as far as it goes.
    TailDropped,
    /// A mark outside its log is ignored.
    OutsideIgnored,
    /// A mark looks first whether the bit is set, without a fence between the write and the look.
    LoadFirst,
    /// A short RESET is healed without closing the gate.
    HealedWhileRunning,
    /// A page on lease is leased again.
    LeasedTwice,
    /// Writers that have not finished are not waited for.
    WritersNotAwaited,
    /// What a harvest takes from its sources is in the store only after the next one.
    PublishedLate,
    /// The source resumes when it can't tell whether the destination runs.
    DoubtTakenForFailure,
    /// The first page of each lease is taken for sent.
    PageNotSent,
}

#[cfg(feature = "mutants")]
static PLANTED: AtomicU8 = AtomicU8::new(0);
#[cfg(feature = "mutants")]
static FIELD: Mutex<()> = Mutex::new(());

/// Whether bugs can be planted in this build, so that every spot asks for one: it is slower than what users have.
pub const ARE_ASKED_FOR: bool = cfg!(feature = "mutants");

/// Whether the bug is planted. Every spot where one can be asks this.
#[cfg(feature = "mutants")]
#[must_use]
pub fn is_planted(mutant: Mutant) -> bool {
    PLANTED.load(Ordering::SeqCst) == mutant as u8
}

/// Whether the bug is planted: never.
#[cfg(not(feature = "mutants"))]
#[must_use]
pub const fn is_planted(_: Mutant) -> bool {
    false
}

/// A bug is planted, or it is sure that there is none, until this is dropped.
#[cfg(feature = "mutants")]
#[derive(Debug)]
#[must_use = "the bug is there only while it lives"]
pub struct Planted {
    _field: MutexGuard<'static, ()>,
}

/// Plants a bug in the whole process, or makes sure that none is there; waits for whoever has planted before. Tests of one
/// binary run at the same time: where one plants, all have to come here.
#[cfg(feature = "mutants")]
pub fn plant(mutant: impl Into<Option<Mutant>>) -> Planted {
    let field = FIELD.lock().unwrap_or_else(PoisonError::into_inner);
    PLANTED.store(mutant.into().map_or(0, |m| m as u8), Ordering::SeqCst);
    Planted { _field: field }
}

#[cfg(feature = "mutants")]
impl Drop for Planted {
    fn drop(&mut self) {
        PLANTED.store(0, Ordering::SeqCst);
    }
}
