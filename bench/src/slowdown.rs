//! What being tracked costs the guest: each write's latency, its stalls, and the start of logging.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use gleaner::gate::Turn;
use gleaner::{Block, Start, Tracker, Tracking};
use gleaner_bitmap::SlotKey;
use gleaner_ring::{Kvm as _, StockKvm};
use kvm_ioctls::Kvm;
use vm_memory::GuestAddress;

use crate::row::{Aim, Row};
use crate::sample::{Spread, time};
use crate::timed::TimedKvm;
use crate::vm::{BareVm, MODES, SLOT, TrackedVm};
use crate::{Plan, Result};

/// Bytes at random places of which a guest writes, in the rows on latency.
const HOT: u64 = 64 << 20;
/// Between two harvests there.
const SOON: Duration = Duration::from_millis(50);
/// Bytes that a guest goes through, in the rows on stalls.
const SWEPT: u64 = 1 << 30;
/// Between two harvests there: rounds of a migration.
const ROUND: Duration = Duration::from_millis(200);
/// Writes after which the sweeping guest leaves. One stalled write shows in them.
const BATCH: u32 = 16;
/// Beyond the median, what is no stall but a fault or an interrupt.
const NO_STALL: Duration = Duration::from_micros(100);
/// How many times less the guest is to stall than with a GET of the whole slot each round.
const TIMES_LESS: f64 = 3.0;
/// Milliseconds in which logging is to start, for a guest of 64 GiB.
const START_MS: f64 = 0.2;

/// Nanoseconds from the end of a batch of writes to the end of the next one.
type Latencies = Vec<u64>;

/// Runs a vCPU in a thread of its own, for a time, when it is asked to.
struct Writer {
    ask: Sender<Duration>,
    told: Receiver<Result<Latencies>>,
}

impl Writer {
    /// `vcpu` makes, in that thread, what runs the vCPU once and says whether a batch is done.
    fn spawn<S: FnMut() -> Result<bool>>(
        vcpu: impl FnOnce() -> Result<S> + Send + 'static,
    ) -> Self {
        let (ask, asked) = mpsc::channel();
        let (tell, told) = mpsc::channel();
        // It ends when the other end of either channel has gone.
        std::thread::spawn(move || {
            let mut step = match vcpu() {
                Ok(step) => step,
                Err(error) => return drop(tell.send(Err(error))),
            };
            for duration in asked {
                if tell.send(latencies(&mut step, duration)).is_err() {
                    return;
                }
            }
        });
        Self { ask, told }
    }

    /// Lets it write, and calls `harvest` every so often meanwhile.
    fn write(
        &self,
        duration: Duration,
        every: Duration,
        mut harvest: impl FnMut() -> Result<()>,
    ) -> Result<Latencies> {
        self.ask
            .send(duration)
            .map_err(|_| "the vCPU's thread has ended")?;
        loop {
            match self.told.recv_timeout(every) {
                Ok(latencies) => return latencies,
                Err(RecvTimeoutError::Timeout) => harvest()?,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err("the vCPU's thread has ended".into());
                }
            }
        }
    }
}

fn latencies(step: &mut impl FnMut() -> Result<bool>, duration: Duration) -> Result<Latencies> {
    let mut found = Vec::new();
    let began = Instant::now();
    let mut last = began;
    while last - began < duration {
        if step()? {
            let now = Instant::now();
            found.push((now - last).as_nanos() as u64);
            last = now;
        }
    }
    Ok(found)
}

/// A guest that writes, and how what it wrote is harvested.
enum Subject {
    /// Behind a tracker; in no mode, nobody wants to know.
    Tracked(Writer, TrackedVm),
    /// By hand: its whole slot is fetched.
    Get(Writer, Arc<StockKvm>, Vec<u64>),
}

impl Subject {
    fn tracked(tracking: Option<Tracking>, slot: u64, hot: u64, batch: u32) -> Result<Self> {
        let vm = match tracking {
            Some(tracking) => TrackedVm::new(tracking, slot, hot, batch)?,
            None => TrackedVm::unlogged(Tracking::Bitmap, slot, hot, 1, batch)?,
        };
        let (parts, tracker) = (Arc::clone(&vm.parts), vm.tracker.clone());
        let writer = Writer::spawn(move || {
            let mut vcpu = parts.vcpu(0)?;
            let mut seat = tracker.register(&vcpu, 0)?;
            Ok(move || match seat.run(&mut vcpu)? {
                Turn::Exit(exit) => parts.handle(exit),
                _ => Err("nobody stops this guest".into()),
            })
        });
        Ok(Self::Tracked(writer, vm))
    }

    fn get(slot: u64, batch: u32) -> Result<Self> {
        let mut vm = BareVm::new(Tracking::Bitmap, slot, 0, 1, batch)?;
        let mut vcpu = vm.take_vcpu().ok_or("a guest has a vCPU")?;
        let parts = Arc::clone(&vm.parts);
        let words = vec![0; parts.home().pages.div_ceil(64) as usize];
        let writer = Writer::spawn(move || Ok(move || parts.handle(vcpu.run()?)));
        Ok(Self::Get(writer, vm.kvm, words))
    }

    /// Lets it write for so long: latencies, and how many pages the harvests found.
    fn write(&mut self, duration: Duration, every: Duration) -> Result<(Latencies, u64)> {
        let mut pages = 0;
        let latencies = match self {
            Self::Tracked(writer, vm) => writer.write(duration, every, || {
                if let Some(consumer) = &vm.consumer {
                    vm.tracker.harvest()?;
                    if let Some(lease) = consumer.lease(u64::MAX)? {
                        pages += lease
                            .parts()
                            .iter()
                            .map(|(extent, _)| extent.range.pages)
                            .sum::<u64>();
                        lease.ack();
                    }
                }
                Ok(())
            }),
            Self::Get(writer, kvm, words) => writer.write(duration, every, || {
                kvm.get_dirty_log(SlotKey::new(SLOT), words)?;
                pages += words.iter().map(|w| u64::from(w.count_ones())).sum::<u64>();
                Ok(())
            }),
        }?;
        Ok((latencies, pages))
    }
}

pub fn rows(plan: &Plan) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    if plan.wants_topic("slowdown/latency") {
        rows.extend(latency_rows(plan)?);
    }
    if plan.wants_topic("slowdown/stall") {
        rows.extend(stall_rows(plan)?);
    }
    if plan.wants("slowdown/log-start") {
        rows.push(log_start(plan)?);
    }
    Ok(rows)
}

fn latency_rows(plan: &Plan) -> Result<Vec<Row>> {
    let (turns, duration) = (
        plan.pick(9, 1),
        Duration::from_millis(plan.pick(500, 120) as u64),
    );
    let mut off = Subject::tracked(None, 2 * HOT, HOT, 1)?;
    let mut modes = Vec::new();
    for (mode, tracking) in MODES {
        modes.push((
            mode,
            Subject::tracked(Some(tracking), 2 * HOT, HOT, 1)?,
            Vec::new(),
            Vec::new(),
        ));
    }
    let mut all_off = Vec::new();
    for turn in 0..=turns {
        let (untracked, _) = off.write(duration, SOON)?;
        for (_, subject, all, ratios) in &mut modes {
            let (found, pages) = subject.write(duration, SOON)?;
            if turn > 0 {
                if pages == 0 {
                    return Err("slowdown: a harvest found nothing of what was written".into());
                }
                ratios.push(mean(&found) / mean(&untracked));
                all.extend(found);
            }
        }
        if turn > 0 {
            all_off.extend(untracked);
        }
    }
    let off = quantiles(all_off);
    Ok(modes
        .into_iter()
        .map(|(mode, _, all, ratios)| {
            Row::new(
                format!("slowdown/latency/{mode}"),
                Aim::None,
                Spread::of(ratios),
                "times",
                format!(
                    "the mean time of a write and the exit after it, beside an untracked guest's; {}; untracked {off}",
                    quantiles(all)
                ),
            )
        })
        .collect())
}

fn stall_rows(plan: &Plan) -> Result<Vec<Row>> {
    let (turns, duration) = (
        plan.pick(9, 1),
        Duration::from_millis(plan.pick(1000, 250) as u64),
    );
    let slot = plan.pick(SWEPT as usize, 64 << 20) as u64;
    let mut get = (Subject::get(slot, BATCH)?, Vec::new(), 0);
    let mut modes = Vec::new();
    for (mode, tracking) in MODES {
        modes.push((
            mode,
            Subject::tracked(Some(tracking), slot, 0, BATCH)?,
            Vec::new(),
            Vec::new(),
            0,
        ));
    }
    for turn in 0..=turns {
        let (found, pages) = get.0.write(duration, ROUND)?;
        let by_get = stall(&found, duration);
        if turn > 0 {
            get.1.push(by_get * 1e3);
            get.2 += pages;
        }
        for (_, subject, stalls, ratios, all) in &mut modes {
            let (found, pages) = subject.write(duration, ROUND)?;
            let by_us = stall(&found, duration);
            if turn > 0 {
                stalls.push(by_us * 1e3);
                // A mode that stalls nobody in a turn is at its best: not without end.
                ratios.push(by_get / by_us.max(1e-6));
                *all += pages;
            }
        }
    }
    let get = (Spread::of(get.1).median, get.2);
    Ok(modes
        .into_iter()
        .map(|(mode, _, stalls, ratios, pages)| {
            Row::new(
                format!("slowdown/stall/{mode}"),
                Aim::AtLeast(TIMES_LESS),
                Spread::of(ratios),
                "times less",
                format!(
                    "ms a second in writes that took {} us more than the median: {:.2}, {pages} pages harvested; with a GET of the whole slot each round {:.2}, {} pages",
                    NO_STALL.as_micros(),
                    Spread::of(stalls).median,
                    get.0,
                    get.1
                ),
            )
        })
        .collect())
}

/// Logging starts, all pages being dirty, in a guest of 64 GiB.
fn log_start(plan: &Plan) -> Result<Row> {
    let gib = plan.pick(64, 1) as u64;
    let kvm = Kvm::new()?;
    let start = |tracking| {
        let vm = Arc::new(kvm.create_vm()?);
        let timed = TimedKvm::new(Arc::new(StockKvm::new(vm)));
        let kvm = Arc::clone(&timed) as Arc<dyn gleaner_ring::Kvm>;
        let tracker = Tracker::on(kvm).tracking(tracking).build()?;
        let ram = Block::memfd("ram", gib << 30)?;
        let mut tx = tracker.transaction();
        tx.add_block(&ram)
            .create(0, GuestAddress(0), ram.extent(ram.info().all()));
        tx.commit()?;
        let (mut starts, mut calls, mut leases) = (Vec::new(), Vec::new(), Vec::new());
        for turn in 0..=plan.pick(15, 1) {
            timed.take_ns();
            let (start, consumer) = time(|| tracker.consumer(Start::AllDirty));
            let (consumer, in_calls) = (consumer?, timed.take_ns());
            let (lease, all) = time(|| consumer.lease(u64::MAX));
            let all = all?.map_or(0, |all| (all.pages(), all.ack()).0);
            if all != ram.info().pages {
                return Err(format!("slowdown/log-start: {all} pages to begin with").into());
            }
            if turn > 0 {
                starts.push(start.as_secs_f64() * 1e3);
                calls.push(in_calls / 1e6);
                leases.push(lease.as_secs_f64() * 1e3);
            }
        }
        let (calls, leases) = (Spread::of(calls).median, Spread::of(leases).median);
        let told = format!("{calls:.2} ms of it in KVM's calls; leasing all of it, {leases:.1} ms");
        Ok::<_, crate::Error>((Spread::of(starts), told))
    };
    let ((bitmap, by_bitmap), (clear, by_clear)) =
        (start(Tracking::Bitmap)?, start(Tracking::BitmapClear)?);
    Ok(Row::new(
        "slowdown/log-start",
        Aim::AtMost(START_MS),
        clear,
        "ms",
        format!(
            "from asking for the first consumer until it may lease, {gib} GiB of which nothing was touched, bitmap-clear: {by_clear}, which arms it; in bitmap mode {:.2} ms, {by_bitmap}",
            bitmap.median
        ),
    ))
}

fn mean(latencies: &Latencies) -> f64 {
    latencies.iter().sum::<u64>() as f64 / (latencies.len() as f64).max(1.0)
}

/// The part of the time that is lost in stalls.
fn stall(latencies: &Latencies, duration: Duration) -> f64 {
    let mut sorted = latencies.clone();
    sorted.sort_unstable();
    let median = sorted.get(sorted.len() / 2).copied().unwrap_or(0);
    let long = median + NO_STALL.as_nanos() as u64;
    let lost: u64 = sorted
        .iter()
        .filter(|t| **t > long)
        .map(|t| t - median)
        .sum();
    lost as f64 / duration.as_nanos() as f64
}

/// Where latencies are, for people.
fn quantiles(mut latencies: Latencies) -> String {
    latencies.sort_unstable();
    // By permille, so that the index is whole.
    let at = |permille: usize| {
        let last = latencies.len().saturating_sub(1);
        let found = latencies.get(last * permille / 1000);
        found.copied().unwrap_or(0) as f64 / 1e3
    };
    format!(
        "p50 {:.1} us, p99 {:.1}, p99.9 {:.1}, longest {:.0}",
        at(500),
        at(990),
        at(999),
        at(1000)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_far_beyond_the_median_is_a_stall() {
        let mut latencies = vec![10_000; 9];
        latencies.extend([109_000, 1_010_000]);
        let lost = stall(&latencies, Duration::from_millis(100));
        assert!((lost - 0.01).abs() < 1e-9, "{lost}");
    }
}
