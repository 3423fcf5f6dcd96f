//! Dirty rings: what an entry costs, whatever the guest's size, and the reaper that empties them.
//!
//! Rings of large guests are those of the model of KVM, filled by its vCPU and emptied by the source that empties the real
//! ones; what the model's calls take is left out, as KVM's is elsewhere. The reaper is that of a tracker with a real guest.

use std::hint::black_box;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use gleaner::model::{Access, ModelConfig, ModelKvm};
use gleaner::{PAGE_SIZE, Start, Tracking};
use gleaner_bitmap::{
    BlockId, BlockInfo, Consumer, DirtySource, DirtyStore, Harvester, Layout, PageRange, Scope,
    Slot,
};
use gleaner_ring::{HostRange, Kvm, Mode, Region, RingSource, Vcpu as _, model::StepVcpu};

use crate::kernels::random;
use crate::row::{Aim, Row};
use crate::sample::{Spread, median, ns, ratios, time, turn_about};
use crate::timed::TimedKvm;
use crate::vm::{RunningVcpu, TrackedVm};
use crate::{Plan, Result};

/// Nanoseconds of user space that an entry may cost, from the ring into the store.
const AIM_ENTRY_NS: f64 = 10.0;
/// Times as long as in a guest of 1 TiB that a harvest of 12 TiB may take: 5 %.
const AIM_SIZE: f64 = 1.05;
/// Percent of a core that the reaper of an idle guest may take.
const AIM_IDLE_PERCENT: f64 = 0.1;

const BLOCK: BlockId = BlockId(0);
const TIB: u64 = 1 << 28;
const RING_BYTES: u32 = 1 << 20;
/// Entries that a vCPU fills before it is harvested.
const ENTRIES: u64 = 60_000;
/// Pages one after the other, before the vCPU goes on elsewhere.
const RUN: u64 = 1000;
/// Memory that guests of any size write to where locality is to be equal: 256 GiB.
const SPAN: u64 = TIB / 4;

/// A large guest on the model, with one vCPU.
struct Guest {
    pages: u64,
    model: ModelKvm,
    kvm: Arc<TimedKvm>,
    vcpu: StepVcpu,
    source: RingSource,
    layout: Layout,
    harvester: Harvester,
    store: Arc<DirtyStore>,
    consumer: Consumer,
    state: u64,
}

impl Guest {
    fn new(pages: u64) -> Result<Self> {
        let model = ModelKvm::new(ModelConfig::default());
        let kvm = TimedKvm::new(Arc::new(model.clone()));
        kvm.enable(Mode::Ring { bytes: RING_BYTES })?;
        let vcpu = model.step_vcpu()?;
        let mut source = RingSource::new(Arc::clone(&kvm) as Arc<dyn Kvm>);
        source.add(0, vcpu.identity(), || vcpu.ring(0, RING_BYTES))?;
        let slot = Slot {
            key: 0.into(),
            gpa: 0,
            block: BLOCK,
            range: PageRange::new(0, pages),
            readonly: false,
        };
        kvm.set_region(
            "create",
            &Region {
                key: slot.key,
                gpa: slot.gpa,
                host: nowhere(pages * PAGE_SIZE),
                log: true,
                readonly: false,
            },
        )?;
        let mut editor = Layout::empty(1).edit();
        editor.add_block(BlockInfo::new(BLOCK, "ram", pages * PAGE_SIZE)?)?;
        editor.create(slot)?;
        let (store, mut harvester) = (Arc::<DirtyStore>::default(), Harvester::default());
        store.add_block(BLOCK, pages);
        harvester.add_block(BLOCK, pages);
        Ok(Self {
            pages,
            kvm,
            model,
            vcpu,
            source,
            layout: editor.finish()?,
            harvester,
            consumer: store.consumer(Start::Empty),
            store,
            state: 0x9e37_79b9_7f4a_7c15,
        })
    }

    /// All of its memory.
    const fn all(&self) -> PageRange {
        PageRange::new(0, self.pages)
    }

    /// As much of it as of any other guest, in its middle.
    const fn span(&self) -> PageRange {
        PageRange::new(self.pages / 2, SPAN)
    }

    /// Dirties pages in runs of `run`, each at random somewhere within a range, and harvests them. Nanoseconds of user space,
    /// and entries.
    fn turn(&mut self, run: u64, within: PageRange) -> Result<(f64, u64)> {
        let mut entries = 0;
        {
            let mut model = self.model.state();
            if !model.enter(self.vcpu.index()) {
                return Err("a ring that was harvested is full".into());
            }
            for _ in 0..ENTRIES / run {
                let first = within.first + random(&mut self.state) % (within.pages / run) * run;
                for page in first..first + run {
                    if model
                        .peek(page * PAGE_SIZE)
                        .is_some_and(|(_, logged)| logged)
                    {
                        continue; // dirty already
                    }
                    if model.touch(self.vcpu.index(), page * PAGE_SIZE) != Access::Done(0) {
                        return Err("the model's vCPU could not write".into());
                    }
                    entries += 1;
                }
            }
            model.leave(self.vcpu.index());
        }
        self.kvm.take_ns();
        let sources = [&mut self.source as &mut dyn DirtySource];
        let (took, report) = time(|| {
            self.harvester
                .harvest(sources, &self.layout, Scope::All, &self.store)
        });
        let user = ns(took) - self.kvm.take_ns();
        let lease = self.consumer.lease(u64::MAX).ok_or("nothing is dirty")?;
        let (found, leased) = (report?.pages, lease.pages());
        lease.ack();
        if found != entries || leased != entries {
            return Err(format!("{entries} entries, {found} harvested, {leased} leased").into());
        }
        Ok((user, entries))
    }
}

/// Host memory that nobody ever touches.
#[allow(unsafe_code)] // it is told of by its address alone
fn nowhere(bytes: u64) -> HostRange {
    // SAFETY: the model's vCPU has only the faults of its stores here, and never comes to store; nobody else knows of it.
    unsafe { HostRange::new(1 << 46, bytes, Arc::new(())) }
}

pub fn rows(plan: &Plan) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (name, run) in [("ring/entry/1T", RUN), ("ring/random/1T", 1)] {
        if plan.wants(name) {
            rows.push(entry(name, run, plan)?);
        }
    }
    if plan.wants("ring/size") {
        rows.push(size("ring/size", plan)?);
    }
    if let Err(error) = kvm_ioctls::Kvm::new() {
        eprintln!("gleaner-bench: ring/reaper skipped: /dev/kvm: {error}");
        return Ok(rows);
    }
    for vcpus in [1, 2] {
        let name = format!("ring/reaper/full-exits-{vcpus}");
        if plan.wants(&name) {
            rows.push(full_exits(name, vcpus, plan)?);
        }
    }
    if plan.wants("ring/reaper/idle-cpu") {
        rows.push(idle_cpu("ring/reaper/idle-cpu", plan)?);
    }
    Ok(rows)
}

/// A slot as QEMU knows it: its length, and a bitmap.
struct QemuSlot {
    pages: u64,
    bitmap: Vec<u64>,
}

/// QEMU's way with an entry, restated: the slot is looked up and both numbers are checked for each entry by itself, and its
/// bit is set in the slot's bitmap, all of it under the lock of the slots. That the bitmap goes into another one later is
/// not counted.
fn qemu(slots: &Mutex<Vec<QemuSlot>>, entries: &[(u32, u64)]) -> usize {
    let mut slots = slots.lock().unwrap_or_else(PoisonError::into_inner);
    let mark = |&&(slot, page): &&(u32, u64)| {
        let (space, id) = (slot >> 16, (slot & 0xffff) as usize);
        let Some(slot) = slots.get_mut(id).filter(|_| space == 0) else {
            return false;
        };
        if page >= slot.pages {
            return false;
        }
        slot.bitmap[(page / 64) as usize] |= 1 << (page % 64);
        true
    };
    entries.iter().filter(mark).count()
}

/// An entry's way from the ring into the store.
fn entry(name: &str, run: u64, plan: &Plan) -> Result<Row> {
    let mut guest = Guest::new(TIB)?;
    let slots = Mutex::new(vec![QemuSlot {
        pages: TIB,
        bitmap: vec![0; (TIB / 64) as usize],
    }]);
    let mut state = 0x9e37_79b9_7f4a_7c15;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..=plan.pick(21, 2) {
        let (user, entries) = guest.turn(run, guest.all())?;
        ours.push(user / entries as f64);
        let runs = (0..ENTRIES / run).flat_map(|_| {
            let first = random(&mut state) % (TIB / run) * run;
            (first..first + run).map(|page| (0, page))
        });
        let entries: Vec<(u32, u64)> = runs.collect();
        let (took, marked) = time(|| qemu(black_box(&slots), &entries));
        if marked != entries.len() {
            return Err(format!("{name}: {marked} entries were marked").into());
        }
        theirs.push(ns(took) / marked as f64);
    }
    let text = format!(
        "user space an entry, checked, from the ring into the store of a guest of 1 TiB, {}; QEMU's way restated, from an \
         array into a bitmap, {:.1} ns",
        if run == 1 {
            "each page at random: its bit, its chunk and its place in the store are in no cache"
        } else {
            "1000 pages in a row and then elsewhere"
        },
        Spread::of(theirs.split_off(1)).median
    );
    Ok(Row::new(
        name,
        Aim::AtMost(AIM_ENTRY_NS),
        Spread::of(ours.split_off(1)),
        "ns",
        text,
    ))
}

/// As many pages dirty, and as near to each other, in guests of 1 and of 12 TiB.
fn size(name: &str, plan: &Plan) -> Result<Row> {
    let (mut small, mut large) = (Guest::new(TIB)?, Guest::new(12 * TIB)?);
    let turn = |guest: &mut Guest, within: fn(&Guest) -> PageRange| {
        let (user, entries) = guest.turn(RUN, within(guest))?;
        Ok::<_, crate::Error>(Duration::from_secs_f64(
            user * ENTRIES as f64 / entries as f64 / 1e9,
        ))
    };
    let mut both = |within: fn(&Guest) -> PageRange| {
        turn_about(
            plan.pick(101, 2),
            || turn(&mut large, within),
            || turn(&mut small, within),
        )
    };
    let (pairs, spread) = (both(Guest::span)?, both(Guest::all)?);
    let each = |times: &mut dyn Iterator<Item = Duration>| median(times) * 1e9 / ENTRIES as f64;
    let told = |pairs: &[(Duration, Duration)]| {
        let larger = each(&mut pairs.iter().map(|p| p.0));
        format!(
            "{larger:.2} and {:.2}",
            each(&mut pairs.iter().map(|p| p.1))
        )
    };
    let text = format!(
        "user space an entry in guests of 12 and of 1 TiB {} ns: 60,000 entries, 1000 pages in a row, somewhere in 256 GiB; \
         somewhere in all memory {} ns: no cache holds a bitmap of 12 TiB",
        told(&pairs),
        told(&spread)
    );
    Ok(Row::new(
        name,
        Aim::AtMost(AIM_SIZE),
        ratios(&pairs),
        "times",
        text,
    ))
}

/// Bytes of the slot of a real guest.
const RAM: u64 = 1 << 30;
/// Writes after which the guest leaves.
const BATCH: u32 = 4096;

/// vCPUs that write to one page after the other as fast as they can: how often one of them finds its ring full.
fn full_exits(name: String, vcpus: usize, plan: &Plan) -> Result<Row> {
    let vm = TrackedVm::with_vcpus(Tracking::RING, RAM, 0, vcpus, BATCH)?;
    let all: Vec<RunningVcpu> = (0..vcpus)
        .map(|index| RunningVcpu::spawn_nth(&vm, index))
        .collect::<Result<_>>()?;
    // Once over all memory, which is touched for the first time then.
    let once = RAM / PAGE_SIZE / u64::from(BATCH) + 1;
    all.iter().try_for_each(|vcpu| vcpu.run_for(once))?;
    let second = Duration::from_millis(plan.pick(1000, 20) as u64);
    let mut exits = Vec::new();
    let mut rates = Vec::new();
    for _ in 0..plan.pick(5, 1) {
        let (full, before) = (vm.tracker.ring_full_exits(), batches(&all));
        let (took, ()) = time(|| std::thread::sleep(second));
        exits.push((vm.tracker.ring_full_exits() - full) as f64);
        let writes = (batches(&all) - before) * u64::from(BATCH);
        rates.push(writes as f64 / took.as_secs_f64());
    }
    all.iter().try_for_each(RunningVcpu::pause)?;
    let text = format!(
        "times in a second that a ring was full; {vcpus} vCPUs write {:.0} pages a second on {} cores, with a reaper",
        Spread::of(rates).median,
        std::thread::available_parallelism()?,
    );
    Ok(Row::new(
        name,
        Aim::AtMost(0.0),
        Spread::of(exits),
        "exits",
        text,
    ))
}

fn batches(vcpus: &[RunningVcpu]) -> u64 {
    vcpus.iter().map(RunningVcpu::batches).sum()
}

/// What the reaper takes while the guest does nothing.
fn idle_cpu(name: &str, plan: &Plan) -> Result<Row> {
    let vm = TrackedVm::new(Tracking::RING, RAM, 4 << 20, 64)?;
    let vcpu = RunningVcpu::spawn(&vm)?;
    vcpu.run_for(8)?;
    vcpu.pause()?;
    let mut shares = Vec::new();
    for _ in 0..plan.pick(6, 2) {
        let before = reaper_ns()?;
        let (took, ()) =
            time(|| std::thread::sleep(Duration::from_millis(plan.pick(2000, 20) as u64)));
        shares.push((reaper_ns()? - before) / ns(took) * 100.0);
    }
    Ok(Row::new(
        name,
        Aim::AtMost(AIM_IDLE_PERCENT),
        Spread::of(shares.split_off(1)),
        "%",
        "of a core, by the reaper's thread, while a guest in ring mode does nothing",
    ))
}

/// Nanoseconds that the reapers of this process have run.
fn reaper_ns() -> Result<f64> {
    let mut total = None;
    for task in std::fs::read_dir("/proc/self/task")? {
        let task = task?.path();
        if std::fs::read_to_string(task.join("comm"))?.trim() == "gleaner-reaper" {
            let stat = std::fs::read_to_string(task.join("schedstat"))?;
            let ran = stat.split(' ').next().ok_or("no time of a thread")?;
            *total.get_or_insert(0.0) += ran.parse::<f64>()?;
        }
    }
    total.ok_or_else(|| "no reaper runs".into())
}
