//! What was found, as Prometheus reads it (text format 0.0.4): names end in their unit, counters in `_total`.

use std::fmt::{Display, Write};

use gleaner_migrate::policy::Bounds;

use super::Found;
use crate::PAGE_SIZE;

/// The page of metrics.
pub fn exposition(found: &Found<'_>) -> String {
    let mut page = Page(String::new());
    page.metered(found);
    page.curve(found);
    page.harvests(found);
    page.blackouts(found);
    page.sampling(found);
    page.forecast(found);
    page.0
}

struct Page(String);

/// A label and its value.
type Label<'a> = (&'a str, &'a dyn Display);

impl Page {
    fn metric(&mut self, kind: &str, name: &str, help: &str) {
        // Writing to a string does not fail.
        let _ = writeln!(
            self.0,
            "# HELP gleaner_{name} {help}\n# TYPE gleaner_{name} {kind}"
        );
    }

    fn sample(&mut self, name: &str, labels: &[Label<'_>], value: f64) {
        let labels: Vec<String> = labels
            .iter()
            .map(|(label, of)| format!("{label}=\"{}\"", escaped(&of.to_string())))
            .collect();
        let labels = if labels.is_empty() {
            String::new()
        } else {
            format!("{{{}}}", labels.join(","))
        };
        let _ = writeln!(self.0, "gleaner_{name}{labels} {}", number(value));
    }

    fn one(&mut self, kind: &str, name: &str, help: &str, value: f64) {
        self.metric(kind, name, help);
        self.sample(name, &[], value);
    }

    fn bounds(&mut self, name: &str, help: &str, of: Bounds) {
        self.metric("gauge", name, help);
        for (bound, value) in [("low", of.low), ("likely", of.likely), ("high", of.high)] {
            self.sample(name, &[("bound", &bound)], value);
        }
    }

    fn metered(&mut self, found: &Found<'_>) {
        let report = &found.report;
        self.metric(
            "gauge",
            "meter_info",
            "What meters, and how dirty pages are tracked.",
        );
        let version = env!("CARGO_PKG_VERSION");
        let labels: [Label<'_>; 2] = [("version", &version), ("tracking", &found.metered.tracking)];
        self.sample("meter_info", &labels, 1.0);
        self.one(
            "counter",
            "metered_seconds_total",
            "Time metered.",
            report.duration_ms / 1e3,
        );
        let name = "dirty_bytes_per_second";
        self.metric(
            "gauge",
            name,
            "Bytes of different pages written a second, in the latest window.",
        );
        match found.measured.latest() {
            Some(window) => {
                for (block, rate) in &window.blocks {
                    self.sample(name, &[("block", block)], *rate);
                }
            }
            None => {
                for block in &report.blocks {
                    self.sample(
                        name,
                        &[("block", &block.name)],
                        block.dirty_bytes_per_second,
                    );
                }
            }
        }
        let name = "unique_dirty_bytes";
        self.metric(
            "gauge",
            name,
            "Bytes of pages written at least once since the meter began.",
        );
        for block in &report.blocks {
            self.sample(name, &[("block", &block.name)], bytes(block.unique_pages));
        }
        let name = "block_bytes";
        self.metric("gauge", name, "Length of the block.");
        for block in &report.blocks {
            self.sample(name, &[("block", &block.name)], bytes(block.pages));
        }
        let name = "vcpu_dirtied_bytes_total";
        self.metric(
            "counter",
            name,
            "Bytes of pages dirtied by the vCPU: a page counts again when it is written after a harvest.",
        );
        for vcpu in &report.vcpus {
            self.sample(name, &[("vcpu", &vcpu.vcpu)], bytes(vcpu.pages_written));
        }
    }

    fn curve(&mut self, found: &Found<'_>) {
        // The last point may be of all the time so far: a label of its own on each page.
        let all = found.report.duration_ms;
        let curve: Vec<_> = found.report.curve.iter().filter(|p| p.ms < all).collect();
        let name = "dirty_curve_bytes";
        let help = "Bytes of different pages written in the time that the label says (in seconds), on average.";
        self.metric("gauge", name, help);
        for point in &curve {
            self.sample(
                name,
                &[("time", &(point.ms / 1e3))],
                point.pages * PAGE_SIZE as f64,
            );
        }
        let name = "dirty_curve_deviation_bytes";
        self.metric("gauge", name, "Standard deviation of that.");
        for point in curve {
            let off = point.deviation * PAGE_SIZE as f64;
            self.sample(name, &[("time", &(point.ms / 1e3))], off);
        }
    }

    fn harvests(&mut self, found: &Found<'_>) {
        let Some(harvests) = &found.report.harvests else {
            return;
        };
        self.one(
            "counter",
            "harvests_total",
            "Harvests of the meter.",
            harvests.count as f64,
        );
        self.one(
            "counter",
            "harvest_seconds_total",
            "Time of these harvests: the guest's stall because of them is no more.",
            harvests.total_ms / 1e3,
        );
        self.one(
            "gauge",
            "harvest_longest_seconds",
            "The longest of these harvests.",
            harvests.longest_ms / 1e3,
        );
        self.one(
            "counter",
            "rearmed_bytes_total",
            "Bytes of pages armed again: the next write to each page takes one more fault.",
            bytes(harvests.rearmed_pages),
        );
    }

    fn blackouts(&mut self, found: &Found<'_>) {
        let Some(blackouts) = found.measured.blackouts() else {
            return;
        };
        let name = "blackout_seconds";
        let help = "How long the guest stood still for each slot transaction since it began.";
        self.metric("histogram", name, help);
        for (reach, count) in blackouts.whole.within() {
            let reach = reach.map_or(f64::INFINITY, |reach| reach.as_secs_f64());
            let bucket = format!("{name}_bucket");
            self.sample(&bucket, &[("le", &number(reach))], count as f64);
        }
        let whole = &blackouts.whole;
        self.sample(&format!("{name}_sum"), &[], whole.total().as_secs_f64());
        self.sample(&format!("{name}_count"), &[], whole.count() as f64);
        let name = "blackout_part_seconds_total";
        let help = "The same by part: kick (until all vCPUs had left the guest), harvest, calls (KVM's own), rest.";
        self.metric("counter", name, help);
        for (part, times) in blackouts.parts() {
            self.sample(name, &[("part", &part)], times.total().as_secs_f64());
        }
    }

    fn sampling(&mut self, found: &Found<'_>) {
        let report = &found.report;
        let Some(sampling) = &report.sampling else {
            return;
        };
        let between = |[low, high]: [f64; 2], likely| Bounds::new(low, likely, high);
        self.bounds(
            "mean_dirty_bytes_per_second",
            "Bytes of different pages written a second, in the mean of all windows, with 95 % certainty.",
            between(report.dirty_bytes_per_second_interval95, report.dirty_bytes_per_second),
        );
        let bytes = |pages: u64| bytes(pages);
        self.bounds(
            "unique_dirty_bytes_sampled",
            "Bytes of pages written at least once since the meter began, with 95 % certainty.",
            between(
                report.unique_pages_interval95.map(bytes),
                bytes(report.unique_pages),
            ),
        );
        self.one(
            "counter",
            "sample_looks_total",
            "Looks at sampled pages.",
            sampling.looks as f64,
        );
        self.one(
            "gauge",
            "sample_cpu_ratio",
            "CPU time of the meter over time, of one CPU.",
            sampling.cpu_used,
        );
        self.one(
            "gauge",
            "sample_error_ratio",
            "Standard error of the mean dirty rate over that rate; +Inf where nothing was seen to change.",
            sampling.precision_reached.unwrap_or(f64::INFINITY),
        );
    }

    fn forecast(&mut self, found: &Found<'_>) {
        let Some(verdict) = &found.verdict else {
            return;
        };
        let forecast = &verdict.forecast;
        self.one(
            "gauge",
            "migration_bandwidth_bytes_per_second",
            "Bytes a second that the link of a migration is taken to carry.",
            verdict.bandwidth as f64,
        );
        self.one(
            "gauge",
            "migration_converges",
            "Whether a migration would get within the limit of downtime: 1 likely, 0 not.",
            f64::from(u8::from(verdict.converges)),
        );
        self.bounds(
            "migration_downtime_seconds",
            "Downtime of a migration.",
            forecast.downtime_ms.times(1e-3),
        );
        self.bounds(
            "migration_seconds",
            "Time of a migration, from start to end.",
            forecast.total_ms.times(1e-3),
        );
        self.bounds(
            "migration_bytes",
            "Bytes of page contents that a migration sends.",
            forecast.bytes,
        );
        let Some(needs) = verdict.needs else {
            return;
        };
        self.bounds(
            "migration_needed_bandwidth_bytes_per_second",
            "Bytes a second of a link with which it would converge.",
            needs.bandwidth,
        );
        self.bounds(
            "migration_needed_throttle_ratio",
            "Part of their time that vCPUs would have to be kept from running for it to converge.",
            needs.throttle_percent.times(1e-2),
        );
        self.bounds(
            "migration_needed_downtime_limit_seconds",
            "Limit of downtime with which it would converge.",
            needs.downtime_limit_ms.times(1e-3),
        );
    }
}

/// A number as Prometheus reads it.
fn number(value: f64) -> String {
    match value {
        f64::INFINITY => "+Inf".into(),
        number => number.to_string(),
    }
}

fn bytes(pages: u64) -> f64 {
    (pages * PAGE_SIZE) as f64
}

fn escaped(label: &str) -> String {
    label
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}
