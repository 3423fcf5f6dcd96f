//! How fast the guest dirties memory: `calc-dirty-rate` measures, `query-dirty-rate` tells.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use gleaner_bitmap::{PAGE_SIZE, Start};
use gleaner_ring::Mode;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::monitor::{Monitor, lock};
use super::request::{Refusal, arguments};
use super::sampling::Samples;
use crate::{Consumer, Tracker};

/// Pages looked at for each GiB of a block, unless asked otherwise, and what may be asked.
const SAMPLES: u64 = 512;
const SAMPLES_ALLOWED: std::ops::RangeInclusive<u64> = 128..=16_384;
/// What may be measured.
const ALLOWED: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(50)..=Duration::from_secs(60);

/// How it is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
enum How {
    /// Contents of some pages are compared with what they were. It needs no log, and misses what is written again alike.
    PageSampling,
    /// Pages dirtied at least once.
    DirtyBitmap,
    /// Those, and the pages that each vCPU dirtied.
    DirtyRing,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Unit {
    #[default]
    Second,
    Millisecond,
}

impl Unit {
    const fn of(self, time: Duration) -> u128 {
        match self {
            Self::Second => time.as_secs() as u128,
            Self::Millisecond => time.as_millis(),
        }
    }
}

/// What is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ask {
    how: How,
    time: Duration,
    samples: u64,
    started: Duration,
}

/// The latest measurement.
#[derive(Debug, Default)]
pub(super) enum Rate {
    #[default]
    Unstarted,
    Measuring(Ask),
    Measured(Ask, Found),
}

/// In bytes a second.
#[derive(Debug, Default)]
pub(super) struct Found {
    all: f64,
    vcpus: BTreeMap<u64, f64>,
}

/// MiB a second, as QEMU tells a dirty rate.
#[allow(clippy::cast_possible_truncation)] // a rate of memory
fn mebibytes(bytes: f64) -> i64 {
    (bytes / f64::from(1 << 20)).round() as i64
}

/// Bytes a second that so many pages in so long come to.
pub(super) fn bytes_per_second(pages: u64, time: Duration) -> f64 {
    (pages * PAGE_SIZE) as f64 / time.as_secs_f64().max(1e-9)
}

pub(super) fn calc(monitor: &Arc<Monitor>, value: Value) -> Result<Value, Refusal> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "kebab-case")]
    struct Arguments {
        calc_time: u64,
        #[serde(default)]
        calc_time_unit: Unit,
        sample_pages: Option<u64>,
        mode: Option<How>,
    }
    let asked: Arguments = arguments(value)?;
    let how = asked.mode.unwrap_or(How::PageSampling);
    let time = match asked.calc_time_unit {
        Unit::Second => Duration::from_secs(asked.calc_time),
        Unit::Millisecond => Duration::from_millis(asked.calc_time),
    };
    if !ALLOWED.contains(&time) {
        return Err("calc-time has to be 1 to 60 s, or 50 to 60000 ms".into());
    }
    if asked.sample_pages.is_some() && how != How::PageSampling {
        return Err("sample-pages are of mode page-sampling alone".into());
    }
    let samples = asked.sample_pages.unwrap_or(SAMPLES);
    if !SAMPLES_ALLOWED.contains(&samples) {
        return Err("sample-pages has to be 128 to 16384".into());
    }
    let ring = matches!(monitor.tracker.mode(), Mode::Ring { .. });
    if how == How::DirtyRing && !ring {
        return Err("dirty rings are not in use: ask for dirty-bitmap or page-sampling".into());
    }
    let started = SystemTime::now().duration_since(UNIX_EPOCH);
    let ask = Ask {
        how,
        time,
        samples,
        started: started.unwrap_or_default(),
    };
    let mut rate = lock(&monitor.rate);
    if let Rate::Measuring(_) = *rate {
        return Err("a dirty rate is being measured already".into());
    }
    let begun = Measure::begin(&monitor.tracker, &ask)?;
    monitor.spawn("qmp-dirty-rate", move |monitor| {
        let measure = begun.unwrap_or_else(|| Measure::sample(&monitor.tracker, &ask));
        if monitor.sleep_until(measure.start() + ask.time) {
            return;
        }
        let found = measure.end(&monitor.tracker);
        *lock(&monitor.rate) = match found {
            Ok(found) => Rate::Measured(ask, found),
            Err(error) => {
                tracing::warn!(%error, "the dirty rate could not be measured");
                Rate::Unstarted
            }
        };
    })?;
    *rate = Rate::Measuring(ask);
    Ok(json!({}))
}

/// A measurement under way.
enum Measure {
    Logged {
        since: Instant,
        consumer: Consumer,
        vcpus: BTreeMap<u64, u64>,
    },
    Sampled {
        since: Instant,
        samples: Samples,
    },
}

impl Measure {
    /// None where samples have to be taken, which takes longer than an answer may.
    fn begin(tracker: &Tracker, ask: &Ask) -> crate::Result<Option<Self>> {
        if ask.how == How::PageSampling {
            return Ok(None);
        }
        let consumer = tracker.consumer(Start::Empty)?;
        let each = match ask.how {
            How::DirtyRing => tracker.dirtied_by_vcpus(),
            How::DirtyBitmap | How::PageSampling => Vec::new(),
        };
        Ok(Some(Self::Logged {
            since: Instant::now(),
            consumer,
            vcpus: each.into_iter().collect(),
        }))
    }

    fn sample(tracker: &Tracker, ask: &Ask) -> Self {
        Self::Sampled {
            samples: Samples::take(tracker, ask.samples),
            since: Instant::now(),
        }
    }

    const fn start(&self) -> Instant {
        match self {
            Self::Logged { since, .. } | Self::Sampled { since, .. } => *since,
        }
    }

    fn end(self, tracker: &Tracker) -> crate::Result<Found> {
        let (since, consumer, before) = match self {
            Self::Sampled { since, samples } => {
                let time = since.elapsed();
                let pages = samples.changed_pages();
                return Ok(Found {
                    all: pages * PAGE_SIZE as f64 / time.as_secs_f64().max(1e-9),
                    vcpus: BTreeMap::new(),
                });
            }
            Self::Logged {
                since,
                consumer,
                vcpus,
            } => (since, consumer, vcpus),
        };
        let time = since.elapsed();
        tracker.harvest()?;
        let now: BTreeMap<_, _> = tracker.dirtied_by_vcpus().into_iter().collect();
        let each = before.into_iter().map(|(vcpu, before)| {
            let now = now.get(&vcpu).copied().unwrap_or(before);
            (vcpu, bytes_per_second(now.saturating_sub(before), time))
        });
        Ok(Found {
            all: bytes_per_second(consumer.dirty_pages(), time),
            vcpus: each.collect(),
        })
    }
}

pub(super) fn query(monitor: &Arc<Monitor>, value: Value) -> Result<Value, Refusal> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "kebab-case")]
    struct Arguments {
        #[serde(default)]
        calc_time_unit: Unit,
    }
    let Arguments { calc_time_unit } = arguments(value)?;
    let rate = lock(&monitor.rate);
    let (status, ask) = match &*rate {
        Rate::Unstarted => ("unstarted", None),
        Rate::Measuring(ask) => ("measuring", Some(ask)),
        Rate::Measured(ask, _) => ("measured", Some(ask)),
    };
    let mut answer = json!({
        "status": status,
        "start-time": ask.map_or(0, |ask| ask.started.as_secs()),
        "calc-time": ask.map_or(0, |ask| calc_time_unit.of(ask.time)),
        "sample-pages": ask.map_or(SAMPLES, |ask| ask.samples),
        "calc-time-unit": calc_time_unit,
        "mode": ask.map_or(How::PageSampling, |ask| ask.how),
    });
    if let Rate::Measured(ask, found) = &*rate {
        answer["dirty-rate"] = mebibytes(found.all).into();
        if ask.how == How::DirtyRing {
            let of = |(id, bytes): (&u64, &f64)| json!({"id": id, "dirty-rate": mebibytes(*bytes)});
            answer["vcpu-dirty-rate"] = found.vcpus.iter().map(of).collect();
        }
    }
    Ok(answer)
}
