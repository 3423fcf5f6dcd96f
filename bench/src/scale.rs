//! What a large guest costs: memory for each page, a nearly clean harvest of 12 TiB, one slot among 32,000.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use gleaner::{Block, PAGE_SIZE, Start, Tracker, Tracking};
use gleaner_bitmap::{
    BlockId, BlockInfo, Collected, DirtySource, DirtyStore, Harvester, Layout, PageRange, Rearm,
    Runs, Scope, Slot,
};
use gleaner_ring::StockKvm;
use vm_memory::GuestAddress;

use crate::kernels::random;
use crate::row::{Aim, Row};
use crate::sample::{Spread, median, ratios, time, turn_about};
use crate::timed::TimedKvm;
use crate::{Plan, Result};

/// Bits a page that a consumer may take where every other page is dirty: one, and a tenth for what finds it.
const AIM_HALF_BITS: f64 = 1.1;
/// And where all pages are dirty: nothing to speak of.
const AIM_ALL_BITS: f64 = 0.1;
/// Times faster than a scan of all words that a nearly clean harvest is to be.
const AIM_NEARLY_CLEAN: f64 = 10.0;
/// Times as long as among 32 slots that anything may take among 32,000. The logarithm grows three times, and what is in no
/// cache comes on top; a search one by one would take a thousand times as long.
const AIM_SLOTS: f64 = 8.0;

const BLOCK: BlockId = BlockId(0);
const TIB: u64 = 1 << 28;
/// Pages that are dirty in a guest that is nearly clean.
const FEW: u64 = 1000;
/// Slots of a small and of a large layout.
const SLOTS: [u16; 2] = [32, 32_000];

/// Reports the same pages again and again.
enum Dirty {
    /// Every other one of so many.
    Half(u64),
    /// These.
    Pages(Vec<u64>),
}

impl DirtySource for Dirty {
    fn name(&self) -> String {
        "benchmark".into()
    }

    fn collect(
        &mut self,
        _: &Layout,
        _: Scope<'_>,
        into: &mut Collected,
    ) -> gleaner_bitmap::Result<()> {
        match self {
            Self::Half(pages) => (0..*pages).step_by(1 << 18).try_for_each(|first| {
                let part = PageRange::new(first, (*pages - first).min(1 << 18));
                into.or_block(BLOCK, part, &[0x5555_5555_5555_5555; 1 << 12])
            }),
            Self::Pages(pages) => into.mark_pages(BLOCK, pages),
        }
    }

    fn rearm(&mut self) -> gleaner_bitmap::Result<Rearm> {
        Ok(Rearm::Complete)
    }
}

/// A store of one block, and what fills it.
struct Books {
    store: Arc<DirtyStore>,
    harvester: Harvester,
    layout: Layout,
}

impl Books {
    fn new(pages: u64) -> Self {
        let (store, mut harvester) = (Arc::<DirtyStore>::default(), Harvester::default());
        store.add_block(BLOCK, pages);
        harvester.add_block(BLOCK, pages);
        Self {
            store,
            harvester,
            layout: Layout::empty(1),
        }
    }

    fn harvest(&mut self, dirty: &mut Dirty) -> Result<u64> {
        let sources = [dirty as &mut dyn DirtySource];
        let report = self
            .harvester
            .harvest(sources, &self.layout, Scope::All, &self.store)?;
        Ok(report.pages)
    }
}

type Topic = (&'static str, fn(&str, &Plan) -> Result<Row>);

pub fn rows(plan: &Plan) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let topics: [Topic; 5] = [
        ("scale/memory/half-dirty", half_dirty),
        ("scale/memory/all-dirty", all_dirty),
        ("scale/nearly-clean", nearly_clean),
        ("scale/lookup", lookup),
        ("scale/transaction", transaction),
    ];
    for (name, measure) in topics {
        if !plan.wants(name) {
            continue;
        }
        if let ("scale/transaction", Err(error)) = (name, kvm_ioctls::Kvm::new()) {
            eprintln!("gleaner-bench: {name} skipped: /dev/kvm: {error}");
            continue;
        }
        rows.push(measure(name, plan)?);
    }
    Ok(rows)
}

/// Resident memory of this process in bits.
fn resident_bits() -> Result<f64> {
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages = statm.split(' ').nth(1).ok_or("no resident memory")?;
    Ok(pages.parse::<f64>()? * PAGE_SIZE as f64 * 8.0)
}

const fn once(value: f64) -> Spread {
    Spread {
        low: value,
        median: value,
        high: value,
    }
}

fn half_dirty(name: &str, plan: &Plan) -> Result<Row> {
    let pages = if plan.short { TIB / 64 } else { TIB };
    let mut at = resident_bits()?;
    let mut grown = || -> Result<f64> {
        let now = resident_bits()?;
        Ok((now - std::mem::replace(&mut at, now)) / pages as f64)
    };
    let mut books = Books::new(pages);
    let harvest = |books: &mut Books| {
        let found = books.harvest(&mut Dirty::Half(pages))?;
        if found == pages / 2 {
            Ok(())
        } else {
            Err(crate::Error::from(format!(
                "{found} pages of {pages} are every other one"
            )))
        }
    };
    harvest(&mut books)?;
    let harvester = grown()?;
    let consumer = books.store.consumer(Start::Empty);
    harvest(&mut books)?;
    let dirty = grown()?;
    let lease = consumer.lease(pages / 64).ok_or("nothing is dirty")?;
    if lease.pages() != pages / 64 || consumer.dirty_pages() != pages / 2 - pages / 64 {
        return Err(format!("{name}: {} pages are on lease", lease.pages()).into());
    }
    lease.ack();
    let text = format!(
        "memory of a consumer, a page, every other page of {} GiB dirty; the harvester takes {harvester:.3} besides, once \
         for all consumers",
        (pages * PAGE_SIZE) >> 30
    );
    Ok(Row::new(
        name,
        Aim::AtMost(AIM_HALF_BITS),
        once(dirty),
        "bits",
        text,
    ))
}

fn all_dirty(name: &str, _: &Plan) -> Result<Row> {
    let (pages, before) = (12 * TIB, resident_bits()?);
    let books = Books::new(pages);
    let (took, consumer) = time(|| books.store.consumer(Start::AllDirty));
    let grown = (resident_bits()? - before) / pages as f64;
    // A round of a migration that begins: leased in pieces, acknowledged.
    let (round, sent) = time(|| {
        let leases = std::iter::from_fn(|| consumer.lease(1 << 20));
        leases
            .map(|lease| (lease.pages(), lease.ack()).0)
            .sum::<u64>()
    });
    if sent != pages || consumer.dirty_pages() != 0 {
        return Err(format!("{name}: {sent} of {pages} pages were leased").into());
    }
    let text = format!(
        "memory of a consumer of 12 TiB, a page, that begins with all pages dirty; beginning takes {:.1} ms, leasing and \
         acknowledging all of it, 4 GiB at a time, {:.0} ms",
        took.as_secs_f64() * 1e3,
        round.as_secs_f64() * 1e3
    );
    Ok(Row::new(
        name,
        Aim::AtMost(AIM_ALL_BITS),
        once(grown),
        "bits",
        text,
    ))
}

fn nearly_clean(name: &str, plan: &Plan) -> Result<Row> {
    let pages = if plan.short { TIB / 64 } else { 12 * TIB };
    let mut state = 0x9e37_79b9_7f4a_7c15;
    let mut chosen: Vec<u64> = (0..FEW).map(|_| random(&mut state) % pages).collect();
    chosen.sort_unstable();
    chosen.dedup();
    let mut words = vec![0u64; (pages / 64) as usize];
    // The other side's memory is there too.
    words.fill(1);
    words.fill(0);
    for page in &chosen {
        words[(page / 64) as usize] |= 1 << (page % 64);
    }
    let mut books = Books::new(pages);
    let consumer = books.store.consumer(Start::Empty);
    let mut dirty = Dirty::Pages(chosen);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let pairs = turn_about::<crate::Error>(
        plan.pick(15, 2),
        || {
            let scan = || Runs::new(black_box(&words), 0, pages).collect();
            let (took, found) = time(scan);
            theirs = found;
            Ok(took)
        },
        || {
            let (took, found) = time(|| -> Result<_> {
                let found = books.harvest(&mut dirty)?;
                let lease = consumer.lease(u64::MAX).ok_or("nothing is dirty")?;
                let left = consumer.dirty_pages();
                let ranges: Vec<PageRange> = lease.extents().iter().map(|e| e.range).collect();
                lease.ack();
                Ok((found, left, ranges))
            });
            let (found, left, ranges) = found?;
            if left != 0 || found != ranges.iter().map(|range| range.pages).sum::<u64>() {
                return Err(format!("{found} pages were harvested, {left} not leased").into());
            }
            ours = ranges;
            Ok(took)
        },
    )?;
    if ours != theirs {
        return Err(format!("{name}: {} runs, {} by a scan", ours.len(), theirs.len()).into());
    }
    let text = format!(
        "harvest, count, lease and ack of {FEW} pages at random in 12 TiB: {:.0} us; a scan of all words of one bitmap {:.0} us",
        median(pairs.iter().map(|p| p.1)) * 1e6,
        median(pairs.iter().map(|p| p.0)) * 1e6,
    );
    Ok(Row::new(
        name,
        Aim::AtLeast(AIM_NEARLY_CLEAN),
        ratios(&pairs),
        "times",
        text,
    ))
}

/// Pages of a slot, and of the hole behind it.
const SLOT_PAGES: u64 = 4;

fn slot_of(block: BlockId, id: u16) -> Slot {
    let first = u64::from(id) * SLOT_PAGES;
    Slot {
        key: id.into(),
        gpa: 2 * first * PAGE_SIZE,
        block,
        range: PageRange::new(first, SLOT_PAGES),
        readonly: false,
    }
}

/// Finding the slot of an address.
fn lookup(name: &str, plan: &Plan) -> Result<Row> {
    let layout = |slots: u16| -> Result<Layout> {
        let mut editor = Layout::empty(u32::from(u16::MAX)).edit();
        let bytes = u64::from(slots) * SLOT_PAGES * PAGE_SIZE;
        editor.add_block(BlockInfo::new(BLOCK, "ram", bytes)?)?;
        (0..slots).try_for_each(|id| editor.create(slot_of(BLOCK, id)))?;
        Ok(editor.finish()?)
    };
    let looks = plan.pick(100_000, 1000);
    let layouts = [(SLOTS[0], layout(SLOTS[0])?), (SLOTS[1], layout(SLOTS[1])?)];
    let look = |(slots, layout): &(u16, Layout)| {
        let mut state = 0x9e37_79b9_7f4a_7c15;
        let (took, found) = time(|| {
            let wanted = (0..looks).map(|_| (random(&mut state) % u64::from(*slots)) as u16);
            wanted
                .filter(|&id| {
                    let slot = slot_of(BLOCK, id);
                    let inside = layout.slot_at(slot.gpa_end() - 1).copied();
                    inside == Some(slot) && layout.slot_at(slot.gpa_end()).is_none()
                })
                .count()
        });
        if found == looks {
            Ok(took)
        } else {
            Err(crate::Error::from(format!(
                "{found} of {looks} slots were found"
            )))
        }
    };
    let pairs = turn_about(plan.pick(21, 2), || look(&layouts[1]), || look(&layouts[0]))?;
    let each = |times: &mut dyn Iterator<Item = Duration>| median(times) * 1e9 / (2 * looks) as f64;
    let text = format!(
        "finding the slot of an address at random, or that there is none: {:.0} ns among 32,000 slots, {:.0} ns among 32",
        each(&mut pairs.iter().map(|p| p.0)),
        each(&mut pairs.iter().map(|p| p.1)),
    );
    Ok(Row::new(
        name,
        Aim::AtMost(AIM_SLOTS),
        ratios(&pairs),
        "times",
        text,
    ))
}

/// A VM with so many slots behind a tracker, and its KVM's time.
struct Slots {
    tracker: Tracker,
    kvm: Arc<TimedKvm>,
    middle: u16,
    spare: u16,
    _consumer: gleaner::Consumer,
    _vm: kvm_ioctls::Kvm,
}

impl Slots {
    fn new(slots: u16) -> Result<Self> {
        let vm = kvm_ioctls::Kvm::new()?;
        let kvm = TimedKvm::new(Arc::new(StockKvm::new(Arc::new(vm.create_vm()?))));
        let tracker = Tracker::on(Arc::clone(&kvm) as Arc<dyn gleaner_ring::Kvm>)
            .tracking(Tracking::Bitmap)
            .build()?;
        let ram = Block::memfd("ram", u64::from(slots) * SLOT_PAGES * PAGE_SIZE)?;
        let mut tx = tracker.transaction();
        tx.add_block(&ram);
        for id in 0..slots {
            let slot = slot_of(ram.id(), id);
            tx.create(id, GuestAddress(slot.gpa), ram.extent(slot.range));
        }
        tx.commit()?;
        Ok(Self {
            _consumer: tracker.consumer(Start::Empty)?,
            tracker,
            kvm,
            middle: slots / 2,
            spare: slots,
            _vm: vm,
        })
    }

    /// Cuts the slot in the middle in two and joins it again: what of that is user space's.
    fn change(&self) -> Result<Duration> {
        self.kvm.take_ns();
        let (took, done) = time(|| -> Result<usize> {
            let mut tx = self.tracker.transaction();
            tx.split(self.middle, 1, self.spare);
            let split = tx.commit()?.calls;
            let mut tx = self.tracker.transaction();
            tx.merge(self.middle, self.spare);
            Ok(split + tx.commit()?.calls)
        });
        match done? {
            6 => {
                let kvm = Duration::from_secs_f64(self.kvm.take_ns() / 1e9);
                Ok(took.saturating_sub(kvm))
            }
            calls => Err(format!("{calls} calls, not 6").into()),
        }
    }
}

fn transaction(name: &str, plan: &Plan) -> Result<Row> {
    let many = if plan.short { 1000 } else { SLOTS[1] };
    let (few, many) = (Slots::new(SLOTS[0])?, Slots::new(many)?);
    let pairs = turn_about(plan.pick(51, 3), || many.change(), || few.change())?;
    let text = format!(
        "user space's part of splitting a slot and merging it again, without KVM's calls: {:.0} us among 32,000 slots, {:.0} \
         us among 32",
        median(pairs.iter().map(|p| p.0)) * 1e6,
        median(pairs.iter().map(|p| p.1)) * 1e6,
    );
    Ok(Row::new(
        name,
        Aim::AtMost(AIM_SLOTS),
        ratios(&pairs),
        "times",
        text,
    ))
}
