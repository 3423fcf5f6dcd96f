//! Gleaner's figures.
//!
//! Each row puts what Gleaner reached beside its aim. Wherever it can, the aim is a ratio to something that is measured in
//! the same process, turn about with it: the same KVM calls without Gleaner, the same socket without the stream, the same
//! bits with a plain loop. Only such ratios carry from one machine to another.

// Bits, pages and nanoseconds are counted in 64 bits on 64-bit hosts, and become f64 for ratios.
#![allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)]

mod blackout;
mod downtime;
mod forecast;
mod gate;
mod harvest;
mod kernels;
mod machine;
mod qemu;
mod rate;
mod ring;
mod row;
mod sample;
mod scale;
mod slowdown;
mod timed;
mod vm;
mod wire;
mod writes;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory as _, Parser};

use row::Row;

/// What goes wrong ends the run: a figure that could not be taken is no figure.
pub type Error = Box<dyn std::error::Error + Send + Sync>;
/// See [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Measures Gleaner beside what it is to be compared with.
#[derive(Parser)]
#[command(
    name = "gleaner-bench",
    after_help = "Example: gleaner-bench blackout wire --json"
)]
struct Options {
    /// Topics, or the beginnings of rows' names: scale, kernels, writes, ring, gate, harvest, blackout, slowdown, wire, qemu,
    /// downtime, forecast, rate. All unless given.
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Print one JSON object on standard output.
    #[arg(long, conflicts_with = "markdown")]
    json: bool,
    /// Print what docs/benchmarks.md has: the machine, and a table.
    #[arg(long)]
    markdown: bool,
    /// Quick: that outputs are equal is checked, times are printed and never a failure.
    #[arg(long)]
    short: bool,
    /// Also what takes long: slots of 8 GiB, and 4 GiB on the wire rather than 1.
    #[arg(long)]
    long: bool,
}

/// How much is measured, and which rows.
pub struct Plan {
    names: Vec<String>,
    /// Quick.
    pub short: bool,
    /// Also what takes long.
    pub long: bool,
}

impl Plan {
    /// Whether a row is wanted.
    #[must_use]
    pub fn wants(&self, name: &str) -> bool {
        self.names.is_empty() || self.names.iter().any(|n| name.starts_with(n.as_str()))
    }

    /// Whether some row of a topic is wanted.
    fn wants_topic(&self, topic: &str) -> bool {
        self.names.is_empty()
            || self
                .names
                .iter()
                .any(|n| n.starts_with(topic) || topic.starts_with(n.as_str()))
    }

    /// `full`, or `quick` when it has to be quick.
    #[must_use]
    pub const fn pick(&self, full: usize, quick: usize) -> usize {
        if self.short { quick } else { full }
    }

    /// Pages of a guest that is migrated: 1 GiB, or 4 when it may take long.
    #[must_use]
    pub const fn guest_pages(&self) -> u64 {
        match (self.short, self.long) {
            (true, _) => 1 << 14,
            (false, false) => 1 << 18,
            (false, true) => 1 << 20,
        }
    }
}

type Topic = (&'static str, bool, fn(&Plan) -> Result<Vec<Row>>);

/// Topics, whether they need KVM, and what measures them.
const TOPICS: [Topic; 13] = [
    // First, before others leave free memory behind: it measures the process.
    ("scale", false, scale::rows),
    ("kernels", false, kernels::rows),
    ("writes", false, writes::rows),
    ("ring", false, ring::rows),
    ("gate", true, gate::rows),
    ("harvest", true, harvest::rows),
    ("blackout", true, blackout::rows),
    ("slowdown", true, slowdown::rows),
    ("wire", false, wire::rows),
    ("qemu", false, qemu::rows),
    ("downtime", true, downtime::rows),
    ("forecast", true, forecast::rows),
    ("rate", true, rate::rows),
];

fn run(options: &Options) -> Result<Vec<Row>> {
    let plan = Plan {
        names: options.names.clone(),
        short: options.short,
        long: options.long,
    };
    let kvm = kvm_ioctls::Kvm::new();
    let mut rows = Vec::new();
    for (topic, needs_kvm, measure) in TOPICS {
        if !plan.wants_topic(topic) {
            continue;
        }
        if let (true, Err(error)) = (needs_kvm, &kvm) {
            eprintln!("gleaner-bench: {topic} skipped: /dev/kvm: {error}");
            continue;
        }
        for row in measure(&plan)? {
            if options.markdown {
                println!("{}", row.markdown());
            } else if !options.json {
                println!("{row}");
            }
            rows.push(row);
        }
    }
    Ok(rows)
}

fn main() -> ExitCode {
    let options = Options::parse();
    let is_known = |name: &&String| {
        let mut topics = TOPICS.iter().map(|(topic, ..)| topic);
        topics.any(|topic| name.starts_with(topic) || topic.starts_with(name.as_str()))
    };
    if let Some(name) = options.names.iter().find(|name| !is_known(name)) {
        let reason = format!("{name} is no topic, and no row's beginning: see --help");
        Options::command()
            .error(ErrorKind::InvalidValue, reason)
            .exit();
    }
    // Cargo joins the features of what it builds together, and the simulator plants bugs.
    if gleaner_bitmap::mutant::ARE_ASKED_FOR {
        eprintln!(
            "gleaner-bench: this build looks for planted bugs wherever one can be, so its figures are too slow: build it by \
             itself, with `cargo build --release -p gleaner-bench`"
        );
    }
    if options.markdown {
        println!("{}\n\n{}", machine::told(), Row::HEAD);
    }
    let rows = match run(&options) {
        Ok(rows) => rows,
        Err(error) => {
            eprintln!("gleaner-bench: {error}");
            if options.json {
                println!("{}", serde_json::json!({ "error": error.to_string() }));
            }
            return ExitCode::FAILURE;
        }
    };
    if options.json {
        println!("{}", serde_json::json!({ "rows": rows }));
    }
    if options.markdown {
        println!("\nLoad average in the end: {}.", machine::load());
    }
    if rows.is_empty() {
        eprintln!("gleaner-bench: nothing was measured");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
