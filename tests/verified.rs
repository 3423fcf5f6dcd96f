//! What `verify` is for, and that asking for it costs no memory.

#![allow(clippy::unwrap_used)] // a test that can't go on fails

#[path = "../migrate/tests/common/mod.rs"]
mod toy;

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use gleaner::gate::StoppedVcpus;
use gleaner::migrate::{Receiver, Report, Sender, SenderOptions, Source, Status};
use gleaner::model::{ModelConfig, ModelKvm};
use gleaner::service::{Attach, ServiceClient, ServiceSocket};
use gleaner::vmm::IncomingMachine;
use gleaner::{Block, Hooks, LocalSource, PAGE_SIZE, Tracker};
use gleaner_bitmap::mutant::{self, Mutant};
use toy::{ToyDestination, ToySource, assert_same, migrate, options, pair, receiver_options};
use vm_memory::{Bytes, GuestAddress, VolatileMemory};

fn verified(verify: bool) -> SenderOptions {
    SenderOptions {
        verify,
        ..options()
    }
}

fn attempt(verify: bool) -> (Report, ToySource, ToyDestination) {
    let (source, place) = (ToySource::new(3000), ToyDestination::default());
    let (near, far) = pair();
    let options = verified(verify);
    let (report, _) = migrate(&source, &place, options, receiver_options(), near, far);
    (report, source, place)
}

#[test]
fn a_page_that_the_sender_forgets_is_found_by_comparing_alone() {
    let planted = mutant::plant(Mutant::PageNotSent);
    let (unseen, _, place) = attempt(false);
    assert_eq!(unseen.status, Status::Completed);
    assert!(place.place().running, "with a page lost");
    let (seen, source, place) = attempt(true);
    assert_eq!(seen.status, Status::Failed);
    let reason = seen.reason.unwrap();
    assert!(reason.contains("page 0 of block ram"), "{reason}");
    assert!(source.guest().running && !place.place().running);
    drop(planted);
    let _none = mutant::plant(None);
    let (report, source, place) = attempt(true);
    assert_eq!(report.status, Status::Completed, "{:?}", report.reason);
    assert_same(&source, &place);
}

struct NoDevices;

impl Hooks for NoDevices {
    fn pause_devices(&mut self) -> Result<(), String> {
        Ok(())
    }

    fn save(&mut self, _: &StoppedVcpus) -> Result<Vec<u8>, String> {
        Ok(Vec::new())
    }

    fn resume(&mut self) {}

    fn migrated_away(&mut self) {}
}

const PAGES: u64 = (1 << 30) / PAGE_SIZE + 3;
const TOUCHED: u64 = 100;

/// A large guest that has touched little: pages here and there, up to the last but two.
fn sparse() -> (Tracker, Block) {
    let kvm = ModelKvm::new(ModelConfig::default());
    let tracker = Tracker::on(Arc::new(kvm)).build().unwrap();
    let ram = Block::memfd("ram", PAGES * PAGE_SIZE).unwrap();
    let mut tx = tracker.transaction();
    tx.add_block(&ram)
        .create(0, GuestAddress(0), ram.extent(ram.info().all()));
    tx.commit().unwrap();
    for n in 1..=TOUCHED {
        let page = n * (PAGES - 3) / TOUCHED;
        let at = usize::try_from(page * PAGE_SIZE).unwrap();
        let memory = ram.memory().as_volatile_slice();
        memory.write_obj(n, at).unwrap();
    }
    (tracker, ram)
}

/// Pages that the memory of a block takes up.
fn allocated(block: &Block) -> u64 {
    let (file, _) = block.shared_backing().unwrap();
    file.metadata().unwrap().blocks() * 512 / PAGE_SIZE
}

/// Pages that a guest's memory takes up at both ends when it has migrated.
fn costs(source: &mut dyn Source, ram: &Block, verify: bool) -> [u64; 2] {
    let (near, far) = pair();
    let mut place = IncomingMachine::new();
    let report = std::thread::scope(|scope| {
        scope.spawn(|| Receiver::new(&mut place, receiver_options()).run(far));
        Sender::new(source, verified(verify)).run(near)
    });
    assert_eq!(report.status, Status::Completed, "{:?}", report.reason);
    assert_eq!(report.verified_pages, if verify { PAGES } else { 0 });
    [allocated(ram), allocated(&place.blocks()["ram"])]
}

fn local(verify: bool) -> [u64; 2] {
    let (tracker, ram) = sparse();
    let mut source = LocalSource::new(&tracker, Box::new(NoDevices)).unwrap();
    costs(&mut source, &ram, verify)
}

fn by_agent(verify: bool) -> [u64; 2] {
    let (tracker, ram) = sparse();
    let dir = tempfile::tempdir().unwrap();
    let control = dir.path().join("control");
    let hooks = || Box::new(NoDevices) as Box<dyn Hooks>;
    let socket = ServiceSocket::bind(&control).unwrap();
    let _service = socket.serve(&tracker, hooks).unwrap();
    match ServiceClient::attach(&control, options().id).unwrap() {
        Attach::Ready(mut source) => costs(&mut source, &ram, verify),
        Attach::InDoubt(..) => panic!("a fresh service is in doubt"),
    }
}

#[test]
fn memory_that_nobody_has_touched_stays_unallocated_at_both_ends() {
    let _none = mutant::plant(None);
    for migrate in [local, by_agent] {
        let [source, destination] = migrate(true);
        assert_eq!([source, destination], migrate(false));
        // Of a few pages at the end the sender looks whether they are zero.
        assert!(source < TOUCHED + 8 && destination == TOUCHED);
    }
}

#[test]
fn memory_is_shown_only_while_the_guest_is_stopped() {
    let _none = mutant::plant(None);
    let (tracker, ram) = sparse();
    let mut source = LocalSource::new(&tracker, Box::new(NoDevices)).unwrap();
    let shown = |source: &mut LocalSource, step: &str, expected: bool| {
        let memory = source.memory(ram.id());
        let told = memory.map(|m| m.pages()).map_err(|e| e.to_string());
        match expected {
            true => assert_eq!(told, Ok(PAGES), "{step}"),
            false => assert!(told.unwrap_err().contains("not stopped"), "{step}"),
        }
    };
    shown(&mut source, "running", false);
    source.stop().unwrap();
    shown(&mut source, "stopped", true);
    source.relinquish().unwrap();
    shown(&mut source, "let go of", false);
    source.resume().unwrap();
    shown(&mut source, "running again", false);
}
