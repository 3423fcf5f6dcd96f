//! `gleaner send --dry-run`: would it converge?

use std::process::ExitCode;

use gleaner_migrate::policy::{Bounds, Goal};
use gleaner_migrate::units::{Bytes, Seconds};
use gleaner_migrate::{DryRun, SenderOptions, Source, Throttle, Throttles, dry_run};
use serde_json::{Value, json};

use super::Failure;
use super::output::Output;
use super::trace::Trace;
use crate::PAGE_SIZE;

/// Bytes a second of a link that nobody has told the bandwidth of: nearly what 10 Gbit/s are.
const BANDWIDTH: u64 = 1 << 30;

/// Looks at the guest, and tells how its migration would go. 0 whatever the answer is.
pub fn run(
    source: &mut dyn Source,
    options: &SenderOptions,
    trace: Option<&Trace>,
    output: Output,
) -> Result<ExitCode, Failure> {
    let goal = Goal {
        downtime_limit: options.tuning.downtime_limit(),
        timeout: options.timeout,
        on_timeout: options.on_timeout,
        throttle: Throttles::Nothing,
        held: None,
    };
    let bandwidth = options.tuning.bandwidth_limit().unwrap_or(BANDWIDTH);
    let found = dry_run(source, goal, options.throttle, bandwidth, &options.cancel)
        .map_err(output.failure())?;
    let mut object = json!({
        "status": "dry-run",
        "verdict": if found.converges { "converges" } else { "does-not-converge" },
        "bandwidth_assumed": options.tuning.bandwidth_limit().is_none(),
        "pages_sent": 0,
        "bytes_on_wire": 0,
    });
    if let (Value::Object(all), Value::Object(more)) = (&mut object, json!(found)) {
        all.extend(more);
    }
    if let Some(trace) = trace {
        for sample in &found.samples {
            trace.line("sample", sample);
        }
        trace.line("end", &object);
    }
    output.result(&object, || {
        told(&found, options.tuning.bandwidth_limit().is_none())
    });
    Ok(ExitCode::SUCCESS)
}

fn told(found: &DryRun, assumed: bool) -> String {
    let bytes = |pages: u64| Bytes((pages * PAGE_SIZE) as f64);
    let verdict = match (found.converges, found.surely) {
        (true, true) => "it would converge",
        (true, false) => "it would probably converge",
        (false, _) => "it would not converge",
    };
    let assumed = if assumed {
        ", assumed: --bandwidth-limit tells another"
    } else {
        ""
    };
    let forecast = &found.forecast;
    let throttle = match forecast.throttle {
        Throttle::Off => String::new(),
        Throttle::All { percent } => format!(", vCPUs throttled by {percent} %"),
        Throttle::Writers { pages_per_second } => {
            let each = bytes(pages_per_second.get());
            format!(", each vCPU throttled to {each}/s")
        }
    };
    let course = if found.converges {
        format!(
            "{} rounds in {}, {} on the wire{throttle}",
            forecast.rounds,
            time(forecast.total_ms),
            amount(forecast.bytes)
        )
    } else {
        format!(
            "a switchover after many rounds stops the guest for {}",
            time(forecast.downtime_ms)
        )
    };
    let downtime = if found.converges {
        format!("\ndowntime: {}", time(forecast.downtime_ms))
    } else {
        String::new()
    };
    format!(
        "{verdict}: {}\nguest: {}, of which {} to send at first; {}/s dirtied\nlink: {}/s{assumed}\nmigration: {course}{downtime}",
        found.reason,
        bytes(found.total_pages),
        bytes(found.data_pages),
        Bytes(found.dirty_bytes_per_second),
        Bytes(found.bandwidth as f64),
    )
}

fn time(ms: Bounds) -> String {
    ms.told(|ms| Seconds(ms / 1e3).to_string())
}

fn amount(bytes: Bounds) -> String {
    bytes.told(|n| Bytes(n).to_string())
}
