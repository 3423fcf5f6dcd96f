//! How long a guest stands still when it is switched over, and how far the forecast of that was off.

use std::os::unix::net::UnixStream;

use gleaner::migrate::{
    MigrationId, Receiver, ReceiverOptions, Report, Sender, SenderOptions, Status, Stream, Tuning,
};
use gleaner::vmm::guest::Workload;
use gleaner::vmm::{Backend, IncomingMachine, Machine, MachineConfig};
use gleaner::{LocalSource, Tracking};

use crate::row::{Aim, Row};
use crate::sample::Spread;
use crate::{Plan, Result};

/// Bytes of a guest's RAM, and of the part that its vCPUs write to, as fast as they can.
const RAM: u64 = 1 << 30;
const HOT: u64 = 16 << 20;
const VCPUS: usize = 2;
/// Milliseconds: the median, and what one in a hundred exceeds.
const AIM_MEDIAN: f64 = 20.0;
const AIM_MOST: f64 = 50.0;
/// Per cent of the downtime that the forecast was off by, in the median.
const AIM_FORECAST: f64 = 25.0;

pub fn rows(plan: &Plan) -> Result<Vec<Row>> {
    let (median, most, forecast) = ("downtime/median", "downtime/p99", "downtime/forecast");
    if ![median, most, forecast]
        .into_iter()
        .any(|row| plan.wants(row))
    {
        return Ok(Vec::new());
    }
    let rounds = plan.pick(100, 2);
    let mut downtimes = Vec::new();
    let mut off = Vec::new();
    let mut within = 0;
    let mut machine = machine(RAM, Workload::Hot(HOT), None)?;
    // The first one warms up.
    for round in 0..=rounds {
        let (report, arrived) = hop(&machine, |_| ())?;
        machine = arrived;
        if round > 0 {
            downtimes.push(report.downtime_ms);
            let forecast = report
                .forecast_downtime_ms
                .ok_or("downtime: a switchover without a forecast")?;
            off.push((forecast.likely / report.downtime_ms - 1.0).abs() * 100.0);
            within += usize::from(report.downtime_ms <= forecast.high);
        }
    }
    let check = machine.check(std::time::Duration::from_secs(60))?;
    if !check.is_ok() {
        return Err(format!("downtime: the guest's own check: {check}").into());
    }
    downtimes.sort_by(f64::total_cmp);
    let p99 = downtimes[(downtimes.len() - 1) * 99 / 100];
    let guest = format!(
        "{rounds} migrations of {} MiB, {VCPUS} vCPUs at full speed on {} MiB, over a Unix socket on this host",
        RAM >> 20,
        HOT >> 20
    );
    let forecasts = format!(
        "forecasts beside the downtimes; {within} of {rounds} were no longer than their upper bound"
    );
    Ok(vec![
        Row::new(
            median,
            Aim::AtMost(AIM_MEDIAN),
            Spread::of(downtimes),
            "ms",
            guest,
        ),
        Row::new(
            most,
            Aim::AtMost(AIM_MOST),
            Spread::of(vec![p99]),
            "ms",
            "of the same",
        ),
        Row::new(
            forecast,
            Aim::AtMost(AIM_FORECAST),
            Spread::of(off),
            "% off",
            forecasts,
        ),
    ])
}

/// A guest that runs.
pub fn machine(ram: u64, workload: Workload, write_rate: Option<u64>) -> Result<Machine> {
    let mut machine = Machine::new(&MachineConfig {
        backend: Backend::Kvm,
        ram,
        vcpus: VCPUS,
        ram_file: None,
        tracking: Tracking::Auto,
        workload,
        write_rate,
        churn: None,
        seed: 1,
    })?;
    machine.start();
    Ok(machine)
}

/// One migration, to a machine that runs the guest then.
pub fn hop(source: &Machine, tune: impl FnOnce(&Tuning)) -> Result<(Report, Machine)> {
    let (near, far) = UnixStream::pair()?;
    let mut destination = IncomingMachine::new().resume(Backend::Kvm, Tracking::Auto);
    let report = std::thread::scope(|scope| -> Result<Report> {
        scope.spawn(|| {
            Receiver::new(&mut destination, ReceiverOptions::default()).run(Stream::from(far))
        });
        let mut local = LocalSource::new(source.tracker(), source.hooks_factory()())?;
        let options = SenderOptions::new(MigrationId::random()?);
        tune(&options.tuning);
        Ok(Sender::new(&mut local, options).run(Stream::from(near)))
    })?;
    match (report.status, destination.take_machine()) {
        (Status::Completed, Some(machine)) => Ok((report, machine)),
        (_, _) => Err(format!("downtime: a migration ended otherwise: {:?}", report.reason).into()),
    }
}
