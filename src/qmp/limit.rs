//! vCPUs that may dirty so much a second: `set-vcpu-dirty-limit` and what belongs to it.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gleaner_bitmap::{PAGE_SIZE, Start};
use serde::Deserialize;
use serde_json::{Value, json};

use super::monitor::{Monitor, lock};
use super::rate::bytes_per_second;
use super::request::{Refusal, arguments};
use crate::{Consumer, Error, Throttling};

/// Between two harvests, after which a page counts again that is written again.
const PERIOD: Duration = Duration::from_secs(1);
/// Pages of a MiB, which limits are told in.
const MIB: u64 = (1 << 20) / PAGE_SIZE;

/// Limits, and who watches them.
#[derive(Default)]
pub(super) struct Limits {
    held: Option<Held>,
    /// A thread harvests for them. It ends at its next look when none hold, and serves those that hold by then.
    watched: bool,
}

impl Limits {
    /// Whether some hold.
    pub(super) const fn hold(&self) -> bool {
        self.held.is_some()
    }

    /// All vCPUs may write as fast as they can.
    pub(super) fn lift(&mut self) {
        self.held = None;
    }
}

/// Limits that hold.
struct Held {
    /// MiB a second, by vCPU.
    rates: BTreeMap<u64, NonZeroU64>,
    /// What each vCPU came to in the latest second, in bytes.
    current: BTreeMap<u64, f64>,
    throttling: Throttling,
    /// As long as there is one, pages are logged.
    _consumer: Consumer,
}

fn in_pages(rates: &BTreeMap<u64, NonZeroU64>) -> BTreeMap<u64, NonZeroU64> {
    let pages = NonZeroU64::MIN.saturating_add(MIB - 1);
    let of = |(vcpu, rate): (&u64, &NonZeroU64)| (*vcpu, rate.saturating_mul(pages));
    rates.iter().map(of).collect()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Arguments {
    cpu_index: Option<i64>,
    dirty_rate: Option<u64>,
}

impl Arguments {
    /// The vCPUs that are meant: one, or all.
    fn vcpus(&self, monitor: &Monitor) -> Result<Vec<u64>, Refusal> {
        let all = monitor.tracker.dirtied_by_vcpus().into_iter();
        let all = all.map(|(vcpu, _)| vcpu).collect::<Vec<_>>();
        match self.cpu_index {
            // As QEMU takes -1.
            None | Some(-1) => Ok(all),
            Some(index) => match u64::try_from(index) {
                Ok(index) if all.contains(&index) => Ok(vec![index]),
                _ => Err(format!("there is no vCPU {index}").into()),
            },
        }
    }
}

pub(super) fn set(monitor: &Arc<Monitor>, value: Value) -> Result<Value, Refusal> {
    let asked: Arguments = arguments(value)?;
    let Some(rate) = asked.dirty_rate else {
        return Err("dirty-rate is missing, in MB a second".into());
    };
    change(monitor, &asked, NonZeroU64::new(rate))
}

pub(super) fn cancel(monitor: &Arc<Monitor>, value: Value) -> Result<Value, Refusal> {
    let asked: Arguments = arguments(value)?;
    if asked.dirty_rate.is_some() {
        return Err("dirty-rate is unexpected".into());
    }
    change(monitor, &asked, None)
}

/// From now on the limit of these vCPUs is `rate`; 0 MB a second is none, as in QEMU.
fn change(
    monitor: &Arc<Monitor>,
    asked: &Arguments,
    rate: Option<NonZeroU64>,
) -> Result<Value, Refusal> {
    let settings = lock(&monitor.settings);
    // Held, so that none begins meanwhile.
    let migration = lock(&monitor.migration);
    if rate.is_some() && settings.auto_converge() && migration.under_way().is_some() {
        return Err("a migration with auto-converge throttles vCPUs: wait for its end".into());
    }
    let mut limits = lock(&monitor.limits);
    // Before the vCPUs are looked for, which are not known without rings.
    if monitor.tracker.throttles() != gleaner_migrate::Throttles::Writers {
        return Err(Error::NoWriters.into());
    }
    let held = limits.held.as_ref();
    let mut rates = held.map_or_else(BTreeMap::new, |held| held.rates.clone());
    for vcpu in asked.vcpus(monitor)? {
        match rate {
            Some(rate) => rates.insert(vcpu, rate),
            None => rates.remove(&vcpu),
        };
    }
    match &mut limits.held {
        _ if rates.is_empty() => limits.lift(),
        Some(held) => {
            held.throttling.set_limits(in_pages(&rates))?;
            held.rates = rates;
        }
        None => {
            let consumer = monitor.tracker.consumer(Start::Empty)?;
            let throttling = monitor.tracker.limit(in_pages(&rates))?;
            if !limits.watched {
                monitor.spawn("qmp-dirty-limit", watch)?;
                limits.watched = true;
            }
            limits.held = Some(Held {
                rates,
                current: BTreeMap::new(),
                throttling,
                _consumer: consumer,
            });
        }
    }
    Ok(json!({}))
}

/// Harvests every second while limits hold, and notes what each vCPU has come to.
fn watch(monitor: &Arc<Monitor>) {
    let mut since = Instant::now();
    let mut before: BTreeMap<_, _> = monitor.tracker.dirtied_by_vcpus().into_iter().collect();
    while !monitor.sleep_until(since + PERIOD) {
        {
            let mut limits = lock(&monitor.limits);
            if !limits.hold() {
                limits.watched = false;
                return;
            }
        }
        if let Err(error) = monitor.tracker.harvest() {
            tracing::warn!(%error, "dirty limits: what was dirtied can't be told");
        }
        let time = since.elapsed();
        since += time;
        let now: BTreeMap<_, _> = monitor.tracker.dirtied_by_vcpus().into_iter().collect();
        let each = now.iter().map(|(vcpu, now)| {
            let before = before.get(vcpu).copied().unwrap_or(*now);
            (*vcpu, bytes_per_second(now.saturating_sub(before), time))
        });
        if let Some(held) = &mut lock(&monitor.limits).held {
            held.current = each.collect();
        }
        before = now;
    }
}

pub(super) fn query(monitor: &Arc<Monitor>, value: Value) -> Result<Value, Refusal> {
    super::commands::none(value)?;
    let limits = lock(&monitor.limits);
    let Some(held) = &limits.held else {
        return Ok(json!([]));
    };
    let of = |(vcpu, rate): (&u64, &NonZeroU64)| {
        let current = held.current.get(vcpu).copied().unwrap_or_default();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a rate of memory
        let current = (current / f64::from(1 << 20)).round() as u64;
        json!({"cpu-index": vcpu, "limit-rate": rate, "current-rate": current})
    };
    Ok(held.rates.iter().map(of).collect())
}
