//! Never two guests, never half a one: what stands behind the protocol lets the guest run in one place at most.

#![allow(clippy::unwrap_used)] // a test that can't go on fails

mod common;

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::{MODES, bytes_of, kvm, machine};
use gleaner::migrate::{
    Destination, MigrationId, Outcome, Receiver, ReceiverOptions, Sender, SenderOptions, Source,
    Status, Stream, resolve,
};
use gleaner::vmm::guest::Workload;
use gleaner::vmm::{IncomingMachine, Machine};
use gleaner::{
    Block, BlockId, BlockInfo, Error, Extent, LocalSource, PAGE_SIZE, PageRange, Start, Tracking,
};
use vm_memory::GuestAddress;

fn small(tracking: Tracking) -> Machine {
    machine(tracking, 8 << 20, Workload::Sweep, 7)
}

fn source(machine: &Machine) -> LocalSource {
    LocalSource::new(machine.tracker(), machine.hooks_factory()()).unwrap()
}

/// Waits until the guest has written, so that there is something to lose.
fn wait_for_writes(machine: &Machine) {
    let deadline = Instant::now() + Duration::from_secs(60);
    let before = machine.guest_writes().unwrap();
    while machine.guest_writes().unwrap() == before {
        assert!(Instant::now() < deadline, "the guest does not write");
        std::thread::yield_now();
    }
}

/// Migrates to a destination that compares all memory when it is complete, and then says `verdict`.
fn attempt(
    source: &mut dyn Source,
    ram: &Block,
    verdict: Result<(), String>,
) -> (Status, Option<bool>) {
    let (here, there) = UnixStream::pair().unwrap();
    let ram = ram.clone();
    std::thread::scope(|scope| {
        let receiving = scope.spawn(move || {
            let (told, equal) = std::sync::mpsc::channel();
            let mut destination = IncomingMachine::new().on_complete(Box::new(move |blocks| {
                told.send(bytes_of(&blocks["ram"]) == bytes_of(&ram))
                    .unwrap();
                verdict.clone()
            }));
            // What it says of itself is not what is asked here.
            let _ = Receiver::new(&mut destination, ReceiverOptions::default())
                .run(Stream::from(there));
            equal.try_recv().ok()
        });
        let options = SenderOptions::new(MigrationId::random().unwrap());
        let report = Sender::new(source, options).run(Stream::from(here));
        (report.status, receiving.join().unwrap())
    })
}

#[test]
fn a_machine_that_was_never_started_does_not_run_when_it_is_dropped() {
    if !kvm() {
        return;
    }
    for seed in 1..=10 {
        let machine = machine(Tracking::Auto, 8 << 20, Workload::Sweep, seed);
        let ram = machine.ram().clone();
        let writes = machine.guest_writes().unwrap();
        // Without the device's area, which is written even while vCPUs are parked.
        let guest_part = |ram: &Block| bytes_of(ram)[..1900 * 4096].to_vec();
        let before = guest_part(&ram);
        drop(machine);
        assert!(
            before == guest_part(&ram),
            "the guest ran; it had written {writes} pages before"
        );
    }
}

#[test]
fn a_second_attempt_needs_a_new_source_and_sends_everything() {
    if !kvm() {
        return;
    }
    let mut machine = small(Tracking::Auto);
    machine.start();
    wait_for_writes(&machine);
    let mut first = source(&machine);
    let refused = attempt(&mut first, machine.ram(), Err("no room".into()));
    assert_eq!(refused, (Status::Failed, Some(true)));
    wait_for_writes(&machine);
    let (again, _) = attempt(&mut first, machine.ram(), Ok(()));
    assert_eq!(again, Status::Failed, "an attempt has one destination");
    let fresh = attempt(&mut source(&machine), machine.ram(), Ok(()));
    assert_eq!(fresh, (Status::Completed, Some(true)));
}

#[test]
fn a_guest_that_has_migrated_away_never_goes_on_here() {
    if !kvm() {
        return;
    }
    let mut machine = small(Tracking::Auto);
    machine.start();
    let mut source = source(&machine);
    source.stop().unwrap();
    source.state().unwrap();
    source.relinquish().unwrap();
    source.complete().unwrap();
    // Who did not hear the answer tells it again.
    source.complete().unwrap();
    let writes = machine.guest_writes().unwrap();
    assert!(source.resume().is_err());
    assert!(resolve(&mut source, Outcome::Refused).is_err());
    drop(source);
    assert!(matches!(
        machine.tracker().stop(|| Ok(())),
        Err(Error::AlreadyStopped)
    ));
    drop(machine.check(Duration::from_millis(1)));
    assert_eq!(machine.guest_writes().unwrap(), writes);
}

#[test]
fn the_layout_of_a_stopped_guest_stays_as_the_destination_builds_it() {
    if !kvm() {
        return;
    }
    for (_, tracking) in MODES {
        let mut machine = small(tracking);
        machine.start();
        let tracker = machine.tracker().clone();
        let stopped = tracker.stop(|| Ok(())).unwrap();
        let generation = tracker.layout().generation();
        let split = || {
            let mut tx = tracker.transaction();
            tx.split(1, 100, 2);
            tx.commit()
        };
        assert!(matches!(split(), Err(Error::Stopped)));
        assert_eq!(tracker.layout().generation(), generation);
        drop(stopped);
        assert!(split().is_ok());
    }
}

#[test]
fn a_block_that_was_removed_does_not_come_back_under_its_id() {
    if !kvm() {
        return;
    }
    let mut machine = small(Tracking::Auto);
    // Until it is started it is stopped, and so is its layout.
    machine.start();
    let tracker = machine.tracker();
    let consumer = tracker.consumer(Start::AllDirty).unwrap();
    let block = Block::memfd("dimm", 4 * PAGE_SIZE).unwrap();
    let plug = |slot: u16| {
        let mut tx = tracker.transaction();
        let extent = Extent {
            block: block.id(),
            range: PageRange::new(0, 4),
        };
        tx.add_block(&block)
            .create(slot, GuestAddress(48 << 30), extent);
        tx.commit()
    };
    plug(9).unwrap();
    let lease = consumer.lease(u64::MAX).unwrap().unwrap();
    let mut tx = tracker.transaction();
    tx.delete(9).remove_block(block.id());
    tx.commit().unwrap();
    assert!(matches!(plug(9), Err(Error::BlockReused { .. })));
    drop(lease);
}

#[test]
fn a_peer_can_not_make_the_destination_allocate_without_limit() {
    let mut destination = IncomingMachine::new();
    for pages in [1 << 40, 1 << 52, u64::MAX] {
        let huge = BlockInfo {
            id: BlockId(1),
            name: "x".into(),
            pages,
        };
        assert!(destination.add_block(&huge).is_err(), "{pages} pages");
    }
}
