//! The reference machine on the model of KVM: it runs everywhere, and what it migrates arrives.

#![allow(clippy::unwrap_used)] // a test that can't go on fails

mod common;

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{MODES, bytes_of, kvm, pages_apart};
use gleaner::migrate::{
    MigrationId, Receiver, ReceiverOptions, Report, Sender, SenderOptions, Status, Stream,
};
use gleaner::vmm::churn::{ChurnConfig, Kind};
use gleaner::vmm::guest::{CheckResult, MemoryMap, Workload};
use gleaner::vmm::{Backend, IncomingMachine, Machine, MachineConfig, MachineStatus, OnComplete};
use gleaner::{LocalSource, PAGE_SIZE, Tracking};
use vm_memory::{Bytes, VolatileMemory};

const RAM: u64 = (16 << 20) + 37 * PAGE_SIZE;
const PATIENCE: Duration = Duration::from_secs(60);

fn machine(backend: Backend, tracking: Tracking, workload: Workload, churn: bool) -> Machine {
    let mut machine = Machine::new(&MachineConfig {
        backend,
        ram: RAM,
        vcpus: 2,
        ram_file: None,
        tracking,
        workload,
        write_rate: None,
        churn: churn.then(|| ChurnConfig {
            rate: Some(1000.0),
            kinds: Kind::ALL.to_vec(),
            seed: 3,
        }),
        seed: 5,
    })
    .unwrap();
    machine.start();
    machine
}

/// Waits until the guest has written so many pages more.
fn wait_for_writes(machine: &Machine, pages: u64) {
    let deadline = Instant::now() + PATIENCE;
    let before = machine.guest_writes().unwrap();
    while machine.guest_writes().unwrap() < before + pages {
        assert!(Instant::now() < deadline, "the guest does not write");
        std::thread::yield_now();
    }
}

/// Migrates, not before `transactions` slot transactions.
fn migrate(machine: &Machine, to: &mut IncomingMachine, transactions: u64) -> Report {
    let (here, there) = UnixStream::pair().unwrap();
    let tracker = machine.tracker().clone();
    let mut source = LocalSource::new(&tracker, machine.hooks_factory()()).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // What it says of itself the source has heard.
            let _ = Receiver::new(to, ReceiverOptions::default()).run(Stream::from(there));
        });
        let mut options = SenderOptions::new(MigrationId::random().unwrap());
        options.hold = Some(Box::new(move || tracker.transactions() >= transactions));
        Sender::new(&mut source, options).run(Stream::from(here))
    })
}

/// Pages that differ, by block; nothing before they were compared.
type Found = Arc<Mutex<Option<Vec<(String, u64)>>>>;

/// Compares every page of every block with the stopped source.
fn compare(machine: &Machine, found: &Found) -> OnComplete {
    let (tracker, found) = (machine.tracker().clone(), Arc::clone(found));
    Box::new(move |arrived| {
        let layout = tracker.layout();
        let differing = layout.blocks().flat_map(|info| {
            let here = bytes_of(&tracker.block(info.id).unwrap());
            let apart = pages_apart(&here, &bytes_of(&arrived[&info.name]));
            apart.into_iter().map(|page| (info.name.clone(), page))
        });
        *found.lock().unwrap() = Some(differing.collect());
        Ok(())
    })
}

#[test]
fn a_guest_arrives_whole_whatever_happens_to_its_slots_in_any_mode() {
    for (mode, tracking) in MODES {
        for workload in [Workload::Random, Workload::Sweep, Workload::Hot(1 << 20)] {
            let machine = machine(Backend::Model, tracking, workload, true);
            let differing = Found::default();
            let mut destination = IncomingMachine::new()
                .resume(Backend::Model, tracking)
                .on_complete(compare(&machine, &differing));
            let report = migrate(&machine, &mut destination, 300);
            assert_eq!(report.status, Status::Completed, "{mode}: {report:?}");
            assert_eq!(
                *differing.lock().unwrap(),
                Some(vec![]),
                "{mode}, {workload}"
            );
            let kinds = machine.churn_counts().kinds;
            assert_eq!(kinds.len(), Kind::ALL.len(), "{kinds:?}");
            assert_eq!(machine.status(), MachineStatus::MigratedAway);

            let arrived = destination.take_machine().unwrap();
            assert_eq!(arrived.tracker().mode().name(), mode);
            wait_for_writes(&arrived, 1);
            let check = arrived.check(PATIENCE).unwrap();
            assert_eq!(check, CheckResult::Ok, "{mode}, {workload}");
        }
    }
}

#[test]
fn a_page_that_does_not_arrive_is_found_by_the_guest() {
    let map = MemoryMap::new(RAM, 2).unwrap();
    let data = map.vcpu(1).unwrap().data;
    let machine = machine(
        Backend::Model,
        Tracking::Bitmap,
        Workload::Hot(1 << 20),
        false,
    );
    // Each vCPU's half of the hot set many times over.
    wait_for_writes(&machine, 100_000);
    let lost = usize::try_from((data.first + 5) * PAGE_SIZE).unwrap();
    let mut destination = IncomingMachine::new()
        .resume(Backend::Model, Tracking::Bitmap)
        .on_complete(Box::new(move |arrived| {
            let memory = arrived["ram"].memory().as_volatile_slice();
            memory.write_slice(&[0; 4096], lost).unwrap();
            Ok(())
        }));
    let report = migrate(&machine, &mut destination, 0);
    assert_eq!(report.status, Status::Completed, "{report:?}");
    let arrived = destination.take_machine().unwrap();
    assert_eq!(
        arrived.check(PATIENCE).unwrap(),
        CheckResult::Page { index: 5 }
    );
}

#[test]
fn a_guest_goes_on_only_on_what_it_comes_from() {
    for (guest, here) in [
        (Backend::Model, Backend::Kvm),
        (Backend::Kvm, Backend::Model),
    ] {
        if guest == Backend::Kvm && !kvm() {
            continue;
        }
        let machine = machine(guest, Tracking::Auto, Workload::Random, false);
        let mut destination = IncomingMachine::new().resume(here, Tracking::Auto);
        let report = migrate(&machine, &mut destination, 0);
        assert_eq!(report.status, Status::Failed, "{report:?}");
        let reason = report.reason.unwrap();
        let expected = format!(
            "the guest comes from {guest}, this destination runs on {here}: use --backend {}",
            guest.name()
        );
        assert!(reason.contains(&expected), "{reason}");
        wait_for_writes(&machine, 1);
        assert_eq!(machine.check(PATIENCE).unwrap(), CheckResult::Ok);
    }
}
