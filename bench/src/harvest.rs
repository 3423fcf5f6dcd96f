//! What a harvest costs a page, and how much of that is Gleaner's own.
//!
//! KVM's calls are made through a wrapper that keeps their time; what is left of a harvest is user space: reading rings,
//! shifting bitmaps into blocks, publishing into the store. The sources are driven as the tracker drives them, but without
//! its reaper, which would empty the rings in between.

use std::sync::Arc;
use std::time::Instant;

use gleaner::{PAGE_SIZE, Start, Tracking};
use gleaner_bitmap::{
    BlockInfo, DirtySource, DirtyStore, Harvester, Layout, PageRange, Scope, Slot, SlotKey,
};
use gleaner_ring::{BitmapSource, Kvm, Mode, RingSource, VcpuIdentity};

use crate::row::{Aim, Row};
use crate::sample::{Spread, ns, time};
use crate::timed::TimedKvm;
use crate::vm::{BareVm, MODES, RunningVcpu, SLOT, TrackedVm};
use crate::{Plan, Result};

/// Nanoseconds of user space an entry of a ring may cost.
const AIM_ENTRY_NS: f64 = 10.0;
/// Percent of KVM's own time that user space may add to a harvest of bitmaps.
const AIM_PERCENT: f64 = 10.0;
/// Percent that the tracker may add to what its sources take.
const AIM_TRACKER_PERCENT: f64 = 20.0;
/// Bytes of the slot.
const RAM: u64 = 1 << 30;

/// One harvest.
struct Harvested {
    pages: f64,
    total_ns: f64,
    kvm_ns: f64,
}

pub fn rows(plan: &Plan) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (mode, tracking) in MODES {
        for (label, pages) in [("16k", 16 << 10), ("131k", 131_072)] {
            let name = format!("harvest/{mode}/{label}");
            if plan.wants(&name) {
                rows.push(sources(name, tracking, pages, plan)?);
            }
        }
        let name = format!("harvest/{mode}/idle");
        if plan.wants(&name) {
            rows.push(idle(name, tracking, plan)?);
        }
    }
    Ok(rows)
}

/// Dirties `pages` pages again and again, and harvests them.
fn sources(name: String, tracking: Tracking, pages: u64, plan: &Plan) -> Result<Row> {
    let ring = matches!(tracking, Tracking::Ring { .. });
    // A ring takes 65,536 entries less a reserve, so many pages need several vCPUs. Each write dirties a data page; its
    // word of the table makes one page in 512 more.
    let vcpus = if ring { pages.div_ceil(50_000) } else { 1 };
    let batch = u32::try_from(pages / vcpus)?;
    let mut vm = BareVm::new(tracking, RAM, 0, usize::try_from(vcpus)?, batch)?;
    let kvm = TimedKvm::new(Arc::clone(&vm.kvm) as Arc<dyn Kvm>);
    let mut source: Box<dyn DirtySource> = match vm.mode {
        Mode::Ring { .. } => {
            let mut source = RingSource::new(Arc::clone(&kvm) as Arc<dyn Kvm>);
            for (id, ring) in (0..).zip(vm.rings()?) {
                // The descriptor tells vCPUs of one id apart; here each is met once.
                source.add(id, VcpuIdentity(id), || Ok(ring))?;
            }
            Box::new(source)
        }
        mode => Box::new(BitmapSource::new(
            Arc::clone(&kvm) as Arc<dyn Kvm>,
            mode == Mode::BitmapClear,
        )),
    };
    let layout = layout(&vm)?;
    let (mut harvester, store) = (Harvester::default(), Arc::new(DirtyStore::default()));
    for block in layout.blocks() {
        harvester.add_block(block.id, block.pages);
        store.add_block(block.id, block.pages);
    }
    let consumer = store.consumer(Start::Empty);
    let mut samples = Vec::new();
    for _ in 0..plan.pick(11, 2) {
        vm.run_for(1)?;
        kvm.take_ns();
        let (took, report) = time(|| {
            harvester.harvest(
                [&mut *source as &mut dyn DirtySource],
                &layout,
                Scope::All,
                &store,
            )
        });
        let found = report?.pages;
        if found < pages || consumer.dirty_pages() != found {
            return Err(format!(
                "{name}: {pages} pages were written, {found} harvested, {} published",
                consumer.dirty_pages()
            )
            .into());
        }
        if let Some(lease) = consumer.lease(u64::MAX) {
            lease.ack();
        }
        samples.push(Harvested {
            pages: found as f64,
            total_ns: ns(took),
            kvm_ns: kvm.take_ns(),
        });
    }
    samples.remove(0);
    let spread = |of: &dyn Fn(&Harvested) -> f64| Spread::of(samples.iter().map(of).collect());
    let user = spread(&|s| (s.total_ns - s.kvm_ns) / s.pages);
    let text = format!(
        "{:.1} ns a page, of which KVM {:.1} and user space {:.2}",
        spread(&|s| s.total_ns / s.pages).median,
        spread(&|s| s.kvm_ns / s.pages).median,
        user.median,
    );
    Ok(if ring {
        let text = format!("user space an entry; {text}");
        Row::new(name, Aim::AtMost(AIM_ENTRY_NS), user, "ns", text)
    } else {
        let share = spread(&|s| (s.total_ns - s.kvm_ns) / s.kvm_ns * 100.0);
        let text = format!("user space on top of KVM's calls; {text}");
        Row::new(name, Aim::AtMost(AIM_PERCENT), share, "%", text)
    })
}

/// The bare guest's slots, as a tracker would know them.
fn layout(vm: &BareVm) -> Result<Layout> {
    let info: &BlockInfo = vm.parts.ram.info();
    let mut editor = Layout::empty(u32::from(u16::MAX)).edit();
    editor.add_block(info.clone())?;
    let home = vm.parts.home();
    let low = PageRange::new(0, home.first);
    for (id, gpa, range) in [(0, 0, low), (SLOT, gleaner::vmm::guest::HOME, home)] {
        editor.create(Slot {
            key: id.into(),
            gpa,
            block: info.id,
            range,
            readonly: false,
        })?;
    }
    Ok(editor.finish()?)
}

/// What the tracker adds to its sources: a harvest that finds nothing, beside fetching the same logs by hand.
fn idle(name: String, tracking: Tracking, plan: &Plan) -> Result<Row> {
    let vm = TrackedVm::new(tracking, RAM, 4 << 20, 64)?;
    let vcpu = RunningVcpu::spawn(&vm)?;
    vcpu.run_for(8)?;
    vcpu.pause()?;
    vm.tracker.harvest()?;
    let bare = BareVm::new(tracking, RAM, 4 << 20, 1, 64)?;
    let mut rings = bare.rings()?;
    let slots = [
        (SlotKey::new(0), bare.parts.home().first),
        (SlotKey::new(SLOT), bare.parts.home().pages),
    ];
    let mut buffers = slots.map(|(key, pages)| (key, vec![0; pages.div_ceil(64) as usize]));
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    for _ in 0..plan.pick(2000, 5) {
        let (took, report) = time(|| vm.tracker.harvest());
        report?;
        ours.push(ns(took) / 1e3);
        let start = Instant::now();
        if rings.is_empty() {
            for (key, words) in &mut buffers {
                bare.kvm.get_dirty_log(*key, words)?;
            }
        } else {
            // Nothing was written, so nothing is to be reset.
            assert!(rings.iter_mut().all(|ring| ring.pop().is_none()), "idle");
        }
        theirs.push(ns(start.elapsed()) / 1e3);
    }
    let theirs = Spread::of(theirs).median;
    // Its write logs are read too, a word for 64 pages: what reading as many words takes comes on top.
    let words = (RAM / PAGE_SIZE / 64) as f64;
    let allowed = theirs * (1.0 + AIM_TRACKER_PERCENT / 100.0) + words / 1e3;
    Ok(Row::new(
        name,
        Aim::AtMost(allowed),
        Spread::of(ours),
        "us",
        format!(
            "a harvest of a clean guest of 1 GiB; fetching its logs by hand {theirs:.2} us, and 1 ns for each of \
             {words:.0} words of its write log"
        ),
    ))
}
