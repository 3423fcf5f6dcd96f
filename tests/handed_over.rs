//! A guest whose memory is handed over to a destination on this host: it goes on with it, whole, and neither end writes
//! what is the other's.

#![allow(clippy::unwrap_used)] // a test that can't go on fails

mod common;

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{MODES, bytes_of, kvm};
use gleaner::gate::StoppedVcpus;
use gleaner::migrate::{
    Destination, Error, MigrationId, NewMemory, Receiver, ReceiverOptions, Report, Result, Sender,
    SenderOptions, Source, Status, Stream,
};
use gleaner::service::{Attach, Service, ServiceClient};
use gleaner::vmm::churn::{ChurnConfig, Kind};
use gleaner::vmm::guest::{CheckResult, Workload};
use gleaner::vmm::{Backend, IncomingMachine, Machine, MachineConfig, MachineStatus};
use gleaner::{Block, BlockInfo, Hooks, Layout, LocalSource, PAGE_SIZE, Tracking};

const PATIENCE: Duration = Duration::from_secs(60);

fn config(backend: Backend, tracking: Tracking) -> MachineConfig {
    MachineConfig {
        backend,
        ram: 16 << 20,
        vcpus: 2,
        ram_file: None,
        tracking,
        workload: Workload::Random,
        write_rate: None,
        churn: Some(ChurnConfig {
            rate: Some(1000.0),
            kinds: Kind::ALL.to_vec(),
            seed: 3,
        }),
        seed: 5,
    }
}

fn started(config: &MachineConfig) -> Machine {
    let mut machine = Machine::new(config).unwrap();
    machine.start();
    machine
}

/// The backends that there are.
fn backends() -> Vec<Backend> {
    let mut all = vec![Backend::Model];
    if kvm() {
        all.push(Backend::Kvm);
    }
    all
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

fn migrate(source: &mut dyn Source, to: &mut dyn Destination, local: bool) -> Report {
    let (here, there) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // What it says of itself the source has heard.
            let _ = Receiver::new(to, ReceiverOptions::default()).run(Stream::from(there));
        });
        let options = SenderOptions {
            local,
            ..SenderOptions::new(MigrationId::random().unwrap())
        };
        Sender::new(source, options).run(Stream::from(here))
    })
}

/// Moves a machine's guest to a new one, and lets the old one go, as when its process ends.
fn hop(machine: Machine, tracking: Tracking, local: bool, by_agent: bool) -> Machine {
    let mut to = IncomingMachine::new().resume(machine.backend(), tracking);
    wait_for_writes(&machine, 100);
    let hooks = machine.hooks_factory();
    let report = if by_agent {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let _service = Service::serve(machine.tracker(), &path, hooks).unwrap();
        match ServiceClient::attach(&path, MigrationId([9; 16])).unwrap() {
            Attach::Ready(mut source) => migrate(&mut source, &mut to, local),
            Attach::InDoubt(..) => panic!("a fresh service is in doubt"),
        }
    } else {
        let mut hooks = hooks;
        let mut source = LocalSource::new(machine.tracker(), hooks()).unwrap();
        migrate(&mut source, &mut to, local)
    };
    assert_eq!(report.status, Status::Completed, "{report:?}");
    assert_eq!(machine.status(), MachineStatus::MigratedAway);
    assert_eq!(report.pages_sent > 0, !local, "{report:?}");
    drop(machine);
    let arrived = to.take_machine().unwrap();
    wait_for_writes(&arrived, 100);
    assert_eq!(arrived.check(PATIENCE).unwrap(), CheckResult::Ok);
    arrived
}

#[test]
fn the_guest_goes_on_with_its_memory_and_hops_on_either_way() {
    for backend in backends() {
        for (_, tracking) in MODES {
            for by_agent in [false, true] {
                let machine = started(&config(backend, tracking));
                let second = hop(machine, tracking, true, by_agent);
                let third = hop(second, tracking, true, by_agent);
                let fourth = hop(third, tracking, false, by_agent);
                hop(fourth, tracking, true, by_agent);
            }
        }
    }
}

#[test]
fn a_guest_of_any_size_is_whole_where_it_goes_on() {
    if !kvm() {
        return;
    }
    for ram in [64 << 20, 1 << 30] {
        let machine = started(&MachineConfig {
            ram,
            ..config(Backend::Kvm, Tracking::Auto)
        });
        wait_for_writes(&machine, 50_000);
        hop(machine, Tracking::Auto, true, true);
    }
}

/// Looks at the memory as it is when the state has been saved, and when the guest goes on.
struct Watching {
    inner: Box<dyn Hooks>,
    blocks: Box<dyn Fn() -> Vec<Block> + Send>,
    saved: Vec<Vec<u8>>,
    same: Arc<Mutex<Option<bool>>>,
}

impl Hooks for Watching {
    fn pause_devices(&mut self) -> std::result::Result<(), String> {
        self.inner.pause_devices()
    }

    fn save(&mut self, stopped: &StoppedVcpus) -> std::result::Result<Vec<u8>, String> {
        let state = self.inner.save(stopped);
        self.saved = (self.blocks)().iter().map(bytes_of).collect();
        state
    }

    fn resume(&mut self) {
        let now: Vec<_> = (self.blocks)().iter().map(bytes_of).collect();
        *self.same.lock().unwrap() = Some(!now.is_empty() && now == self.saved);
        self.inner.resume();
    }

    fn migrated_away(&mut self) {
        self.inner.migrated_away();
    }
}

/// One that has built the guest, and can't run it.
struct NotRunning(IncomingMachine, bool);

impl Destination for NotRunning {
    fn add_block(&mut self, block: &BlockInfo) -> Result<NewMemory> {
        self.0.add_block(block)
    }

    fn begin_local(&mut self) -> Result<()> {
        self.0.begin_local()
    }

    fn adopt_block(&mut self, block: &BlockInfo, file: File, offset: u64) -> Result<()> {
        self.0.adopt_block(block, file, offset)
    }

    fn remove_block(&mut self, block: &BlockInfo) -> Result<()> {
        self.0.remove_block(block)
    }

    fn layout(&mut self, layout: &Layout) -> Result<()> {
        self.0.layout(layout)
    }

    fn ready(&mut self, state: Vec<u8>) -> Result<()> {
        self.1 = true;
        self.0.ready(state)
    }

    fn run(&mut self) -> Result<()> {
        Err(Error::destination("not on a Sunday"))
    }

    fn abort(&mut self) {
        self.0.abort();
    }
}

#[test]
fn a_destination_that_has_built_the_guest_and_refuses_has_not_touched_its_memory() {
    for backend in backends() {
        for (mode, tracking) in MODES {
            let machine = started(&config(backend, tracking));
            wait_for_writes(&machine, 100);
            let same = Arc::new(Mutex::new(None));
            let tracker = machine.tracker().clone();
            let blocks = move || {
                let layout = tracker.layout();
                let ids = layout.blocks().map(|info| info.id);
                ids.map(|id| tracker.block(id).unwrap()).collect()
            };
            let hooks = Watching {
                inner: machine.hooks_factory()(),
                blocks: Box::new(blocks),
                saved: Vec::new(),
                same: Arc::clone(&same),
            };
            let mut source = LocalSource::new(machine.tracker(), Box::new(hooks)).unwrap();
            let incoming = IncomingMachine::new().resume(backend, tracking);
            let mut to = NotRunning(incoming, false);
            let report = migrate(&mut source, &mut to, true);
            assert_eq!(report.status, Status::Failed, "{mode}: {report:?}");
            assert!(to.1, "{mode}: {report:?}");
            assert_eq!(*same.lock().unwrap(), Some(true), "{mode}");
            drop(source);
            wait_for_writes(&machine, 100);
            assert_eq!(machine.check(PATIENCE).unwrap(), CheckResult::Ok);
            // And it moves when it can.
            hop(machine, tracking, true, false);
        }
    }
}

#[test]
fn a_source_that_has_let_go_writes_nothing_whatever_becomes_of_it() {
    for backend in backends() {
        for (mode, tracking) in MODES {
            let machine = started(&config(backend, tracking));
            wait_for_writes(&machine, 100);
            let mut source =
                LocalSource::new(machine.tracker(), machine.hooks_factory()()).unwrap();
            source.stop().unwrap();
            source.state().unwrap();
            let ram = machine.ram().info().clone();
            let (descriptor, offset) = source.hand_over(ram.id).unwrap();
            assert_eq!(offset, 0);
            source.relinquish().unwrap();
            let there = Block::file("ram", descriptor.into(), ram.pages * PAGE_SIZE).unwrap();
            let before = bytes_of(&there);
            assert!(before == bytes_of(machine.ram()), "{mode}");
            source.complete().unwrap();
            drop(source);
            drop(machine);
            assert!(before == bytes_of(&there), "{mode}");
        }
    }
}

/// No consumer can be while a device writes and reports nothing, so none is needed.
#[test]
fn nothing_is_logged_for_it() {
    let machine = started(&config(Backend::Model, Tracking::Bitmap));
    machine.tracker().attach_unlogged("nic").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control");
    let _service = Service::serve(machine.tracker(), &path, machine.hooks_factory()).unwrap();
    let attempt = |local| {
        let Attach::Ready(mut source) = ServiceClient::attach(&path, MigrationId([9; 16])).unwrap()
        else {
            panic!("in doubt")
        };
        let mut to = IncomingMachine::new().resume(Backend::Model, Tracking::Bitmap);
        migrate(&mut source, &mut to, local)
    };
    let report = attempt(false);
    assert_eq!(report.status, Status::Failed);
    assert!(report.reason.unwrap().contains("nic"));
    assert_eq!(attempt(true).status, Status::Completed);
}

#[test]
fn memory_is_handed_over_only_while_the_guest_is_stopped() {
    let machine = started(&config(Backend::Model, Tracking::Bitmap));
    let ram = machine.ram().id();
    let hooks = machine.hooks_factory();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control");
    let attempt = |source: &mut dyn Source, reason: &str| {
        let refused = |source: &mut dyn Source, step: &str| {
            let error = source.hand_over(ram).unwrap_err().to_string();
            assert!(error.contains(reason), "{step}: {error}");
        };
        refused(source, "running");
        source.stop().unwrap();
        assert!(source.hand_over(ram).is_ok());
        source.relinquish().unwrap();
        refused(source, "let go of");
        source.resume().unwrap();
        assert!(source.hand_over(ram).is_err());
    };
    let mut local = LocalSource::new(machine.tracker(), machine.hooks_factory()()).unwrap();
    attempt(&mut local, "not stopped");
    drop(local);
    let _service = Service::serve(machine.tracker(), &path, hooks).unwrap();
    let Attach::Ready(mut agent) = ServiceClient::attach(&path, MigrationId([9; 16])).unwrap()
    else {
        panic!("in doubt")
    };
    attempt(&mut agent, "out of order");
}

#[test]
fn a_destination_that_keeps_memory_or_runs_nothing_takes_none_over() {
    let dir = tempfile::tempdir().unwrap();
    let files = IncomingMachine::new()
        .resume(Backend::Model, Tracking::Bitmap)
        .ram_dir(dir.path().into());
    for (mut to, why) in [(files, "--ram-dir"), (IncomingMachine::new(), "--resume")] {
        let machine = started(&config(Backend::Model, Tracking::Bitmap));
        let mut source = LocalSource::new(machine.tracker(), machine.hooks_factory()()).unwrap();
        let report = migrate(&mut source, &mut to, true);
        assert_eq!(report.status, Status::Failed);
        assert!(report.reason.unwrap().contains(why));
        assert!(report.downtime_ms == 0.0, "it was not stopped for that");
        wait_for_writes(&machine, 1);
    }
}

#[test]
fn memory_in_a_file_that_can_shrink_stays_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let machine = started(&MachineConfig {
        ram_file: Some(dir.path().join("ram")),
        ..config(Backend::Model, Tracking::Bitmap)
    });
    let mut source = LocalSource::new(machine.tracker(), machine.hooks_factory()()).unwrap();
    let mut to = IncomingMachine::new().resume(Backend::Model, Tracking::Bitmap);
    let report = migrate(&mut source, &mut to, true);
    assert_eq!(report.status, Status::Failed);
    let reason = report.reason.unwrap();
    assert!(
        reason.contains("memory of block ram can't be taken over"),
        "{reason}"
    );
    wait_for_writes(&machine, 1);
}
