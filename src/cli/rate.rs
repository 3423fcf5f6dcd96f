//! `gleaner rate`: what a guest writes, and whether a migration of it would converge.

mod exporter;
mod grid;
mod live;
mod prometheus;
mod record;
mod svg;
mod text;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use gleaner_migrate::CancelToken;
use serde_json::{Value, json};

use super::options::cancel_on_signal;
use super::output::Output;
use super::{Failure, units};
use crate::rate::{Link, Measurement, Metered, Report, Verdict, judge};
use crate::service::MeterClient;
use exporter::{Exporter, ServeAddress};
use live::Live;
use record::Recording;

/// Between two looks, at most: the shortest time of the dirty curve.
const LOOK: Duration = Duration::from_millis(50);
/// How often it is asked whether it is called off.
const TICK: Duration = Duration::from_millis(20);
/// Bytes a second of a link that nobody has told the bandwidth of: nearly what 10 Gbit/s are.
const BANDWIDTH: u64 = 1 << 30;
/// How long it is metered unless it is said.
const DURATION: Duration = Duration::from_secs(10);

/// The command's options.
#[derive(Debug, Args)]
#[command(
    after_help = "Example: gleaner rate --control /tmp/g.sock --duration 30s --bandwidth 1G --svg rate.svg\nFor `gleaner plan`: gleaner rate --control /tmp/g.sock --duration 1m --record guest.trace\nFor Prometheus: gleaner rate --control /tmp/g.sock --serve 9187\n\nIt is exact: every page written is counted, also beside a migration. Ctrl-C ends it early, with what was found until then."
)]
pub struct Rate {
    /// Socket of the service.
    #[arg(long, value_name = "PATH")]
    pub control: PathBuf,
    /// How long: 10s unless given; with --serve, until Ctrl-C.
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
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,
}

/// What was found, all together.
struct Found<'a> {
    measured: &'a Measurement,
    metered: &'a Metered,
    report: Report,
    verdict: Option<Verdict>,
    /// Nobody has told the bandwidth.
    assumed: bool,
}

impl Rate {
    /// What no single option can tell.
    pub fn check(&self) -> Result<(), String> {
        if self.interval < LOOK {
            return Err("--interval: pages are looked at every 50ms, no window is shorter".into());
        }
        if self.duration.is_some_and(|duration| duration < LOOK) {
            return Err("--duration: pages are looked at every 50ms, it has to be longer".into());
        }
        Ok(())
    }

    /// Meters.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let output = Output { json: self.json };
        let cancel = CancelToken::new();
        cancel_on_signal(&cancel).map_err(output.failure())?;
        let exporter = self.serve.as_ref().map(Exporter::bind);
        let exporter = exporter.transpose().map_err(output.failure())?;
        let mut client = MeterClient::attach(&self.control, &cancel).map_err(output.failure())?;
        let record = self.record.as_deref();
        let recording = record.map(|path| Recording::create(path, self.downtime_limit));
        let recording = recording.transpose().map_err(output.failure())?;
        if let Some(exporter) = &exporter {
            eprintln!("gleaner: metrics at http://{}/metrics", exporter.address());
        }
        let measured = self.measure(&mut client, &cancel, exporter.as_ref(), recording);
        let (measured, lost) = measured.map_err(output.failure())?;
        let found = self.found(&measured, client.metered());
        if let Some(path) = &self.svg {
            let written = std::fs::write(path, svg::picture(&found));
            let fail = |error| format!("can't write {}: {error}", path.display());
            written.map_err(fail).map_err(output.failure())?;
        }
        let mut object = found.object();
        if let Some(reason) = &lost {
            object["status"] = "failed".into();
            object["reason"] = reason.as_str().into();
        }
        output.result(&object, || {
            if self.prometheus {
                prometheus::exposition(&found).trim_end().to_owned()
            } else {
                text::told(&found)
            }
        });
        Ok(lost.map_or(ExitCode::SUCCESS, |reason| {
            eprintln!("gleaner: {reason}");
            ExitCode::FAILURE
        }))
    }

    fn found<'a>(&self, measured: &'a Measurement, metered: &'a Metered) -> Found<'a> {
        let link = Link {
            bandwidth: self.bandwidth.unwrap_or(BANDWIDTH),
            downtime_limit: self.downtime_limit,
        };
        Found {
            measured,
            metered,
            report: measured.report(),
            verdict: judge(measured, metered, link),
            assumed: self.bandwidth.is_none(),
        }
    }

    /// Looks until it is over, by time or by the user, or because the guest has gone; and why it could not look on, if there
    /// was a look before.
    fn measure(
        &self,
        client: &mut MeterClient,
        cancel: &CancelToken,
        exporter: Option<&Exporter>,
        mut recording: Option<Recording>,
    ) -> Result<(Measurement, Option<String>), String> {
        let began = Instant::now();
        let duration = match (self.duration, exporter) {
            (Some(duration), _) => duration,
            (None, Some(_)) => Duration::MAX,
            (None, None) => DURATION,
        };
        let metered = client.metered().clone();
        let mut measured = Measurement::new(self.interval);
        let mut live = Live::new();
        let mut due = LOOK.min(duration);
        let lost = loop {
            while began.elapsed() < due && !cancel.is_cancelled() {
                std::thread::sleep(TICK.min(due.saturating_sub(began.elapsed())));
            }
            match client.look() {
                Ok(look) => {
                    measured.add(&look).map_err(|e| e.to_string())?;
                    if let Some(recording) = &mut recording {
                        recording.add(&look);
                    }
                }
                // Called off, and no answer for a second: what was found before will do.
                Err(_) if cancel.is_cancelled() && measured.duration() > Duration::ZERO => {
                    break None;
                }
                Err(error) if measured.duration() > Duration::ZERO => {
                    break Some(error.to_string());
                }
                Err(error) => return Err(error.to_string()),
            }
            let over =
                measured.migrated_away() || cancel.is_cancelled() || began.elapsed() >= duration;
            if live.is_due(&measured) || over {
                live.show(&measured, &metered, over);
            }
            if let Some(exporter) = exporter
                && exporter.is_due(&measured)
            {
                exporter.publish(prometheus::exposition(&self.found(&measured, &metered)));
            }
            if over {
                break None;
            }
            // A look that came late makes the next one no sooner.
            while due <= began.elapsed() {
                due += LOOK;
            }
            due = due.min(duration);
        };
        if let Some(recording) = recording {
            recording.end(measured.duration());
        }
        Ok((measured, lost))
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
            verdict.insert("bandwidth_assumed".into(), self.assumed.into());
        }
        object
    }
}
