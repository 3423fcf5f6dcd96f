//! Memory that a thread has from the allocator, counted: no input may take more than a stated cap. Each thread is counted by
//! itself, so that tests may run side by side; what the targets try allocates in the thread that calls it.
#![allow(unsafe_code)] // a global allocator is an unsafe trait; this one counts and passes everything on

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

thread_local! {
    /// Bytes allocated by this thread less those it freed, and the most that they were since a [`capped`] began. The
    /// cell needs no making and no dropping, so the allocator may look at any time.
    static BYTES: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}

/// No allocation is longer than `isize::MAX`.
fn count(more: usize, less: usize) {
    let (now, peak) = BYTES.get();
    let high = now.wrapping_add_unsigned(more);
    BYTES.set((high.wrapping_sub_unsigned(less), peak.max(high)));
}

// SAFETY: every call goes on to the system's allocator as it came; counting touches no memory but a cell of the thread.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: the caller keeps the contract, which is the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: as in `alloc`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both may exist for a moment.
        count(size, layout.size());
        // SAFETY: as in `alloc`.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(0, layout.size());
        // SAFETY: as in `alloc`.
        unsafe { System.dealloc(at, layout) }
    }
}

/// Runs `work`, in which this thread may have up to `cap` bytes more than it had.
///
/// # Panics
/// When it had more.
pub fn capped<T>(cap: usize, work: impl FnOnce() -> T) -> T {
    let (before, _) = BYTES.get();
    BYTES.set((before, before));
    let result = work();
    let taken = BYTES.get().1.wrapping_sub(before).unsigned_abs();
    assert!(
        taken <= cap,
        "{taken} bytes were allocated, over the cap of {cap}"
    );
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_allocated_and_freed_again_counts() {
        capped(1 << 20, || drop(vec![1u8; 1000]));
        let over = std::panic::catch_unwind(|| capped(1 << 20, || drop(vec![0u8; 2 << 20])));
        assert!(over.is_err());
    }

    #[test]
    fn what_another_thread_takes_does_not_count() {
        capped(1 << 20, || {
            let thread = std::thread::spawn(|| drop(vec![1u8; 2 << 20]));
            thread.join().unwrap();
        });
    }

    #[test]
    fn what_grows_in_place_counts() {
        let over = std::panic::catch_unwind(|| {
            capped(1 << 20, || {
                let mut bytes = Vec::new();
                (0..2 << 20).for_each(|_| bytes.push(1u8));
                bytes
            })
        });
        assert!(over.is_err());
    }
}
