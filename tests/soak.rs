//! Whole migrations of a real guest, one after the other, each from where the last one arrived: every page of every block is
//! compared at each hop, and in the end the guest checks itself.
//!
//! `GLEANER_LONG=1 cargo test --release --test soak` makes 1,000 of them.

#![allow(clippy::unwrap_used, clippy::cast_precision_loss)] // helpers of tests; figures for people

mod common;

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use common::{MODES, bytes_of, kvm};
use gleaner::migrate::{
    MigrationId, Receiver, ReceiverOptions, Report, Sender, SenderOptions, Status, Stream,
};
use gleaner::vmm::churn::{ChurnConfig, Kind};
use gleaner::vmm::guest::Workload;
use gleaner::vmm::{Backend, IncomingMachine, Machine, MachineConfig};
use gleaner::{Block, LocalSource, PAGE_SIZE, Tracker, Tracking};
use gleaner_bitmap::mutant::{self, Mutant};

/// Bytes of the guest's RAM.
const RAM: u64 = 8 << 20;
/// Slot transactions a second.
const CHURN: f64 = 200.0;

/// Of those, so many happen in each migration at least.
const MEANWHILE: u64 = 20;

/// How long either end may be silent: with other work on its cores, a machine like that of CI is slow.
const PATIENCE: Duration = Duration::from_secs(300);

/// Migrations in all.
fn hops() -> usize {
    if std::env::var_os("GLEANER_LONG").is_some() {
        1000
    } else {
        30
    }
}

/// What the hops of a mode came to.
#[derive(Default)]
struct Sum {
    hops: usize,
    rounds: u64,
    pages: u64,
    compared: u64,
    downtimes: Vec<f64>,
    kinds: BTreeMap<Kind, u64>,
}

/// Compares all blocks of the stopped source with the destination, which does not run yet; pages compared.
fn compare(source: &Tracker, arrived: &BTreeMap<String, Block>) -> Result<u64, String> {
    let layout = source.layout();
    let names = |names: &mut dyn Iterator<Item = String>| {
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    };
    let here = names(&mut layout.blocks().map(|info| info.name.clone()));
    let there = names(&mut arrived.keys().cloned());
    if here != there {
        return Err(format!("blocks {here:?} arrived as {there:?}"));
    }
    let mut compared = 0;
    for info in layout.blocks() {
        let here = bytes_of(&source.block(info.id).unwrap());
        let there = bytes_of(&arrived[&info.name]);
        if here.len() != there.len() {
            return Err(format!("{} has another length", info.name));
        }
        let page = usize::try_from(PAGE_SIZE).unwrap();
        let pages = here.chunks(page).zip(there.chunks(page)).enumerate();
        let differing: Vec<_> = pages.filter(|(_, (a, b))| a != b).map(|p| p.0).collect();
        if !differing.is_empty() {
            return Err(format!("{}: pages {differing:?} differ", info.name));
        }
        compared += info.pages;
    }
    Ok(compared)
}

/// One migration to a machine of its own, which runs then; and the pages that were compared.
fn hop(source: &Machine, tracking: Tracking) -> (Report, Option<Machine>, u64) {
    let (near, far) = UnixStream::pair().unwrap();
    let (told, compared) = channel();
    let tracker = source.tracker().clone();
    let mut destination = IncomingMachine::new()
        .resume(Backend::Kvm, tracking)
        .on_complete(Box::new(move |arrived| {
            let pages = compare(&tracker, arrived)?;
            told.send(pages).map_err(|e| e.to_string())
        }));
    let report = std::thread::scope(|scope| {
        let options = ReceiverOptions {
            io_timeout: PATIENCE,
            ..ReceiverOptions::default()
        };
        scope.spawn(|| Receiver::new(&mut destination, options).run(Stream::from(far)));
        let mut local = LocalSource::new(source.tracker(), source.hooks_factory()()).unwrap();
        let mut options = SenderOptions::new(MigrationId::random().unwrap());
        options.io_timeout = PATIENCE;
        let (tracker, before) = (source.tracker().clone(), source.tracker().transactions());
        options.hold = Some(Box::new(move || {
            tracker.transactions() - before >= MEANWHILE
        }));
        Sender::new(&mut local, options).run(Stream::from(near))
    });
    let compared = compared.try_recv().unwrap_or_default();
    (report, destination.take_machine(), compared)
}

fn start(tracking: Tracking, workload: Workload, seed: u64) -> Machine {
    let config = MachineConfig {
        backend: Backend::Kvm,
        ram: RAM,
        vcpus: 2,
        ram_file: None,
        tracking,
        workload,
        write_rate: None,
        churn: Some(ChurnConfig {
            rate: Some(CHURN),
            kinds: Kind::ALL.to_vec(),
            seed,
        }),
        seed,
    };
    let mut machine = Machine::new(&config).unwrap();
    machine.start();
    machine
}

fn soak(tracking: Tracking, workload: Workload, hops: usize, seed: u64) -> Sum {
    let mut machine = start(tracking, workload, seed);
    let mut sum = Sum::default();
    while sum.hops < hops {
        let (report, arrived, compared) = hop(&machine, tracking);
        assert_eq!(report.status, Status::Completed, "{:?}", report.reason);
        for (kind, n) in machine.churn_counts().kinds {
            *sum.kinds.entry(kind).or_default() += n;
        }
        sum.hops += 1;
        sum.rounds += u64::from(report.rounds);
        sum.pages += report.pages_sent;
        sum.compared += compared;
        sum.downtimes.push(report.downtime_ms);
        machine = arrived.unwrap();
    }
    let check = machine.check(Duration::from_secs(60)).unwrap();
    assert!(check.is_ok(), "the guest's own check: {check}");
    sum
}

/// Held by the test that runs: two guests that write as fast as they can are as many as two cores bear.
static ALONE: Mutex<()> = Mutex::new(());

/// Said even when the test passes.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

#[test]
fn no_page_differs_after_any_of_many_migrations_in_any_mode() {
    if !kvm() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (start, mut hopped) = (Instant::now(), 0);
    let workloads = [Workload::Random, Workload::Sweep, Workload::Hot(1 << 20)];
    for (n, (name, tracking)) in MODES.into_iter().enumerate() {
        // What 3 does not divide goes to the last one.
        let hops = (hops() * (n + 1)) / MODES.len() - hopped;
        let began = Instant::now();
        let mut sum = soak(tracking, workloads[n], hops, 11 + n as u64);
        hopped += sum.hops;
        sum.downtimes.sort_by(f64::total_cmp);
        let kinds: Vec<_> = sum.kinds.iter().map(|(k, n)| format!("{k} {n}")).collect();
        say(&format!(
            "{name}: {} migrations in {:.1} s, {} rounds, {} pages sent, {} pages compared, 0 differing; downtime median {:.1} ms, \
             most {:.1} ms; slot transactions: {}",
            sum.hops,
            began.elapsed().as_secs_f64(),
            sum.rounds,
            sum.pages,
            sum.compared,
            sum.downtimes[sum.downtimes.len() / 2],
            sum.downtimes[sum.downtimes.len() - 1],
            kinds.join(", ")
        ));
        assert!(
            kinds.len() == Kind::ALL.len(),
            "a kind never happened: {kinds:?}"
        );
    }
    say(&format!(
        "{hopped} migrations, every page of every block the same, in {:.0} s",
        start.elapsed().as_secs_f64()
    ));
    assert_eq!(hopped, hops());
}

/// What the comparison is worth: a bug that loses pages does not get through many hops. (With rings it takes more: an entry
/// that is read late does no harm until its slot id means something else.)
#[test]
fn a_harvest_left_out_is_found() {
    if !kvm() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let _planted = mutant::plant(Mutant::HarvestLeftOut);
    for (name, tracking) in &MODES[..2] {
        let mut machine = start(*tracking, Workload::Random, 5);
        let found = (1..=200).find(|_| {
            let (report, arrived, _) = hop(&machine, *tracking);
            match arrived {
                Some(arrived) => machine = arrived,
                None => assert!(report.reason.as_ref().unwrap().contains("differ")),
            }
            report.status == Status::Failed
        });
        assert!(found.is_some(), "{name}");
    }
}
