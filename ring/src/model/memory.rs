//! Loads and stores of virtual vCPUs in the memory behind a slot.
#![allow(unsafe_code)] // guest memory, which is known by its address alone

use std::sync::atomic::{AtomicU64, Ordering};

use crate::HostRange;

/// The word at byte `at`; `None` when it is not a whole aligned word inside.
fn word(host: &HostRange, at: u64) -> Option<&AtomicU64> {
    let inside = at.checked_add(8)? <= host.bytes() && (host.addr() + at).is_multiple_of(8);
    let pointer =
        std::ptr::with_exposed_provenance_mut::<u64>(usize::try_from(host.addr() + at).ok()?);
    // SAFETY: the range is mapped readable and writable for as long as `host` lives, and nothing holds a reference into it
    // (duties of `HostRange::new`); the word is aligned and lies inside. Everybody else uses volatile accesses, as with any
    // guest.
    inside.then(|| unsafe { AtomicU64::from_ptr(pointer) })
}

/// Loads a value, or stores one, and returns it. What is outside or not aligned loads as 0: a guest can do no harm with it.
pub(super) fn access(host: &HostRange, at: u64, store: Option<u64>) -> u64 {
    let word = word(host, at);
    match store {
        Some(value) => {
            if let Some(word) = word {
                word.store(value, Ordering::Relaxed);
            }
            value
        }
        None => word.map_or(0, |word| word.load(Ordering::Relaxed)),
    }
}
