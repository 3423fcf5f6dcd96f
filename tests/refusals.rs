//! What makes no sense is refused by name, and changes nothing.

#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use std::sync::Arc;

use common::hand::{Hand, after, gpa, pages};
use common::{MODES, kvm};
use gleaner::{
    Block, BlockId, Error, Extent, Layout, PAGE_SIZE, PageRange, Slot, Start, Tracker, Tracking,
    Transaction,
};
use gleaner_bitmap::Error as Bad;
use vm_memory::GuestAddress;

/// Steps that must not be committed, and what must be said of them.
type Case = (
    &'static str,
    fn(&mut Transaction<'_>, &Block),
    fn(&Bad) -> bool,
);

const CASES: [Case; 20] = [
    (
        "a slot over another one's last page",
        |tx, b| {
            tx.create(5, gpa(64), b.extent(PageRange::new(0, 1)));
        },
        |e| matches!(e, Bad::Overlap { .. }),
    ),
    (
        "a slot that is moved onto another one",
        |tx, _| {
            tx.move_to(2, gpa(1));
        },
        |e| matches!(e, Bad::Overlap { .. }),
    ),
    (
        "a slot that grows into another one",
        |tx, b| {
            tx.create(5, gpa(99), b.extent(PageRange::new(0, 1)))
                .resize(5, 2);
        },
        |e| matches!(e, Bad::Overlap { .. }),
    ),
    (
        "an address inside a page",
        |tx, b| {
            tx.create(5, GuestAddress(4097), b.extent(PageRange::new(0, 1)));
        },
        |e| matches!(e, Bad::Unaligned { .. }),
    ),
    (
        "a move to an address inside a page",
        |tx, _| {
            tx.move_to(1, GuestAddress(1));
        },
        |e| matches!(e, Bad::Unaligned { .. }),
    ),
    (
        "a block that was never added",
        |tx, _| {
            tx.create(5, gpa(900), Extent::new(BlockId(u64::MAX), 0, 1));
        },
        |e| matches!(e, Bad::UnknownBlock { .. }),
    ),
    (
        "removing a block that was never added",
        |tx, _| {
            tx.remove_block(BlockId(u64::MAX));
        },
        |e| matches!(e, Bad::UnknownBlock { .. }),
    ),
    (
        "a slot that reaches past its block",
        |tx, b| {
            tx.create(5, gpa(900), b.extent(PageRange::new(60, 6)));
        },
        |e| matches!(e, Bad::OutsideBlock { .. }),
    ),
    (
        "a range whose end is no number",
        |tx, b| {
            tx.create(5, gpa(900), b.extent(PageRange::new(u64::MAX, 2)));
        },
        |e| matches!(e, Bad::OutsideBlock { .. }),
    ),
    (
        "a slot that grows past its block",
        |tx, _| {
            tx.resize(1, 66);
        },
        |e| matches!(e, Bad::OutsideBlock { .. }),
    ),
    (
        "a slot of no pages",
        |tx, _| {
            tx.resize(1, 0);
        },
        |e| matches!(e, Bad::OutsideBlock { .. }),
    ),
    (
        "a block that is removed and still mapped",
        |tx, b| {
            tx.remove_block(b.id());
        },
        |e| matches!(e, Bad::BlockInUse { .. }),
    ),
    (
        "a slot id above KVM's limit",
        |tx, b| {
            tx.create(u16::MAX, gpa(900), b.extent(PageRange::new(0, 1)));
        },
        |e| matches!(e, Bad::TooManySlots { .. }),
    ),
    (
        "a slot id that is in use",
        |tx, b| {
            tx.create(1, gpa(900), b.extent(PageRange::new(0, 1)));
        },
        |e| matches!(e, Bad::SlotExists { .. }),
    ),
    (
        "a cut whose upper id is in use",
        |tx, _| {
            tx.split(1, 5, 2);
        },
        |e| matches!(e, Bad::SlotExists { .. }),
    ),
    (
        "a cut at a slot's end",
        |tx, _| {
            tx.split(1, 65, 5);
        },
        |e| matches!(e, Bad::BadCut { .. }),
    ),
    (
        "a hole over a whole slot",
        |tx, _| {
            tx.punch(1, PageRange::new(0, 65), 5);
        },
        |e| matches!(e, Bad::BadCut { .. }),
    ),
    (
        "joining slots with a gap between them",
        |tx, _| {
            tx.merge(1, 2);
        },
        |e| matches!(e, Bad::NotAdjacent { .. }),
    ),
    (
        "a slot that is not there",
        |tx, _| {
            tx.delete(77);
        },
        |e| matches!(e, Bad::UnknownSlot { .. }),
    ),
    (
        "a block of a name that is taken",
        |tx, _| {
            tx.add_block(&Block::memfd("a", PAGE_SIZE).unwrap());
        },
        |e| matches!(e, Bad::BlockNameTaken { .. }),
    ),
];

fn same(a: &Layout, b: &Layout) -> bool {
    a.generation() == b.generation() && a.slots().eq(b.slots()) && a.blocks().eq(b.blocks())
}

#[test]
fn steps_that_lead_nowhere_are_refused_and_change_nothing() {
    if !kvm() {
        return;
    }
    for (mode, tracking) in MODES {
        let mut hand = Hand::new(tracking);
        let a = hand.plug("a", 65, 1, gpa(0));
        hand.plug("b", 65, 2, gpa(100));
        let consumer = hand.tracker.consumer(Start::Empty).unwrap();
        let before = hand.tracker.layout();
        for (n, (what, steps, expected)) in (0..).zip(CASES) {
            hand.write(gpa(n), 1, n);
            let mut tx = hand.tracker.transaction();
            // What is done before the bad step is not done either.
            tx.move_to(2, gpa(200)).move_to(2, gpa(100));
            steps(&mut tx, &a);
            let outcome = tx.commit_with(|_| panic!("{what}: published"));
            match outcome {
                Err(Error::Bitmap(error)) if expected(&error) => {
                    assert!(!error.to_string().is_empty());
                }
                other => panic!("{mode}, {what}: {other:?}"),
            }
            assert!(same(&hand.tracker.layout(), &before), "{mode}, {what}");
            assert!(hand.may_run(), "{mode}, {what}");
            assert_eq!(hand.glean(&consumer), pages(&a, [n]), "{mode}, {what}");
        }
        assert_eq!(
            hand.tracker.transactions(),
            3,
            "{mode}: those that built it"
        );
    }
}

/// What the layout can't know is KVM's to refuse: on x86 this VM has one address space.
#[test]
fn what_kvm_refuses_is_a_failed_transaction() {
    if !kvm() {
        return;
    }
    for (mode, tracking) in MODES {
        let mut hand = Hand::new(tracking);
        let a = hand.plug("a", 65, 1, gpa(0));
        let consumer = hand.tracker.consumer(Start::Empty).unwrap();
        hand.write(gpa(1), 1, 1);
        let before = hand.tracker.layout();
        let mut slots: Vec<Slot> = before.slots().copied().collect();
        let mut elsewhere = slots[1];
        elsewhere.key.address_space = 7;
        slots[1].gpa = after(gpa(0), 300).0;
        slots.push(elsewhere);
        let mut tx = hand.tracker.transaction();
        tx.transact_to(slots);
        let error = tx.commit().unwrap_err();
        assert!(
            matches!(error, Error::TransactionFailed { at: 2, of: 2, .. }),
            "{mode}: {error:?}"
        );
        assert!(same(&hand.tracker.layout(), &before), "{mode}");
        hand.write(gpa(2), 1, 1);
        assert_eq!(hand.glean(&consumer), pages(&a, [1, 2]), "{mode}");
    }
}

#[test]
fn rings_of_impossible_sizes_are_refused() {
    if !kvm() {
        return;
    }
    for bytes in [
        0,
        1,
        16,
        2048,
        4095,
        4097,
        12288,
        (1 << 20) + 1,
        1 << 21,
        1 << 31,
    ] {
        let vm = Arc::new(kvm_ioctls::Kvm::new().unwrap().create_vm().unwrap());
        let error = Tracker::builder(vm)
            .tracking(Tracking::Ring { bytes })
            .build()
            .unwrap_err();
        assert!(
            matches!(error, Error::Kvm(gleaner_ring::Error::RingSize { .. })),
            "{bytes}: {error}"
        );
    }
}

#[test]
fn rings_are_refused_once_a_vcpu_exists() {
    if !kvm() {
        return;
    }
    let vm = Arc::new(kvm_ioctls::Kvm::new().unwrap().create_vm().unwrap());
    let _vcpu = vm.create_vcpu(0).unwrap();
    let error = Tracker::builder(vm)
        .tracking(Tracking::RING)
        .build()
        .unwrap_err();
    assert!(
        matches!(
            error,
            Error::Kvm(gleaner_ring::Error::EnableCapability { .. })
        ),
        "{error}"
    );
    assert!(error.to_string().contains("before the first vCPU"));
}

#[test]
fn a_signal_that_can_not_be_used_is_refused() {
    if !kvm() {
        return;
    }
    for signal in [0, -1, libc::SIGKILL, libc::SIGSTOP, 1000] {
        let vm = Arc::new(kvm_ioctls::Kvm::new().unwrap().create_vm().unwrap());
        let outcome = Tracker::builder(vm).kick_signal(signal).build();
        assert!(
            matches!(outcome, Err(Error::KickSignal { .. })),
            "{signal}: {outcome:?}"
        );
    }
}

#[test]
fn a_device_that_reports_nothing_and_a_consumer_exclude_each_other() {
    if !kvm() {
        return;
    }
    for (mode, tracking) in MODES {
        let hand = Hand::new(tracking);
        hand.tracker.attach_unlogged("nic").unwrap();
        let refused = hand.tracker.consumer(Start::AllDirty);
        assert!(
            matches!(&refused, Err(Error::UnloggedWriter { device }) if device == "nic"),
            "{mode}: {refused:?}"
        );
        assert_eq!(hand.logged(), None, "{mode}");
        hand.tracker.detach("nic").unwrap();
        let consumer = hand.tracker.consumer(Start::AllDirty).unwrap();
        let refused = hand.tracker.attach_unlogged("nic");
        assert!(
            matches!(&refused, Err(Error::UnloggedWriter { device }) if device == "nic"),
            "{mode}: {refused:?}"
        );
        drop(consumer);
        hand.tracker.attach_unlogged("nic").unwrap();
    }
}

#[test]
fn a_block_or_range_that_is_not_there_can_not_be_discarded() {
    if !kvm() {
        return;
    }
    let hand = Hand::new(Tracking::Bitmap);
    let block = hand.plug("a", 65, 1, gpa(0));
    let writing = hand.tracker.writers().enter();
    let unknown = hand
        .tracker
        .discard(&writing, BlockId(u64::MAX), PageRange::new(0, 1));
    assert!(matches!(
        unknown,
        Err(Error::Bitmap(Bad::UnknownBlock { .. }))
    ));
    for range in [PageRange::new(65, 1), PageRange::new(1, u64::MAX)] {
        let outside = hand.tracker.discard(&writing, block.id(), range);
        assert!(matches!(
            outside,
            Err(Error::Bitmap(Bad::OutsideBlock { .. }))
        ));
    }
    assert!(hand.tracker.slot_bitmap(77).is_none());
}
