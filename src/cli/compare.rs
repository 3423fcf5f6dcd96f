//! `gleaner demo --compare-apply`: what a call that applies a list of slot changes would be worth.

use std::fmt::Write;
use std::process::ExitCode;

use super::Failure;
use super::output::Output;
use crate::compare::{Comparison, compare};

/// Compares and prints. Needs no KVM.
pub fn run(output: Output) -> Result<ExitCode, Failure> {
    let comparison = compare().map_err(output.failure())?;
    output.result(&comparison, || table(&comparison));
    Ok(ExitCode::SUCCESS)
}

/// Both tables, in Markdown.
fn table(comparison: &Comparison) -> String {
    let mut text = String::from(
        "| series | changes as | applied | changes | list swaps | blackout ms | wait ms | carried | lost | missed | zapped |\n\
         |---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|\n",
    );
    for row in &comparison.rows {
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {:.2} | {:.2} | {} | {} | {} | {} |",
            row.scenario,
            if row.merged { "merged" } else { "heard" },
            row.way,
            row.changes,
            row.list_swaps,
            row.blackout_us as f64 / 1e3,
            row.wait_us as f64 / 1e3,
            row.carried,
            row.lost,
            row.missed,
            row.zapped
        );
    }
    text.push_str("\n| list call | fetched | lost |\n|---|--:|--:|\n");
    for trial in &comparison.trials {
        let _ = writeln!(
            text,
            "| {} | {} | {} |",
            trial.what, trial.fetched, trial.lost
        );
    }
    text.trim_end().to_string()
}
