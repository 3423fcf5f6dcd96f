//! What the meter counts is what the guest has written, page by page.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use gleaner::migrate::Source;
use gleaner::rate::{Findings, Measurement, Meter};
use gleaner::vmm::churn::{ChurnConfig, Kind};
use gleaner::vmm::guest::{MemoryMap, Workload};
use gleaner::vmm::{Backend, Machine, MachineConfig};
use gleaner::{BlockId, LocalSource, PAGE_SIZE, Tracker, Tracking};

use crate::common::{MODES, Random, Watchdog, bytes_of, kvm, let_run, pages_apart};

const VCPUS: usize = 2;
/// Not a multiple of 64 pages, and more than the guest writes in a test.
const RAM: u64 = (48 << 20) + 37 * PAGE_SIZE;
/// A page is reported before its write: where the guest is stopped, each vCPU may be between the two.
const EDGE: u64 = VCPUS as u64;

/// A machine whose guest is still stopped.
fn machine(tracking: Tracking, churn: bool) -> Machine {
    let churn = churn.then(|| ChurnConfig {
        rate: Some(300.0),
        kinds: Kind::ALL.to_vec(),
        seed: 11,
    });
    Machine::new(&MachineConfig {
        backend: Backend::Kvm,
        ram: RAM,
        vcpus: VCPUS,
        ram_file: None,
        tracking,
        workload: Workload::Random,
        write_rate: Some(20_000),
        churn,
        seed: 5,
    })
    .unwrap()
}

/// Tells a thread that it is over, also when a comparison has failed.
struct Ended<'a>(&'a AtomicBool);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The memory of all blocks, which nobody writes now.
type Snapshot = BTreeMap<BlockId, Vec<u8>>;

fn snapshot(tracker: &Tracker) -> Snapshot {
    let layout = tracker.layout();
    let block = |id| tracker.block(id).unwrap();
    let blocks = layout.blocks().map(|b| (b.id, bytes_of(&block(b.id))));
    blocks.collect()
}

/// Pages of the blocks there are now that are not what they were. A block that is new was all zeros.
fn changed(before: &Snapshot, now: &Snapshot) -> BTreeSet<(BlockId, u64)> {
    let of = |(id, bytes): (&BlockId, &Vec<u8>)| {
        let zeros = vec![0; bytes.len()];
        let pages = pages_apart(before.get(id).unwrap_or(&zeros), bytes);
        let id = *id;
        pages.into_iter().map(move |page| (id, page))
    };
    now.iter().flat_map(of).collect()
}

/// The guest's own count for each data page of its RAM: how often it has written it.
fn own_count(ram: &[u8]) -> BTreeMap<u64, u64> {
    let map = MemoryMap::new(RAM, VCPUS).unwrap();
    let word = |at: usize| u64::from_le_bytes(ram[at..at + 8].try_into().unwrap());
    let of_vcpu = |vcpu: usize| {
        let pages = map.vcpu(vcpu).unwrap();
        let table = usize::try_from(pages.table.first * PAGE_SIZE).unwrap();
        let words = (0..).step_by(8).map(move |at| word(table + at));
        (pages.data.first..pages.data.end()).zip(words)
    };
    (0..VCPUS).flat_map(of_vcpu).collect()
}

/// Lets the guest write, stops it, and compares, some times over.
fn compare(what: &str, machine: &mut Machine) {
    let _watchdog = Watchdog::new("a guest is metered");
    let tracker = machine.tracker().clone();
    let ram = machine.ram().id();
    let mut meter = Meter::new(&tracker).unwrap();
    let mut measured = Measurement::new(Duration::from_millis(100));
    let mut random = Random(9);
    let (mut seen, mut excess) = (BTreeSet::new(), 0);
    let first = snapshot(&tracker);
    let mut before = first.clone();
    for phase in 0..4 {
        let writes = machine.guest_writes().unwrap();
        machine.start();
        let mut written = BTreeSet::new();
        let mut gone = BTreeSet::new();
        let mut look = |meter: &mut Meter| {
            let look = meter.look().unwrap();
            for extent in &look.written {
                written.extend((extent.range.first..extent.range.end()).map(|p| (extent.block, p)));
            }
            gone.extend(look.gone.iter().copied());
            measured.add(&look).unwrap();
        };
        while machine.guest_writes().unwrap() < writes + 2500 {
            let_run(&mut random, 20_000);
            look(&mut meter);
        }
        let stopped = tracker.stop(|| Ok(())).unwrap();
        look(&mut meter);
        let now = snapshot(&tracker);
        written.retain(|(block, _)| now.contains_key(block));

        let truth = changed(&before, &now);
        let missed: Vec<_> = truth.difference(&written).collect();
        assert!(
            missed.is_empty(),
            "{what}, phase {phase}: missed {missed:?}"
        );
        let mut more: Vec<_> = written.difference(&truth).collect();
        if phase == 0 {
            // With the log switched on KVM maps memory anew, and may report what is only read then: the guest's code.
            let low = MemoryMap::new(RAM, VCPUS).unwrap().low();
            more.retain(|(block, page)| *block != ram || *page >= low.end());
        }
        assert!(
            more.len() as u64 <= EDGE,
            "{what}, phase {phase}: not written {more:?}"
        );
        excess += more.len() as u64;

        // And what the guest itself says.
        let counts = [&before, &now].map(|snapshot| own_count(&snapshot[&ram]));
        let own = counts[1]
            .iter()
            .filter(|(page, count)| counts[0][page] != **count);
        let own: BTreeSet<u64> = own.map(|(page, _)| *page).collect();
        let data = |page: &u64| counts[0].contains_key(page);
        let metered: BTreeSet<u64> = written.iter().filter(|w| w.0 == ram).map(|w| w.1).collect();
        let metered: BTreeSet<u64> = metered.into_iter().filter(data).collect();
        assert!(
            own.len() > 1000,
            "{what}: the guest wrote {} pages",
            own.len()
        );
        let apart = own.symmetric_difference(&metered).count() as u64;
        assert!(
            apart <= EDGE,
            "{what}, phase {phase}: {apart} pages apart from the guest's count"
        );

        seen.extend(written.iter().copied());
        before = now;
        drop(stopped);
    }
    let report = measured.report();
    let of_ram = report.blocks.iter().find(|b| b.name == "ram").unwrap();
    let seen = seen.iter().filter(|(block, _)| *block == ram).count() as u64;
    assert_eq!(of_ram.unique_pages, seen, "{what}");
    let all = pages_apart(&first[&ram], &before[&ram]).len() as u64;
    assert!(
        (all..=all + excess + 1).contains(&seen),
        "{what}: {seen} pages, {all} changed"
    );
    assert_eq!(report.unique_pages_interval95, [report.unique_pages; 2]);
}

#[test]
fn the_count_is_the_guests_own_in_every_mode() {
    if !kvm() {
        return;
    }
    for (mode, tracking) in MODES {
        compare(mode, &mut machine(tracking, false));
    }
}

#[test]
fn the_count_is_the_guests_own_amid_a_migration_and_slot_transactions() {
    if !kvm() {
        return;
    }
    for (mode, tracking) in MODES {
        let mut machine = machine(tracking, true);
        let hooks = machine.hooks_factory()();
        let mut migration = LocalSource::new(machine.tracker(), hooks).unwrap();
        let over = AtomicBool::new(false);
        let (mut leased, transactions) = (0, machine.tracker().transactions());
        std::thread::scope(|scope| {
            let rounds = scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    migration.harvest().unwrap();
                    while let Some(lease) = migration.lease(512).unwrap() {
                        leased += lease.parts.len();
                        migration.ack(lease.id).unwrap();
                    }
                }
            });
            let ended = Ended(&over);
            compare(mode, &mut machine);
            drop(ended);
            rounds.join().unwrap();
        });
        assert!(
            leased > 1000,
            "{mode}: the migration leased {leased} extents"
        );
        let transactions = machine.tracker().transactions() - transactions;
        assert!(transactions > 20, "{mode}: {transactions} transactions");
    }
}

#[test]
fn the_rings_tell_what_each_vcpu_has_dirtied() {
    if !kvm() {
        return;
    }
    let mut machine = machine(Tracking::RING, false);
    let tracker = machine.tracker().clone();
    let map = MemoryMap::new(RAM, VCPUS).unwrap();
    let mut meter = Meter::new(&tracker).unwrap();
    machine.start();
    let (mut random, mut looks) = (Random(3), 0);
    let mut seen = [0; VCPUS];
    loop {
        let_run(&mut random, 20_000);
        let stopped = tracker.stop(|| Ok(())).unwrap();
        let look = meter.look().unwrap();
        looks += 1;
        for (vcpu, seen) in seen.iter_mut().enumerate() {
            let pages = map.vcpu(vcpu).unwrap();
            let own = [
                pages.table,
                pages.data,
                gleaner::PageRange::new(pages.control, 1),
            ];
            let extents = look.written.iter().map(|extent| extent.range);
            let pages =
                extents.flat_map(|e| own.map(|own| own.intersect(&e).map_or(0, |r| r.pages)));
            *seen += pages.sum::<u64>();
        }
        drop(stopped);
        if machine.guest_writes().unwrap() > 5000 {
            let vcpus: Vec<u64> = look.vcpus.iter().map(|v| v.0).collect();
            assert_eq!(vcpus, [0, 1]);
            for ((vcpu, dirtied), seen) in look.vcpus.iter().zip(seen) {
                assert!(seen > 1000, "vCPU {vcpu} wrote {seen} pages");
                // KVM may enter a page more than once, and at each edge before a write that is still to come.
                let most = seen + seen / 10 + looks;
                assert!(
                    (seen..=most).contains(dirtied),
                    "vCPU {vcpu}: {dirtied} dirtied, {seen} seen"
                );
            }
            return;
        }
    }
}
