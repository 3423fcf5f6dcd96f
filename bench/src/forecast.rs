//! What `gleaner rate` says of a migration, beside the migration that follows.

use std::time::{Duration, Instant};

use gleaner::migrate::policy::Bounds;
use gleaner::rate::{Link, Measurement, Meter, Verdict, judge};
use gleaner::vmm::Machine;
use gleaner::vmm::guest::Workload;

use crate::downtime::{hop, machine};
use crate::row::{Aim, Row};
use crate::sample::Spread;
use crate::{Plan, Result};

/// Bytes of a guest's RAM.
const RAM: u64 = 256 << 20;
/// What guests write, and pages a second at most.
const GUESTS: [(Workload, Option<u64>); 4] = [
    (Workload::Idle, None),
    (Workload::Hot(16 << 20), None),
    (Workload::Hot(64 << 20), Some(20_000)),
    (Workload::Random, Some(10_000)),
];
/// What the migrations have.
const LINK: Link = Link {
    bandwidth: 256 << 20,
    downtime_limit: Duration::from_millis(300),
};
/// Between two looks of the meter.
const LOOK: Duration = Duration::from_millis(50);

/// How far off a figure was, of all guests.
#[derive(Default)]
struct Off {
    percent: Vec<f64>,
    within: usize,
}

impl Off {
    fn add(&mut self, forecast: Bounds, then: f64) {
        self.percent
            .push((forecast.likely / then - 1.0).abs() * 100.0);
        self.within += usize::from((forecast.low..=forecast.high).contains(&then));
    }

    fn row(self, name: &str, what: &str, rounds: usize) -> Row {
        let count = self.percent.len();
        let told = format!(
            "{what} of {count} migrations of {} MiB over {} MiB/s, {rounds} of each of {} guests that were metered for a while \
             before; {} were within the forecast's bounds",
            RAM >> 20,
            LINK.bandwidth >> 20,
            count / rounds.max(1),
            self.within
        );
        Row::new(name, Aim::None, Spread::of(self.percent), "% off", told)
    }
}

/// The rows.
pub fn rows(plan: &Plan) -> Result<Vec<Row>> {
    let rounds = plan.pick(5, 1);
    let (mut total, mut downtime) = (Off::default(), Off::default());
    for (workload, write_rate) in &GUESTS[..plan.pick(GUESTS.len(), 2)] {
        let mut guest = machine(RAM, *workload, *write_rate)?;
        for _ in 0..rounds {
            let verdict = metered(&guest, plan)?;
            if !verdict.converges {
                return Err(format!(
                    "forecast: a guest that {}: {}",
                    verdict.word(),
                    verdict.reason
                )
                .into());
            }
            let (report, arrived) = hop(&guest, |tuning| {
                tuning.limit_bandwidth(Some(LINK.bandwidth));
                tuning.limit_downtime(LINK.downtime_limit);
            })?;
            guest = arrived;
            total.add(verdict.forecast.total_ms, report.total_ms);
            downtime.add(verdict.forecast.downtime_ms, report.downtime_ms);
        }
    }
    Ok(vec![
        total.row("forecast/total", "total time", rounds),
        downtime.row("forecast/downtime", "downtime", rounds),
    ])
}

/// What the meter says of a guest after a while.
fn metered(guest: &Machine, plan: &Plan) -> Result<Verdict> {
    let mut meter = Meter::new(guest.tracker())?;
    let mut found = Measurement::new(Duration::from_millis(500));
    let (began, while_) = (Instant::now(), Duration::from_secs(plan.pick(4, 1) as u64));
    while began.elapsed() < while_ {
        std::thread::sleep(LOOK);
        found.add(&meter.look()?)?;
    }
    let verdict = judge(&found, &meter.metered(), LINK);
    verdict.ok_or_else(|| "forecast: nothing was measured".into())
}
