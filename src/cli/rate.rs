//! `gleaner rate`: what a guest writes, and whether a migration of it would converge.

mod exact;
mod exporter;
mod grid;
mod live;
mod prometheus;
mod record;
mod sampled;
mod svg;
mod text;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use gleaner_migrate::CancelToken;
use serde_json::{Value, json};

use super::options::cancel_on_signal;
use super::output::{Output, cannot_write, expect_to_write};
use super::{Failure, units};
use crate::rate::process::AddressRange;
use crate::rate::{Findings, Link, Metered, Report, Verdict, glance, judge};
use exporter::{Exporter, ServeAddress};
use live::Live;

/// The shortest time of the dirty curve, and of a window.
const LEAST: Duration = Duration::from_millis(50);
/// How often it is asked whether it is called off.
const TICK: Duration = Duration::from_millis(20);
/// Bytes a second of a link that nobody has told the bandwidth of: nearly what 10 Gbit/s are.
const BANDWIDTH: u64 = 1 << 30;
/// How long it is metered unless it is said. A sample takes longer: so that 5 % of a guest of which 1 % is dirty are reached with
/// 2 % of a CPU.
const DURATION: Duration = Duration::from_secs(10);
const SAMPLED_DURATION: Duration = Duration::from_secs(20);

/// The command's options.
#[derive(Debug, Args)]
#[command(
    after_help = "Example: gleaner rate --control /tmp/g.sock --duration 30s --bandwidth 1G --svg rate.svg\nFor `gleaner plan`: gleaner rate --control /tmp/g.sock --duration 1m --record guest.trace\nFor Prometheus: gleaner rate --control /tmp/g.sock --serve 9187\nOf any VMM: gleaner rate --pid $(pidof qemu-system-x86_64)\n\nWith --control it is exact: every page written is counted, also beside a migration. With --pid it is sampled; a page that is written with what it held is not seen.\n\nBounds are of 95 % everywhere: \"43 ms (36 ms to 60 ms)\" is within them with 95 % certainty, as far as what was seen tells, and 95 % of what varies by ±5 MiB lie so near to the mean. A time over a year, or without end, is null in JSON, with words beside it. Ctrl-C ends it early, with what was found until then."
)]
pub struct Rate {
    /// Socket of the service.
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
    /// A process whose memory holds a guest's RAM, of which nothing else is asked: it takes CAP_SYS_PTRACE, or the same user.
    #[arg(long, value_name = "PID", conflicts_with = "control")]
    pub pid: Option<u32>,
    /// Where the guest's RAM is in that process, as in 0x7f0000000000+1G; may be given several times. Found by itself unless
    /// given.
    #[arg(long, value_name = "ADDR+LEN", conflicts_with = "control")]
    pub range: Vec<AddressRange>,
    /// Standard error that the sampled dirty rate may have, over the rate itself: as many pages are looked at. 5% unless given.
    #[arg(long, value_name = "P", value_parser = units::part, conflicts_with = "control")]
    pub precision: Option<f64>,
    /// CPU time that sampling may take, of one CPU; comes before --precision. 2% unless given.
    #[arg(long, value_name = "P", value_parser = units::part, conflicts_with = "control")]
    pub cpu: Option<f64>,
    /// How long: 10s unless given, 20s with --pid; with --serve, until Ctrl-C.
    #[arg(long, value_name = "D", value_parser = units::time_limit)]
    pub duration: Option<Duration>,
    /// Length of the windows, of which mean and variance are told: 50ms or more.
    #[arg(long, value_name = "D", default_value = "1s", value_parser = units::time_limit)]
    pub interval: Duration,
    /// Bytes a second (K, M, G) of the link that a migration would go over; 1G unless given.
    #[arg(long, value_name = "RATE", value_parser = units::size)]
    pub bandwidth: Option<u64>,
    /// The most downtime of that migration (300ms, 2s).
    #[arg(long, value_name = "D", default_value = "300ms", value_parser = units::duration)]
    pub downtime_limit: Duration,
    /// Print one JSON object on standard output.
    #[arg(long)]
    pub json: bool,
    /// Print what was found as Prometheus reads it.
    #[arg(long, conflicts_with = "json")]
    pub prometheus: bool,
    /// Serve it to Prometheus at http://ADDR/metrics meanwhile: HOST:PORT, or PORT of this host alone.
    #[arg(long, value_name = "ADDR")]
    pub serve: Option<ServeAddress>,
    /// Draw it into this file.
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Record into this file which pages are written by when, for `gleaner plan`: four times in each downtime limit, at most
    /// every 50ms.
    #[arg(long, value_name = "FILE", conflicts_with = "pid")]
    pub record: Option<PathBuf>,
}

/// What was found, all together.
struct Found<'a> {
    measured: &'a dyn Findings,
    metered: &'a Metered,
    report: Report,
    verdict: Option<Verdict>,
    /// Nobody has told the bandwidth.
    assumed: bool,
}

impl Rate {
    /// What no single option can tell.
    pub fn check(&self) -> Result<(), String> {
        if self.control.is_none() && self.pid.is_none() {
            return Err(
                "write --control PATH of a guest's service, or --pid PID of any VMM".into(),
            );
        }
        if self.interval < LEAST {
            return Err("--interval: pages are looked at every 50ms, no window is shorter".into());
        }
        if self.duration.is_some_and(|duration| duration < LEAST) {
            return Err("--duration: pages are looked at every 50ms, it has to be longer".into());
        }
        Ok(())
    }

    /// Meters.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let output = Output { json: self.json };
        let cancel = CancelToken::new();
        cancel_on_signal(&cancel).map_err(output.failure())?;
        let svg = self.svg.as_deref().map(expect_to_write);
        svg.transpose().map_err(output.failure())?;
        let exporter = self.serve.as_ref().map(Exporter::bind);
        let exporter = exporter.transpose().map_err(output.failure())?;
        if let Some(exporter) = &exporter {
            note!("gleaner: metrics at http://{}/metrics", exporter.address());
        }
        let screen = Screen {
            options: &self,
            cancel,
            exporter,
        };
        match (self.pid, &self.control) {
            (Some(pid), _) => screen.sampled(pid),
            (None, Some(control)) => screen.exact(control),
            (None, None) => Err("neither --control nor --pid".into()),
        }
        .map_err(output.failure())
    }

    /// Tells what was found, in every way that is asked for; and why it is not all, if something ended it early.
    fn tell(&self, measured: &dyn Findings, metered: &Metered, lost: Option<&str>) -> ExitCode {
        let found = self.found(measured, metered);
        let mut object = found.object();
        if let Some(reason) = lost {
            object["status"] = "failed".into();
            object["reason"] = reason.into();
        }
        let told = Output { json: self.json }.result(&object, || {
            if self.prometheus {
                prometheus::exposition(&found).trim_end().to_owned()
            } else {
                text::told(&found)
            }
        });
        let path = self.svg.as_deref();
        let drawn = path.map_or(Ok(()), |path| {
            let picture = std::fs::write(path, svg::picture(&found));
            picture.map_err(|error| cannot_write(path, &error))
        });
        let failures = drawn.err().into_iter().chain(lost.map(str::to_owned));
        let failed = failures.map(|reason| note!("gleaner: {reason}")).count();
        if told && failed == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }

    fn found<'a>(&self, measured: &'a dyn Findings, metered: &'a Metered) -> Found<'a> {
        Found {
            measured,
            metered,
            report: measured.report(),
            verdict: judge(measured, metered, self.link()),
            assumed: self.bandwidth.is_none(),
        }
    }

    fn link(&self) -> Link {
        Link {
            bandwidth: self.bandwidth.unwrap_or(BANDWIDTH),
            downtime_limit: self.downtime_limit,
        }
    }

    /// How long; without end where it is served.
    fn time(&self, usual: Duration) -> Option<Duration> {
        self.duration
            .or_else(|| self.serve.is_none().then_some(usual))
    }
}

/// Where what is found is shown meanwhile, and who calls it off.
struct Screen<'a> {
    options: &'a Rate,
    cancel: CancelToken,
    exporter: Option<Exporter>,
}

impl Screen<'_> {
    /// Shows what there is to show.
    fn show(&self, live: &mut Live, measured: &dyn Findings, metered: &Metered, last: bool) {
        if live.is_due(measured) || last {
            live.show(measured, metered, last, || {
                let verdict = glance(measured, metered, self.options.link())?;
                Some(text::foreseen(&verdict, self.options.bandwidth.is_none()))
            });
        }
        if let Some(exporter) = &self.exporter
            && exporter.is_due(measured)
        {
            let found = self.options.found(measured, metered);
            exporter.publish(prometheus::exposition(&found));
        }
    }
}

impl Found<'_> {
    fn object(&self) -> Value {
        let mut object = json!({
            "status": "completed",
            "tracking": self.metered.tracking,
            "data_pages": self.metered.data_pages,
            "verdict": self.verdict,
        });
        if let (Value::Object(all), Value::Object(more)) = (&mut object, json!(self.report)) {
            all.extend(more);
        }
        if let Some(Value::Object(verdict)) = object.get_mut("verdict") {
            let word = self.verdict.as_ref().map(Verdict::word);
            verdict.insert("word".into(), word.into());
            verdict.insert("bandwidth_assumed".into(), self.assumed.into());
        }
        object
    }
}
