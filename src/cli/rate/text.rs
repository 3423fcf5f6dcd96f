//! What was found, for people.

use gleaner_migrate::policy::Bounds;
use gleaner_migrate::units::{Bytes, Seconds};

use super::Found;
use crate::PAGE_SIZE;
use crate::rate::{BlackoutsReport, HotRegion, Metered, Report, Sampling, Verdict};

/// All of it, some lines.
pub fn told(found: &Found<'_>) -> String {
    let report = &found.report;
    let windows = &report.windows;
    let rate = &windows.bytes_per_second;
    let mut lines = vec![format!(
        "{}/s dirtied{}{}, in {} of {} ({}, {} in all)",
        Bytes(rate.mean),
        interval(report, report.dirty_bytes_per_second_interval95, |n| {
            format!("{}/s", Bytes(n))
        }),
        match rate.samples {
            0 | 1 => String::new(),
            _ => format!(", ±{}/s", Bytes(spread(rate.deviation()))),
        },
        count(rate.samples, "window"),
        ms(windows.interval_ms.min(report.duration_ms)),
        way(report, found.metered),
        ms(report.duration_ms),
    )];
    lines.push(format!(
        "unique: {} pages{}, {} of {}{}",
        report.unique_pages,
        interval(
            report,
            report.unique_pages_interval95.map(|n| n as f64),
            |n| n.to_string()
        ),
        pages(report.unique_pages as f64),
        pages(report.guest_pages as f64),
        match report.pages_written {
            Some(written) => format!("; {written} dirtied by vCPUs, again after each harvest too; the VMM and its devices are not among these"),
            None => String::new(),
        }
    ));
    let curve = report.curve.iter().map(|point| {
        let off = match point.samples {
            _ if report.sampling.is_some() => {
                interval(report, point.interval95, |n| pages(n).to_string())
            }
            1 => String::new(),
            _ => format!(" ±{}", pages(spread(point.deviation))),
        };
        format!("{} {}{off}", ms(point.ms), pages(point.pages))
    });
    lines.push(format!("D(t): {}", joined(curve)));
    if !report.vcpus.is_empty() {
        let vcpus = report.vcpus.iter();
        let vcpus = vcpus.map(|v| format!("{} {}/s", v.vcpu, Bytes(v.bytes_per_second)));
        lines.push(format!("vCPUs: {}", joined(vcpus)));
    }
    let blocks = report.blocks.iter();
    let blocks = blocks.map(|b| format!("{} {}/s", b.name, Bytes(b.dirty_bytes_per_second)));
    lines.push(format!("blocks: {}", joined(blocks)));
    if report.sampling.is_none() {
        let hottest = report.hottest.iter().take(4);
        lines.push(format!("hottest: {}", joined(hottest.map(hot))));
    }
    lines.push(cost(report));
    if let Some(blackouts) = &report.blackouts
        && blackouts.count > 0
    {
        lines.push(stood_still(blackouts));
    }
    if report.migrated_away {
        lines.push("the guest has migrated away: this is what it wrote before".into());
    }
    if let Some(verdict) = &found.verdict {
        lines.extend(judged(verdict, found.assumed));
    }
    lines.join("\n")
}

/// How far from the mean 95 % of what varies lie.
pub fn spread(deviation: f64) -> f64 {
    Bounds::DEVIATIONS * deviation
}

/// By what way it was found.
pub fn way(report: &Report, metered: &Metered) -> String {
    match report.sampling {
        Some(_) => "sampled".into(),
        None => format!("{} tracking", metered.tracking),
    }
}

/// Where it is with 95 % certainty, where that is not known for sure.
fn interval(report: &Report, [low, high]: [f64; 2], text: impl Fn(f64) -> String) -> String {
    match report.sampling {
        Some(_) => format!(" ({} to {})", text(low), text(high)),
        None => String::new(),
    }
}

/// What metering cost: the guest, or the host.
pub fn cost(report: &Report) -> String {
    if let Some(sampling) = &report.sampling {
        return sampled(sampling);
    }
    let harvests = report.harvests.unwrap_or_default();
    format!(
        "harvests: {}, {} each, the longest {}: the guest stalled for {:.1} % of the time at most",
        harvests.count,
        ms(harvests.mean_ms),
        ms(harvests.longest_ms),
        harvests.most_stall * 100.0
    )
}

/// What slot transactions cost the guest.
fn stood_still(blackouts: &BlackoutsReport) -> String {
    let parts = [
        ("kick", blackouts.kick_ms),
        ("harvest", blackouts.harvest_ms),
        ("calls", blackouts.calls_ms),
        ("rest", blackouts.rest_ms),
    ];
    let parts = parts.map(|(part, time)| format!("{part} {}", ms(time)));
    format!(
        "{} since the guest began: it stood still for {} ({}), at most {} at once",
        count(blackouts.count, "slot transaction"),
        ms(blackouts.total_ms),
        joined(parts.into_iter()),
        ms(blackouts.longest_ms)
    )
}

fn sampled(sampling: &Sampling) -> String {
    let asked = sampling.precision_asked * 100.0;
    let precision = match sampling.precision_reached {
        // What rounds to it.
        Some(reached) if reached * 100.0 < asked + 0.05 => {
            format!("standard error {:.1} %", reached * 100.0)
        }
        Some(reached) => format!(
            "standard error {:.1} %, not the {asked} % asked for: more --cpu or --duration is needed",
            reached * 100.0
        ),
        None => "no page was seen to change".into(),
    };
    format!(
        "sample: {} looks at {} pages, {:.1} % of a CPU of the {} % allowed; {precision}; pages written with what they held are not seen",
        sampling.looks,
        sampling.sampled_pages,
        sampling.cpu_used * 100.0,
        sampling.cpu_asked * 100.0,
    )
}

/// The answer as it is so far, one line.
pub fn foreseen(verdict: &Verdict, assumed: bool) -> String {
    let assumed = if assumed { " (assumed)" } else { "" };
    format!(
        "a migration at {}/s{assumed} within {} {}: {}",
        Bytes(verdict.bandwidth as f64),
        ms(verdict.downtime_limit_ms),
        verdict.word(),
        course(verdict)
    )
}

/// The answer, some lines.
pub fn judged(verdict: &Verdict, assumed: bool) -> Vec<String> {
    let assumed = if assumed {
        ", assumed: --bandwidth tells another"
    } else {
        ""
    };
    let mut lines = vec![
        format!("verdict: it {}: {}", verdict.word(), verdict.reason),
        format!(
            "migration at {}/s{assumed}: {}",
            Bytes(verdict.bandwidth as f64),
            course(verdict)
        ),
    ];
    if let Some(needs) = &verdict.needs {
        let what = if verdict.converges {
            "to be sure"
        } else {
            "what would make it converge"
        };
        lines.push(format!("{what}: {}", needs.told()));
    }
    lines
}

/// How it would go.
pub fn course(verdict: &Verdict) -> String {
    let forecast = &verdict.forecast;
    let time = |of: Bounds| of.told(|n| ms(n).to_string());
    let downtime = time(forecast.downtime_ms);
    if verdict.converges {
        format!(
            "{} in {}, {}, downtime {downtime}",
            count(forecast.rounds.into(), "round"),
            time(forecast.total_ms),
            forecast.bytes.told(|n| Bytes(n).to_string())
        )
    } else {
        format!("after many rounds a switchover would stop the guest for {downtime}")
    }
}

fn hot(region: &HotRegion) -> String {
    format!(
        "{} at {} of {} ({} writes seen)",
        pages(region.pages as f64),
        pages(region.first_page as f64),
        region.block,
        region.pages_seen
    )
}

/// So many pages, as bytes.
pub fn pages(pages: f64) -> Bytes {
    Bytes(pages * PAGE_SIZE as f64)
}

/// So many milliseconds.
pub fn ms(ms: f64) -> Seconds {
    Seconds(ms / 1e3)
}

fn count(number: u64, what: &str) -> String {
    let s = if number == 1 { "" } else { "s" };
    format!("{number} {what}{s}")
}

fn joined(parts: impl Iterator<Item = String>) -> String {
    let parts: Vec<String> = parts.collect();
    if parts.is_empty() {
        return "none".into();
    }
    parts.join(", ")
}
