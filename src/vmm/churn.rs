//! Slot transactions of every kind, as often as is asked for, while the guest runs.
//!
//! The guest does not notice: where no slot is, the VMM carries its accesses out on the block itself.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use gleaner_bitmap::{Layout, PAGE_SIZE, PageRange, Slot, SlotKey};
use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use super::machine::Parts;
use crate::{Block, TransactionReport};

/// A slot that is moved goes this far up.
const AWAY: u64 = 24 << 30;
/// Blocks are plugged in from here on, each with this much room.
const PLUG: u64 = 48 << 30;
const PLUG_ROOM: u64 = 64 << 20;
/// Blocks plugged in at most.
const PLUG_MOST: usize = 3;
/// Between two looks whether a stopped guest goes on.
const STOPPED_PAUSE: Duration = Duration::from_millis(1);
/// Slots at most, so that the home region is not ground to dust.
const SLOTS_MOST: usize = 48;

/// What a transaction does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum Kind {
    /// Punches a hole into a slot.
    Hole,
    /// Maps what no slot maps.
    Fill,
    /// Cuts a slot in two.
    Split,
    /// Joins two slots.
    Merge,
    /// Moves a slot to another address, or back.
    Move,
    /// Makes a slot read-only, or writable again.
    Flags,
    /// Deletes a slot whose block stays, to be mapped again.
    Remap,
    /// Plugs a block in, or out.
    Hotplug,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 8] = [
        Self::Hole,
        Self::Fill,
        Self::Split,
        Self::Merge,
        Self::Move,
        Self::Flags,
        Self::Remap,
        Self::Hotplug,
    ];

    /// Its name on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Hole => "hole",
            Self::Fill => "fill",
            Self::Split => "split",
            Self::Merge => "merge",
            Self::Move => "move",
            Self::Flags => "flags",
            Self::Remap => "remap",
            Self::Hotplug => "hotplug",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|k| k.name() == text);
        found.ok_or(format!("one of {known}"))
    }
}

/// How slots are to be changed. It travels with the guest, which finds its layout as restless as it left it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ChurnConfig {
    /// Transactions a second; as many as possible if `None`.
    pub rate: Option<f64>,
    /// Of which kinds.
    pub kinds: Vec<Kind>,
    /// Seed of the choices.
    pub seed: u64,
}

impl ChurnConfig {
    /// The same at the destination, with choices of its own.
    pub(super) fn next(&self) -> Self {
        Self {
            seed: self.seed.wrapping_add(1),
            ..self.clone()
        }
    }
}

/// What was done.
#[derive(Clone, Debug, Default)]
pub struct ChurnCounts {
    /// Transactions by kind.
    pub kinds: BTreeMap<Kind, u64>,
    /// Blackout of each, in the order in which they were.
    pub blackouts: Vec<Duration>,
}

impl ChurnCounts {
    /// All transactions.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.kinds.values().sum()
    }
}

/// The churn's thread. Dropping it ends the thread.
pub(super) struct Churn {
    counts: Arc<Mutex<ChurnCounts>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Churn {
    pub(super) fn spawn(parts: &Arc<Parts>, config: ChurnConfig) -> io::Result<Self> {
        let counts = Arc::new(Mutex::new(ChurnCounts::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let mut shuffle = Shuffle::new(parts.ram.clone(), config.kinds.clone(), config.seed);
        let (parts, shared, ended) = (Arc::clone(parts), Arc::clone(&counts), Arc::clone(&stop));
        let thread = std::thread::Builder::new()
            .name("churn".into())
            .spawn(move || {
                let _watch = parts.board.watch("churn".into());
                let mut due = Instant::now();
                while !ended.load(Ordering::Relaxed) {
                    if let Some(rate) = config.rate {
                        due += Duration::from_secs_f64(1.0 / rate.max(0.001));
                        while let Some(left) = due.checked_duration_since(Instant::now()) {
                            std::thread::park_timeout(left);
                            if ended.load(Ordering::Relaxed) {
                                return;
                            }
                        }
                    }
                    if let Err(error) = step(&parts, &mut shuffle, &shared) {
                        parts.board.fail(format!("slot transaction: {error}"));
                        return;
                    }
                }
            })?;
        Ok(Self {
            counts,
            stop,
            thread: Some(thread),
        })
    }

    pub(super) fn counts(&self) -> ChurnCounts {
        self.counts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// One transaction. It counts as a writer: a stopped guest keeps its layout.
fn step(parts: &Parts, shuffle: &mut Shuffle, counts: &Mutex<ChurnCounts>) -> crate::Result<()> {
    let Some(_writing) = parts.tracker.writers().try_enter() else {
        std::thread::park_timeout(STOPPED_PAUSE);
        return Ok(());
    };
    let Some((kind, report)) = shuffle.step(&parts.tracker)? else {
        return Ok(());
    };
    let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
    *counts.kinds.entry(kind).or_default() += 1;
    counts.blackouts.push(report.blackout.total());
    Ok(())
}

impl Drop for Churn {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

/// Chooses transactions and makes them, for a machine's layout: slot 0 is left alone, the other slots of the RAM block are
/// at home (from 4 GiB on, page by page) or away.
#[derive(Debug)]
pub struct Shuffle {
    ram: Block,
    kinds: Vec<Kind>,
    random: u64,
    plugged: u64,
    /// A slot that was deleted and waits to be mapped again.
    unmapped: Option<Slot>,
}

impl Shuffle {
    /// Transactions of these kinds on the slots of `ram`.
    #[must_use]
    pub const fn new(ram: Block, kinds: Vec<Kind>, seed: u64) -> Self {
        Self {
            ram,
            kinds,
            random: seed | 1,
            plugged: 0,
            unmapped: None,
        }
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % limit.max(1)
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> Option<T> {
        let len = from.len() as u64;
        let at = usize::try_from(self.below(len)).ok()?;
        from.get(at).copied()
    }

    /// Makes one transaction of a random kind that the layout allows; `None` when it allows none.
    ///
    /// # Errors
    /// Those of [`Transaction::commit`](crate::Transaction::commit).
    pub fn step(
        &mut self,
        tracker: &crate::Tracker,
    ) -> crate::Result<Option<(Kind, TransactionReport)>> {
        let layout = tracker.layout();
        let mut kinds = self.kinds.clone();
        while let Some(kind) = self.pick(&kinds) {
            kinds.retain(|k| *k != kind);
            let mut tx = tracker.transaction();
            if self.plan(kind, &layout, &mut tx)? {
                return Ok(Some((kind, tx.commit()?)));
            }
        }
        Ok(None)
    }

    fn plan(
        &mut self,
        kind: Kind,
        layout: &Layout,
        tx: &mut crate::Transaction<'_>,
    ) -> crate::Result<bool> {
        let home: Vec<Slot> = layout
            .slots()
            .filter(|s| self.is_home(s))
            .copied()
            .collect();
        let done = match kind {
            Kind::Hole => self.hole(layout, &home, tx),
            Kind::Fill => self.fill(layout, tx),
            Kind::Split => self.split(layout, &home, tx),
            Kind::Merge => self.merge(&home, tx),
            Kind::Move => self.relocate(layout, &home, tx),
            Kind::Flags => self.flags(&home, tx),
            Kind::Remap => self.remap(layout, &home, tx),
            Kind::Hotplug => return self.hotplug(layout, tx),
        };
        Ok(done.is_some())
    }

    /// Where a page of the RAM block is when it is at home: slot 0 maps the low ones, and is left alone.
    fn is_home(&self, slot: &Slot) -> bool {
        slot.key != SlotKey::new(0)
            && slot.range.first >= super::guest::LOW_PAGES
            && slot.block == self.ram.id()
            && slot.gpa == home_of(slot.range.first)
    }

    fn hole(
        &mut self,
        layout: &Layout,
        home: &[Slot],
        tx: &mut crate::Transaction<'_>,
    ) -> Option<()> {
        let all = self.ram.info().pages - super::guest::LOW_PAGES;
        let mapped: u64 = home.iter().map(|s| s.range.pages).sum();
        let wide: Vec<Slot> = home
            .iter()
            .filter(|s| s.range.pages >= 3)
            .copied()
            .collect();
        let slot = self
            .pick(&wide)
            .filter(|_| mapped > all / 2 && home.len() < SLOTS_MOST)?;
        let first = 1 + self.below(slot.range.pages - 2);
        let most = (slot.range.pages - 1 - first).min(all / 8).max(1);
        let pages = 1 + self.below(most);
        tx.punch(slot.key, PageRange::new(first, pages), free_key(layout)?);
        Some(())
    }

    fn fill(&mut self, layout: &Layout, tx: &mut crate::Transaction<'_>) -> Option<()> {
        let gaps = self.gaps(layout);
        let gap = self.pick(&gaps)?;
        tx.create(
            free_key(layout)?,
            GuestAddress(home_of(gap.first)),
            self.ram.extent(gap),
        );
        self.unmapped = None;
        Some(())
    }

    fn split(
        &mut self,
        layout: &Layout,
        home: &[Slot],
        tx: &mut crate::Transaction<'_>,
    ) -> Option<()> {
        let wide: Vec<Slot> = home
            .iter()
            .filter(|s| s.range.pages >= 2)
            .copied()
            .collect();
        let slot = self.pick(&wide).filter(|_| home.len() < SLOTS_MOST)?;
        let at = 1 + self.below(slot.range.pages - 1);
        tx.split(slot.key, at, free_key(layout)?);
        Some(())
    }

    fn merge(&mut self, home: &[Slot], tx: &mut crate::Transaction<'_>) -> Option<()> {
        let mut sorted = home.to_vec();
        sorted.sort_unstable_by_key(|s| s.gpa);
        let pairs: Vec<(Slot, Slot)> = sorted
            .windows(2)
            .map(|w| (w[0], w[1]))
            .filter(|(a, b)| a.gpa_end() == b.gpa && a.readonly == b.readonly)
            .collect();
        let (lower, upper) = self.pick(&pairs)?;
        tx.merge(lower.key, upper.key);
        Some(())
    }

    /// Moves a slot away, or one that is away back home if its place is free there.
    fn relocate(
        &mut self,
        layout: &Layout,
        home: &[Slot],
        tx: &mut crate::Transaction<'_>,
    ) -> Option<()> {
        let away: Vec<Slot> = layout
            .slots()
            .filter(|s| {
                s.key != SlotKey::new(0)
                    && s.block == self.ram.id()
                    && s.gpa == home_of(s.range.first) + AWAY
            })
            .copied()
            .collect();
        if let Some(slot) = self.pick(&away) {
            let back = Slot {
                gpa: slot.gpa - AWAY,
                ..slot
            };
            if layout.slots().any(|s| s.overlaps(&back)) {
                // Something else is there now, which shows the same pages: this one was mapped twice, and goes.
                tx.delete(slot.key);
            } else {
                tx.move_to(slot.key, GuestAddress(back.gpa));
            }
            return Some(());
        }
        let slot = self.pick(home)?;
        tx.move_to(slot.key, GuestAddress(slot.gpa + AWAY));
        Some(())
    }

    fn flags(&mut self, home: &[Slot], tx: &mut crate::Transaction<'_>) -> Option<()> {
        let readonly: Vec<Slot> = home.iter().filter(|s| s.readonly).copied().collect();
        // One at a time is read-only, so that most writes go to memory.
        if let Some(slot) = self.pick(&readonly) {
            tx.set_readonly(slot.key, false);
            return Some(());
        }
        let slot = self.pick(home)?;
        tx.set_readonly(slot.key, true);
        Some(())
    }

    fn remap(
        &mut self,
        layout: &Layout,
        home: &[Slot],
        tx: &mut crate::Transaction<'_>,
    ) -> Option<()> {
        if let Some(slot) = self.unmapped.take() {
            let slot = Slot {
                key: free_key(layout)?,
                ..slot
            };
            if layout.slots().any(|s| s.overlaps(&slot)) {
                return None;
            }
            tx.create(slot.key, slot.address(), self.ram.extent(slot.range));
            return Some(());
        }
        let slot = self.pick(home)?;
        tx.delete(slot.key);
        self.unmapped = Some(slot);
        Some(())
    }

    fn hotplug(&mut self, layout: &Layout, tx: &mut crate::Transaction<'_>) -> crate::Result<bool> {
        let plugged: Vec<Slot> = layout
            .slots()
            .filter(|s| s.block != self.ram.id())
            .copied()
            .collect();
        let out = plugged.len() >= PLUG_MOST || (!plugged.is_empty() && self.below(2) == 0);
        if out {
            let Some(slot) = self.pick(&plugged) else {
                return Ok(false);
            };
            tx.delete(slot.key).remove_block(slot.block);
            return Ok(true);
        }
        let Some(key) = free_key(layout) else {
            return Ok(false);
        };
        let room = (0..)
            .map(|n| PLUG + n * PLUG_ROOM)
            .find(|gpa| plugged.iter().all(|s| s.gpa != *gpa));
        let Some(gpa) = room else { return Ok(false) };
        // Odd lengths on purpose: a slot need not be a multiple of 64 pages.
        let pages = 1 + self.below(767);
        // Blocks that came with the guest have names too.
        while layout.block_named(&self.dimm()).is_some() {
            self.plugged += 1;
        }
        let block = Block::memfd(&self.dimm(), pages * PAGE_SIZE)?;
        self.plugged += 1;
        tx.add_block(&block)
            .create(key, GuestAddress(gpa), block.extent(block.info().all()));
        Ok(true)
    }

    /// The name of the next block.
    fn dimm(&self) -> String {
        format!("dimm{}", self.plugged)
    }

    /// Home pages that no slot shows at their home address.
    fn gaps(&self, layout: &Layout) -> Vec<PageRange> {
        let mut shown: Vec<PageRange> = layout
            .slots()
            .filter(|s| self.is_home(s))
            .map(|s| s.range)
            .collect();
        shown.sort_unstable();
        let mut at = super::guest::LOW_PAGES;
        let end = PageRange::new(self.ram.info().pages, 0);
        let mut gaps = Vec::new();
        for range in shown.into_iter().chain([end]) {
            if range.first > at {
                gaps.push(PageRange::new(at, range.first - at));
            }
            at = at.max(range.end());
        }
        gaps
    }
}

/// The home address of a page of the RAM block.
const fn home_of(page: u64) -> u64 {
    super::guest::HOME + (page - super::guest::LOW_PAGES) * PAGE_SIZE
}

/// The lowest slot id that is free: ids are used again at once, which is what a stale ring entry would need to do harm.
fn free_key(layout: &Layout) -> Option<SlotKey> {
    (0..u16::MAX)
        .map(SlotKey::new)
        .find(|key| layout.slot(*key).is_none())
}
