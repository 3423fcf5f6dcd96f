//! What the museum shows: each bug, where it was, how it is planted, and what kills it.

use gleaner::Tracking;
use gleaner::model::Bug;
use gleaner_bitmap::mutant::Mutant;

use crate::world::Found;
use crate::{Case, bitmaps, kernels, migrations, rings, slots, writers};

/// Where a bug is planted.
#[derive(Clone, Copy, Debug)]
pub enum Plant {
    /// In our own code.
    Here(Mutant),
    /// In the model of KVM.
    Kernel(Bug),
}

use Plant::{Here, Kernel};

/// A bug.
pub struct Exhibit {
    pub number: u32,
    /// Whose it was.
    pub place: &'static str,
    /// What went wrong.
    pub what: &'static str,
    pub plant: Plant,
    /// The name of what kills it.
    pub name: &'static str,
    pub killer: fn(Case) -> Found,
    /// The modes of tracking that can have it and differ in it.
    pub modes: &'static [(&'static str, Tracking)],
    /// By which type it is ruled out, and where a compile-fail test shows so: what is planted is what the type forbids.
    pub rule: Option<&'static str>,
}

const BITMAP: (&str, Tracking) = ("bitmap", Tracking::Bitmap);
const CLEAR: (&str, Tracking) = ("bitmap-clear", Tracking::BitmapClear);
const RING: (&str, Tracking) = ("ring", Tracking::RING);

/// An exhibit, its killer named and called by one path.
macro_rules! exhibit {
    ($number:literal, $place:literal, $what:literal, $plant:expr, $killer:path, $modes:expr) => {
        exhibit!($number, $place, $what, $plant, $killer, $modes, None)
    };
    ($number:literal, $place:literal, $what:literal, $plant:expr, $killer:path, $modes:expr, $rule:expr) => {
        Exhibit {
            number: $number,
            place: $place,
            what: $what,
            plant: $plant,
            name: stringify!($killer),
            killer: $killer,
            modes: &$modes,
            rule: $rule,
        }
    };
}

pub const EXHIBITS: &[Exhibit] = &[
    exhibit!(
        1,
        "Linux edde99ce",
        "pages were protected before their bitmap was taken",
        Kernel(Bug::ProtectBeforeTake),
        kernels::what_is_written_while_a_bitmap_is_taken_is_armed_if_it_is_in_it,
        [BITMAP]
    ),
    exhibit!(
        2,
        "QEMU 4cc856fa",
        "a slot was destroyed before its bitmap was fetched",
        Here(Mutant::HarvestLeftOut),
        slots::what_a_slot_had_dirty_is_dirty_when_it_is_gone,
        [BITMAP, CLEAR]
    ),
    exhibit!(
        3,
        "QEMU 6f6a5ef3",
        "logging was off for a moment around a change",
        Here(Mutant::LoggingToggled),
        slots::a_slot_that_stays_keeps_what_it_has_dirty,
        [BITMAP, CLEAR]
    ),
    exhibit!(
        4,
        "QEMU 9f4bf4ba",
        "CLEAR was given bits that had never been fetched",
        Here(Mutant::ClearedUnfetched),
        bitmaps::what_is_written_between_fetching_and_clearing_is_kept,
        [CLEAR]
    ),
    exhibit!(
        5,
        "QEMU, 2019",
        "a section of several slots was cleared in one of them",
        Here(Mutant::ClearedInOneSlot),
        bitmaps::each_slot_is_cleared_of_what_was_fetched_from_it,
        [CLEAR]
    ),
    exhibit!(
        6,
        "QEMU 56adee40",
        "the reaper met a vCPU whose ring was not mapped yet",
        Here(Mutant::RingUnmapped),
        rings::a_vcpu_that_can_run_has_a_ring_that_is_read,
        [RING],
        Some("a seat comes from Tracker::register alone, which maps the ring (docs of gate::Seat)")
    ),
    exhibit!(
        7,
        "Linux 1f4e5fc8",
        "a page-modification log was not flushed",
        Kernel(Bug::PmlLeftBehind),
        kernels::a_vcpu_that_is_out_has_logged_all_it_wrote,
        [BITMAP, CLEAR, RING]
    ),
    exhibit!(
        8,
        "rust-vmm/kvm 344",
        "pages were read before the rings were reset",
        Here(Mutant::RearmLate),
        rings::a_page_is_armed_before_it_can_be_read,
        [CLEAR, RING],
        Some("Collected shows no page number (docs of Collected)")
    ),
    exhibit!(
        9,
        "stale ring entries",
        "a slot's id was used again while a ring still named it",
        Here(Mutant::RingsNotDrained),
        slots::entries_mean_the_slots_they_were_made_for,
        [RING]
    ),
    exhibit!(
        10,
        "QEMU, RESET",
        "RESET returned early and was taken for whole",
        Here(Mutant::ShortResetTaken),
        rings::a_short_reset_leaves_no_page_unarmed,
        [RING]
    ),
    exhibit!(
        11,
        "Firecracker 1997, 3666",
        "what the VMM's own devices wrote was not tracked",
        Here(Mutant::WritesUnmarked),
        writers::what_the_vmm_writes_is_found,
        [BITMAP, CLEAR, RING]
    ),
    exhibit!(
        12,
        "Firecracker 4545",
        "bits were fetched, then the operation failed",
        Here(Mutant::ErrorDropsBits),
        bitmaps::what_a_failed_harvest_had_is_in_the_next_one,
        [BITMAP, RING]
    ),
    exhibit!(
        13,
        "Firecracker 5696, 5705",
        "the place in the file stayed behind at a slot that ended clean",
        Here(Mutant::CleanSlotNotPassed),
        bitmaps::pages_keep_their_place_behind_a_slot_that_is_clean,
        [BITMAP, CLEAR],
        Some(
            "a bitmap is placed by its slot, and takes no other place (docs of Collected::or_slot)"
        )
    ),
    exhibit!(
        14,
        "Propolis 232, 616",
        "another attempt started from consumed bits",
        Here(Mutant::AttemptOnConsumedBits),
        migrations::every_attempt_starts_with_everything_dirty,
        [BITMAP, CLEAR, RING]
    ),
    exhibit!(
        15,
        "Cloud Hypervisor 7042922e",
        "devices were saved after the last harvest",
        Here(Mutant::StateSavedLast),
        migrations::what_saving_the_devices_writes_is_migrated,
        [BITMAP]
    ),
    exhibit!(
        16,
        "Cloud Hypervisor c194f63c",
        "a backend's log was dropped when it was shut down",
        Here(Mutant::LogDroppedAtDetach),
        writers::a_device_that_goes_leaves_its_log_behind,
        [BITMAP]
    ),
    exhibit!(
        17,
        "Cloud Hypervisor 7738",
        "a device that reports nothing was taken for clean",
        Here(Mutant::SilentDeviceTaken),
        writers::a_device_that_reports_nothing_is_refused,
        [BITMAP]
    ),
    exhibit!(
        18,
        "INITIALLY_ALL_SET",
        "the first bitmap, all ones, was taken for truth",
        Here(Mutant::InitialBitsTaken),
        slots::a_new_slot_owes_nothing_that_was_not_written,
        [CLEAR]
    ),
    exhibit!(
        19,
        "QEMU 03bfc218",
        "a bitmap was cleared and its pages not protected",
        Kernel(Bug::ClearWithoutProtect),
        kernels::a_page_that_was_cleared_is_logged_when_it_is_written_again,
        [CLEAR]
    ),
    exhibit!(
        20,
        "kvm-ioctls 0.25.1",
        "KVM wrote past a buffer of a stale size",
        Here(Mutant::BufferUnchecked),
        bitmaps::a_log_is_fetched_into_nothing_but_a_whole_buffer,
        [BITMAP, CLEAR],
        Some("a log is fetched into a slice, not by a size (docs of Kvm::get_dirty_log)")
    ),
    exhibit!(
        21,
        "bitmaps zipped",
        "the tail of the longer of two bitmaps was dropped",
        Here(Mutant::TailDropped),
        bitmaps::a_bitmap_that_is_too_short_is_refused,
        [BITMAP]
    ),
    exhibit!(
        22,
        "vm-memory",
        "a mark outside its bitmap was ignored",
        Here(Mutant::OutsideIgnored),
        writers::a_mark_outside_its_log_fails_the_harvest,
        [BITMAP]
    ),
    exhibit!(
        23,
        "a tempting speed-up",
        "a mark looked first whether its bit was set",
        Here(Mutant::LoadFirst),
        writers::a_mark_is_never_older_than_its_write,
        [BITMAP]
    ),
    exhibit!(
        24,
        "healing while it runs",
        "logging was switched off and on under a running vCPU",
        Here(Mutant::HealedWhileRunning),
        rings::nobody_writes_while_the_log_is_switched_off,
        [RING]
    ),
    exhibit!(
        25,
        "two connections",
        "an old copy of a page landed after a newer one",
        Here(Mutant::LeasedTwice),
        migrations::an_old_copy_never_lands_after_a_newer_one,
        [BITMAP, CLEAR, RING]
    ),
    exhibit!(
        26,
        "the last harvest",
        "writes under way at the switchover came after it",
        Here(Mutant::WritersNotAwaited),
        writers::the_last_harvest_waits_for_writes_under_way,
        [BITMAP]
    ),
    exhibit!(
        27,
        "popped, not published",
        "entries had left the ring and were not in the store",
        Here(Mutant::PublishedLate),
        rings::what_was_taken_from_its_source_is_in_the_store,
        [BITMAP, CLEAR, RING]
    ),
    exhibit!(
        28,
        "two guests",
        "the source resumed when it could not tell success from failure",
        Here(Mutant::DoubtTakenForFailure),
        migrations::a_guest_that_may_run_elsewhere_does_not_resume,
        [BITMAP]
    ),
];
