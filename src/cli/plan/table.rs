//! A plan, as a table for people.

use std::fmt::Write;
use std::time::Duration;

use gleaner_migrate::Throttle;
use gleaner_migrate::plan::{Outcome, Terms};
use gleaner_migrate::units::{Bytes, Seconds};

use super::About;

/// What was read or made.
pub fn of_trace(about: &About) -> String {
    let followed = match about.pages_per_followed {
        1 => "each page followed".to_owned(),
        pages => format!("a page in {pages} followed"),
    };
    let file = match about.file_bytes {
        Some(bytes) => format!(", {} in its file", Bytes(bytes as f64)),
        None => String::new(),
    };
    format!(
        "trace: a guest of {} for {} in {} records, {followed}, {}/s dirtied{file}",
        Bytes(about.ram_bytes as f64),
        Seconds(about.duration_ms / 1e3),
        about.records,
        Bytes(about.dirty_bytes_per_second),
    )
}

/// All rules, a line each.
pub fn of_plan(about: &About, terms: &Terms, horizon: Duration, outcomes: &[Outcome]) -> String {
    let limit = Seconds(terms.downtime_limit.as_secs_f64());
    let mut text = format!(
        "{}\nlink: {}/s, round trip {}; downtime limit {limit}\n\n{:<22} {:>6} {:>11} {:>9} {:>11} {:>11} {:>9}\n",
        of_trace(about),
        Bytes(terms.bandwidth as f64),
        Seconds(terms.round_trip.as_secs_f64()),
        "rule",
        "rounds",
        "total",
        "sent",
        "downtime",
        "overshoot",
        "throttle"
    );
    for outcome in outcomes {
        let time = |ms: f64| Seconds(ms / 1e3).to_string();
        let some = |ms: f64| if ms > 0.0 { time(ms) } else { "-".into() };
        let throttle = match outcome.throttle {
            Throttle::All { percent } => format!("{percent} %"),
            Throttle::Off | Throttle::Writers { .. } => "-".into(),
        };
        let total = if outcome.moved {
            time(outcome.total_ms)
        } else {
            "never".into()
        };
        // Nothing fails in a string.
        let _ = writeln!(
            text,
            "{:<22} {:>6} {total:>11} {:>9} {:>11} {:>11} {throttle:>9}",
            outcome.rule,
            outcome.rounds,
            Bytes(outcome.bytes).to_string(),
            some(outcome.downtime_ms),
            some(outcome.overshoot_ms),
        );
    }
    if outcomes.iter().any(|outcome| !outcome.moved) {
        let horizon = Seconds(horizon.as_secs_f64());
        let _ = writeln!(
            text,
            "\nnever: not within {horizon}, for which it was replayed"
        );
    }
    if let Some(gleaner) = outcomes.first() {
        let _ = write!(text, "\ngleaner: {}", gleaner.reason);
    }
    text
}
