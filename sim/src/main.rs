//! `gleaner-sim`: migrations by the million, each from a seed of its own.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::Parser;
use gleaner_sim::migration::{Tally, migrate};
use serde_json::json;

/// Simulates migrations of guests on a model of KVM, with faults and slot changes, and counts the pages that get lost.
#[derive(Debug, Parser)]
#[command(
    name = "gleaner-sim",
    version,
    after_help = "Example: gleaner-sim --migrations 1000000 --seed 7 --json\n\nRun n of a seed is the same each time: --first n --migrations 1 repeats it. Ctrl-C ends it and says where to go on.\nExit status: 0 no page lost, none needless; 1 some; 2 usage."
)]
struct Options {
    /// How many.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    migrations: u64,
    /// What everything follows from.
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// The run to begin with: to go on, or to repeat one.
    #[arg(long, value_name = "N", default_value_t = 0)]
    first: u64,
    /// Print one JSON object on standard output.
    #[arg(long)]
    json: bool,
}

/// Runs that a thread takes at a time.
const CHUNK: u64 = 64;
/// Between two lines of progress.
const TELL: Duration = Duration::from_secs(10);
/// Runs that went wrong are named up to this number.
const NAMED: usize = 20;

/// What all threads have found.
#[derive(Default)]
struct Found {
    tally: Tally,
    runs: u64,
    bad: Vec<String>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let over = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&over);
    if let Err(error) = ctrlc::set_handler(move || flag.store(true, Ordering::SeqCst)) {
        eprintln!("gleaner-sim: Ctrl-C can't be caught: {error}");
    }
    let found = Mutex::new(Found::default());
    let next = AtomicU64::new(0);
    let start = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| scope.spawn(|| work(&options, &next, &over, &found)))
            .collect();
        let mut told = start;
        while workers.iter().any(|w| !w.is_finished()) {
            std::thread::park_timeout(Duration::from_millis(50));
            if told.elapsed() >= TELL {
                told = Instant::now();
                let found = found.lock().unwrap_or_else(PoisonError::into_inner);
                eprintln!(
                    "{} of {} migrations, {:.0} a second",
                    found.runs,
                    options.migrations,
                    found.runs as f64 / start.elapsed().as_secs_f64()
                );
            }
        }
    });
    let found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    tell(&options, &found, start.elapsed());
    if found.runs < options.migrations {
        let (first, left) = (options.first + found.runs, options.migrations - found.runs);
        eprintln!(
            "ended early; go on with --seed {} --first {first} --migrations {left}",
            options.seed
        );
    }
    if found.bad.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Takes chunks until there is none, or the user wants an end. A chunk that was taken is finished, so that those before
/// `next` are all done.
fn work(options: &Options, next: &AtomicU64, over: &AtomicBool, found: &Mutex<Found>) {
    while !over.load(Ordering::SeqCst) {
        let from = next.fetch_add(CHUNK, Ordering::SeqCst);
        if from >= options.migrations {
            return;
        }
        let to = options.migrations.min(from + CHUNK);
        for index in (from..to).map(|n| options.first + n) {
            let outcome = std::panic::catch_unwind(|| migrate(options.seed, index));
            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
            found.runs += 1;
            let bad = match outcome {
                Ok(Ok(tally)) => {
                    found.tally.add(&tally);
                    (!tally.is_good()).then(|| format!("{tally:?}"))
                }
                Ok(Err(error)) => Some(format!("unexplained: {error}")),
                Err(_) => Some("panicked".into()),
            };
            if let Some(what) = bad {
                let line = format!("run {index} of seed {}: {what}", options.seed);
                eprintln!("{line}");
                if found.bad.len() < NAMED {
                    found.bad.push(line);
                }
            }
        }
    }
}

fn tell(options: &Options, found: &Found, took: Duration) {
    let (tally, seconds) = (&found.tally, took.as_secs_f64());
    if options.json {
        let object = json!({
            "migrations": found.runs,
            "seed": options.seed,
            "first": options.first,
            "attempts": tally.attempts,
            "in_doubt": tally.in_doubt,
            "faults": tally.faults,
            "transactions": tally.transactions,
            "pages_lost": tally.pages_lost,
            "pages_needless": tally.pages_needless,
            "wrong": tally.wrong,
            "bad": found.bad,
            "seconds": seconds,
        });
        println!("{object}");
    } else {
        println!(
            "{} migrations of seed {} in {seconds:.1} s: {} attempts, {} in doubt, {} faults, {} slot transactions; {} pages lost, \
             {} needless, {} wrong otherwise",
            found.runs,
            options.seed,
            tally.attempts,
            tally.in_doubt,
            tally.faults,
            tally.transactions,
            tally.pages_lost,
            tally.pages_needless,
            tally.wrong
        );
    }
}
