//! `gleaner plan`: what a migration would be like, from a trace.

mod busy;
mod svg;
mod table;

use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use gleaner_migrate::plan::{Outcome, Rule, Synthetic, Terms, Workload, replay};
use gleaner_migrate::trace::Trace;
use gleaner_migrate::units::{Seconds, within_a_year};
use gleaner_migrate::{CancelToken, Error, OnTimeout};
use serde::Serialize;
use serde_json::json;

use super::options::cancel_on_signal;
use super::output::{Output, cannot_write, expect_to_write};
use super::{Failure, trace, units};
use crate::PAGE_SIZE;
use busy::{Busy, Stoppable};

/// The command's options.
#[derive(Debug, Args)]
#[command(
    after_help = "Example: gleaner plan --trace guest.trace --bandwidth 1G --downtime-limit 100ms --svg plan.svg\nA guest that nobody has: gleaner plan --generate database --ram 1T --duration 1h --bandwidth 10G\n\nRound by round, in virtual time, the trace goes through the policy of `send`, and through others: a fixed number of\nrounds, Cloud Hypervisor's rule, QEMU's with auto-converge, the first round that leaves no less than the one before, and\none that knows what will come and stops the guest at the first moment within the limit."
)]
pub struct Plan {
    /// The trace, from `send --trace` or another recorder. With --generate it is written there.
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Make a trace: idle, database, stress, oscillating, phase-change or growing.
    #[arg(long, value_name = "KIND")]
    pub generate: Option<Workload>,
    /// Memory of the guest that is made (K, M, G, T).
    #[arg(long, value_name = "SIZE", default_value = "16G", value_parser = memory, requires = "generate")]
    pub ram: u64,
    /// How long the trace is that is made, up to 24h.
    #[arg(long, value_name = "D", default_value = "10m", value_parser = length, requires = "generate")]
    pub duration: Duration,
    /// Which of many guests of its kind is made.
    #[arg(long, value_name = "N", default_value_t = 1, requires = "generate")]
    pub seed: u64,
    /// Bytes a second that the link carries (K, M, G).
    #[arg(long, value_name = "RATE", value_parser = units::size)]
    pub bandwidth: Option<u64>,
    /// The most downtime.
    #[arg(long, value_name = "D", default_value = "300ms", value_parser = units::duration)]
    pub downtime_limit: Duration,
    /// The most time in total. Unless given, as long as it takes to send all memory 20 times over and to go through the
    /// trace once, and at least 10 min, but a year at most.
    #[arg(long, value_name = "D", value_parser = units::time_limit)]
    pub timeout: Option<Duration>,
    /// From a question over the link to its answer.
    #[arg(long, value_name = "D", default_value = "1ms", value_parser = units::duration)]
    pub round_trip: Duration,
    /// Draw it into this file.
    #[arg(long, value_name = "FILE", requires = "bandwidth")]
    pub svg: Option<PathBuf>,
    /// Print one JSON object on standard output.
    #[arg(long)]
    pub json: bool,
}

/// What is said of a trace.
#[derive(Debug, Serialize)]
struct About {
    /// Bytes of the file; none where it was not written.
    file_bytes: Option<u64>,
    ram_bytes: u64,
    blocks: usize,
    duration_ms: f64,
    records: usize,
    /// Pages that one of the followed pages stands for.
    pages_per_followed: u64,
    /// Pages dirtied in each record, by the time of all.
    dirty_bytes_per_second: f64,
    /// Where in the file it was cut, if it was.
    cut_at: Option<u64>,
}

impl Plan {
    /// What can't be asked for together, and no attribute of an option can say.
    pub fn check(&self) -> Result<(), String> {
        let missing = match (&self.trace, &self.generate, self.bandwidth) {
            (None, None, None) => {
                "write --trace FILE, or --generate KIND for a guest that nobody has, and --bandwidth RATE of the link"
            }
            (None, None, Some(_)) => {
                "write --trace FILE, or --generate KIND for a guest that nobody has"
            }
            (Some(_), None, None) => "write --bandwidth RATE of the link to plan for",
            (None, Some(_), None) => {
                "write --bandwidth RATE to plan, or --trace FILE to keep the trace"
            }
            _ => return Ok(()),
        };
        Err(missing.into())
    }

    /// Makes the trace if it is to be made, and plans if a bandwidth is told.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let output = Output { json: self.json };
        let cancel = CancelToken::new();
        cancel_on_signal(&cancel).map_err(output.failure())?;
        self.plan(&cancel)
            .map_err(|reason| match cancel.is_cancelled() {
                false => output.failure()(reason),
                true => Failure {
                    status: "cancelled",
                    reason: Error::Cancelled.to_string(),
                    output,
                },
            })
    }

    fn plan(&self, cancel: &CancelToken) -> Result<ExitCode, String> {
        let output = Output { json: self.json };
        self.svg.as_deref().map_or(Ok(()), expect_to_write)?;
        let (trace, bytes) = self.load(cancel)?;
        let about = About::of(&trace, bytes);
        if about.records == 0 {
            let cut = about.cut_at.map_or(String::new(), |at| {
                format!(": it is cut at byte {at}, in the middle of the first one")
            });
            return Err(format!("the trace has no record to plan by{cut}"));
        }
        if let Some(at) = about.cut_at {
            note!(
                "gleaner: the trace is cut at byte {at}, in the middle of a record: what comes before is used, {} s",
                trace.microseconds() as f64 / 1e6
            );
        }
        let Some(bandwidth) = self.bandwidth else {
            let object = json!({"status": "generated", "trace": about});
            return Ok(told(output.result(&object, || table::of_trace(&about))));
        };
        let terms = Terms {
            bandwidth,
            round_trip: self.round_trip,
            downtime_limit: self.downtime_limit,
            timeout: self.timeout,
            on_timeout: OnTimeout::Cancel,
        };
        self.doubt(&trace);
        let busy = Busy::new();
        let mut outcomes: Vec<Outcome> = Vec::new();
        for (number, rule) in (1..).zip(Rule::ALL) {
            busy.with(format!("rule {number} of {}, {rule}", Rule::ALL.len()));
            outcomes.push(replay(&trace, &terms, rule, cancel).map_err(|e| e.to_string())?);
        }
        drop(busy);
        let object = json!({
            "status": "planned",
            "trace": about,
            "bandwidth": bandwidth,
            "downtime_limit_ms": self.downtime_limit.as_secs_f64() * 1e3,
            "timeout_ms": within_a_year(terms.horizon(&trace).as_secs_f64() * 1e3),
            "rules": outcomes,
        });
        let tabled = output.result(&object, || {
            table::of_plan(&about, &terms, terms.horizon(&trace), &outcomes)
        });
        let drawn = self.svg.as_deref().map_or(Ok(()), |path| {
            let drawn = fs::write(path, svg::draw(&trace, &terms, &outcomes));
            drawn.map_err(|error| cannot_write(path, &error))
        });
        if let Err(reason) = &drawn {
            note!("gleaner: {reason}");
        }
        Ok(told(tabled && drawn.is_ok()))
    }

    /// The trace, and the size of its file if it has one.
    fn load(&self, cancel: &CancelToken) -> Result<(Trace, Option<u64>), String> {
        let busy = Busy::new();
        let Some(workload) = self.generate else {
            busy.with("the trace is read");
            let open = |path| open(path, cancel);
            return self.trace.as_deref().map_or(Err("no trace".into()), open);
        };
        busy.with("the trace is made");
        let made = Synthetic::new(workload, self.ram / PAGE_SIZE, self.duration, self.seed);
        let mut bytes = Vec::new();
        made.write(Stoppable(&mut bytes, cancel))
            .map_err(|error| error.to_string())?;
        if let Some(path) = &self.trace {
            File::create(path)
                .and_then(|file| BufWriter::new(file).write_all(&bytes))
                .map_err(|error| format!("can't write the trace {}: {error}", path.display()))?;
        }
        let read = Trace::read(Stoppable(&bytes[..], cancel));
        let trace = read.map_err(|error| error.to_string())?;
        Ok((trace, self.trace.as_ref().map(|_| bytes.len() as u64)))
    }

    /// Says so where the trace knows less than is asked of it.
    fn doubt(&self, trace: &Trace) {
        let mean = trace.microseconds() as f64 / trace.records().len().max(1) as f64 / 1e6;
        if mean > self.downtime_limit.as_secs_f64() / 2.0 {
            note!(
                "gleaner: a record of the trace covers {}, which is long beside the limit of downtime: what is dirtied in shorter times is a guess",
                Seconds(mean)
            );
        }
    }
}

/// The status of a command that told all it was asked for, or did not.
const fn told(all: bool) -> ExitCode {
    if all {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// The trace in a file, or that beside the rounds of a migration.
fn open(path: &Path, cancel: &CancelToken) -> Result<(Trace, Option<u64>), String> {
    let file = |path: &Path| {
        File::open(path)
            .map_err(|error| format!("can't read the trace {}: {error}", path.display()))
    };
    let mut first = [0];
    let read = file(path)?.read(&mut first);
    let rounds = matches!(read, Ok(1)) && first == *b"{";
    let (path, opened) = if rounds {
        let pages = trace::pages_beside(path);
        let opened = file(&pages).map_err(|reason| {
            let path = path.display();
            format!("{path} is no trace; of one that `send --trace` wrote it has the rounds, and {reason}")
        })?;
        (pages, opened)
    } else {
        (path.to_owned(), file(path)?)
    };
    let bytes = opened.metadata().ok().map(|metadata| metadata.len());
    let trace = Trace::read(Stoppable(opened, cancel))
        .map_err(|error| format!("{}: {error}", path.display()))?;
    Ok((trace, bytes))
}

impl About {
    fn of(trace: &Trace, file_bytes: Option<u64>) -> Self {
        let followed: u64 = trace.records().iter().map(|record| record.pages).sum();
        let dirtied = followed as f64 * trace.followed().weight() as f64 * PAGE_SIZE as f64;
        let seconds = trace.microseconds() as f64 / 1e6;
        Self {
            file_bytes,
            ram_bytes: trace.total_pages() * PAGE_SIZE,
            blocks: trace.blocks().len(),
            duration_ms: seconds * 1e3,
            records: trace.records().len(),
            pages_per_followed: trace.followed().weight(),
            dirty_bytes_per_second: if seconds > 0.0 {
                dirtied / seconds
            } else {
                0.0
            },
            cut_at: trace.cut(),
        }
    }
}

/// Memory of a guest that is made.
fn memory(text: &str) -> Result<u64, String> {
    let bytes = units::size(text)?;
    // 2^26 followed pages, each of which stands for 2^14.
    if !(PAGE_SIZE..=1 << 50).contains(&bytes) {
        return Err(format!(
            "\"{text}\" is no memory of a guest: 4K to 1024T can be made"
        ));
    }
    Ok(bytes)
}

/// How long a trace that is made can be.
fn length(text: &str) -> Result<Duration, String> {
    let length = units::time_limit(text)?;
    if length > Duration::from_secs(86_400) {
        return Err(format!("\"{text}\" is too long: up to 24h can be made"));
    }
    Ok(length)
}
