//! What was found, for people.

use gleaner_migrate::policy::Bounds;
use gleaner_migrate::units::{Bytes, Seconds};

use super::Found;
use crate::PAGE_SIZE;
use crate::rate::{BlackoutsReport, HotRegion, Report, Verdict};

/// All of it, some lines.
pub fn told(found: &Found<'_>) -> String {
    let report = &found.report;
    let windows = &report.windows;
    let rate = &windows.bytes_per_second;
    let mut lines = vec![format!(
        "{}/s dirtied, deviation {}/s, in {} of {} ({} tracking, {} in all)",
        Bytes(rate.mean),
        Bytes(rate.deviation()),
        count(rate.samples, "window"),
        ms(windows.interval_ms.min(report.duration_ms)),
        found.metered.tracking,
        ms(report.duration_ms),
    )];
    lines.push(format!(
        "unique: {} pages, {} of {}{}",
        report.unique_pages,
        pages(report.unique_pages as f64),
        pages(report.guest_pages as f64),
        match report.pages_written {
            Some(written) => format!("; {written} dirtied by vCPUs, again after each harvest too"),
            None => String::new(),
        }
    ));
    let curve = report.curve.iter().map(|point| {
        let off = match point.samples {
            1 => String::new(),
            _ => format!(" ±{}", pages(point.deviation)),
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
    lines.push(format!(
        "hottest: {}",
        joined(report.hottest.iter().take(4).map(hot))
    ));
    lines.push(cost(report));
    if report.blackouts.count > 0 {
        lines.push(stood_still(&report.blackouts));
    }
    if report.migrated_away {
        lines.push("the guest has migrated away: this is what it wrote before".into());
    }
    if let Some(verdict) = &found.verdict {
        lines.extend(judged(verdict, found.assumed));
    }
    lines.join("\n")
}

/// What metering cost the guest.
pub fn cost(report: &Report) -> String {
    let harvests = &report.harvests;
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
    let time = |ms: Bounds| bounds(ms.times(1e-3), |s| Seconds(s).to_string());
    let downtime = time(forecast.downtime_ms);
    if verdict.converges {
        format!(
            "{} in {}, {}, downtime {downtime}",
            count(forecast.rounds.into(), "round"),
            time(forecast.total_ms),
            bounds(forecast.bytes, |n| Bytes(n).to_string())
        )
    } else {
        format!("after many rounds a switchover would stop the guest for {downtime}")
    }
}

fn bounds(of: Bounds, text: impl Fn(f64) -> String) -> String {
    let [likely, low, high] = [of.likely, of.low, of.high].map(|number| {
        if number.is_finite() {
            text(number)
        } else {
            "without end".into()
        }
    });
    format!("{likely} ({low} to {high})")
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
