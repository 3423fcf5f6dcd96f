//! The kernel fills a ring and frees what user space has reset, while user space reads it: in every order that the memory
//! model allows, each entry is read once, whole and in order, and the kernel reads the same back before it frees it.
//! Threads, atomics and the memory of the entries are loom's:
//!
//! ```sh
//! RUSTFLAGS="--cfg loom" cargo test --release -p gleaner-ring --lib loom_tests --target-dir target/loom
//! ```
//!
//! Bounds: a ring of two entries, three pages, so that one entry is used again, and indices that wrap at 2^32 on the way; two
//! threads with up to four preemptions, three with up to three (7,167 and 3,533 executions). Slot and offset are plain memory:
//! that one side writes while the other reads ends the test, whatever values are seen. What stands for the kernel is the
//! model's side of the ring, which checks that an entry is free where KVM counts.
#![allow(clippy::unwrap_used)] // a test fails by panicking

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use gleaner_bitmap::SlotKey;

use super::{DIRTY, DirtyRing, ENTRY_BYTES, Entries, RESET};

/// Of the first entry: both sides' indices wrap between it and the second.
const FIRST: u32 = u32::MAX;
/// How often the kernel and user space try, each.
const TRIES: u32 = 3;

/// How user space takes an entry.
type Pop = fn(&mut DirtyRing) -> Option<(SlotKey, u64)>;

/// What the kernel logs as its `n`-th.
fn entry(n: u32) -> (SlotKey, u64) {
    (SlotKey::from_raw(n + 7), 100 + u64::from(n))
}

/// The kernel's side: what it has pushed, and what it has read back and freed.
struct Kernel {
    entries: Arc<Entries>,
    pushed: u32,
    freed: u32,
}

impl Kernel {
    fn push(&mut self) {
        let (slot, page) = entry(self.pushed);
        let index = FIRST.wrapping_add(self.pushed);
        self.pushed += u32::from(self.entries.push(index, slot, page));
    }

    fn reset(&mut self) {
        while let Some(taken) = self.entries.take_reset(FIRST.wrapping_add(self.freed)) {
            assert_eq!(taken, entry(self.freed), "re-armed");
            self.freed += 1;
        }
    }
}

/// User space's side, and how many entries it has read.
struct User {
    ring: DirtyRing,
    read: u32,
}

impl User {
    fn pop(&mut self, pop: Pop) {
        if let Some(read) = pop(&mut self.ring) {
            assert_eq!(read, entry(self.read), "read");
            self.read += 1;
        }
    }
}

fn both_sides() -> (Kernel, User) {
    let entries = Arc::new(Entries::anonymous(2 * ENTRY_BYTES).unwrap());
    let ring = DirtyRing {
        entries: Arc::clone(&entries),
        next: FIRST,
    };
    let kernel = Kernel {
        entries,
        pushed: 0,
        freed: 0,
    };
    (kernel, User { ring, read: 0 })
}

/// With both sides at rest nothing is on the way: all that was pushed is read, and all of it freed.
fn settle(mut kernel: Kernel, mut user: User) {
    for _ in 0..TRIES {
        user.pop(DirtyRing::pop);
    }
    kernel.reset();
    assert_eq!((kernel.pushed, kernel.pushed), (user.read, kernel.freed));
}

/// Tries every execution of `f` with at most `preemptions` threads suspended where they could go on; prints how many there
/// were.
fn explore(name: &str, preemptions: usize, f: impl Fn() + Send + Sync + 'static) {
    let executions = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&executions);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(move || {
        counter.fetch_add(1, Ordering::Relaxed);
        f();
    });
    println!("{name}: {} executions", executions.load(Ordering::Relaxed));
}

/// How a user must not take an entry: gives it back before it has read it.
fn reset_first(ring: &mut DirtyRing) -> Option<(SlotKey, u64)> {
    let flags = ring.entries.flags(ring.next);
    if flags.load(Ordering::Acquire) != DIRTY {
        return None;
    }
    flags.store(RESET, Ordering::Release);
    let read = ring.entries.read(ring.next);
    ring.next = ring.next.wrapping_add(1);
    Some(read)
}

/// Takes an entry as [`DirtyRing::pop`] does, with other orderings.
fn pop_with(ring: &mut DirtyRing, load: Ordering, store: Ordering) -> Option<(SlotKey, u64)> {
    let flags = ring.entries.flags(ring.next);
    if flags.load(load) != DIRTY {
        return None;
    }
    let read = ring.entries.read(ring.next);
    flags.store(RESET, store);
    ring.next = ring.next.wrapping_add(1);
    Some(read)
}

/// The kernel on one thread, user space on another.
fn kernel_against_user(pop: Pop) {
    explore("kernel, user", 4, move || {
        let (mut kernel, mut user) = both_sides();
        let thread = loom::thread::spawn(move || {
            for _ in 0..TRIES {
                kernel.push();
                kernel.reset();
            }
            kernel
        });
        for _ in 0..TRIES {
            user.pop(pop);
        }
        settle(thread.join().unwrap(), user);
    });
}

#[test]
fn each_entry_is_read_once_and_whole_and_read_back_before_it_is_free() {
    kernel_against_user(DirtyRing::pop);
}

/// Three threads: a vCPU that logs, user space, and `KVM_RESET_DIRTY_RINGS`.
#[test]
fn a_vcpu_that_logs_on_while_rings_are_reset_loses_nothing() {
    explore("vCPU, reset, user", 3, || {
        let (kernel, mut user) = both_sides();
        let mut vcpu = Kernel {
            entries: Arc::clone(&kernel.entries),
            ..kernel
        };
        let mut reset = kernel;
        let vcpu = loom::thread::spawn(move || {
            (0..TRIES).for_each(|_| vcpu.push());
            vcpu
        });
        let reset = loom::thread::spawn(move || {
            reset.reset();
            reset
        });
        (0..TRIES - 1).for_each(|_| user.pop(DirtyRing::pop));
        let (vcpu, mut reset) = (vcpu.join().unwrap(), reset.join().unwrap());
        reset.pushed = vcpu.pushed;
        settle(reset, user);
    });
}

#[test]
#[should_panic(expected = "Causality violation")]
fn planted_reset_before_the_entry_is_read() {
    kernel_against_user(reset_first);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn planted_entry_that_is_read_without_acquire() {
    kernel_against_user(|ring| pop_with(ring, Ordering::Relaxed, Ordering::Release));
}

#[test]
#[should_panic(expected = "Causality violation")]
fn planted_reset_without_release() {
    kernel_against_user(|ring| pop_with(ring, Ordering::Acquire, Ordering::Relaxed));
}
