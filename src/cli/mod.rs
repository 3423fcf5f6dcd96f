//! The command line: what it takes, and who does it.

#[macro_use]
mod output;

mod compare;
mod demo;
mod doubts;
mod dry_run;
mod format;
mod guest;
mod images;
mod options;
mod plan;
mod progress;
mod rate;
mod receive;
mod send;
mod signals;
mod trace;
mod units;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};

use output::Output;

/// Follows every page a KVM guest dirties, through any change of its memory slots, and migrates it live.
#[derive(Debug, Parser)]
#[command(
    name = "gleaner",
    version,
    after_help = "Example: gleaner demo --tracking ring --transactions 1000\n\nExit status: 0 done; 1 failed, the reason on standard error; 2 usage."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Log what happens inside to standard error, as RUST_LOG says (`debug`, `gleaner=trace`).
    #[arg(long, global = true, value_name = "FILTER")]
    log: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// All of it on one machine: migrates a guest while its memory slots change, and compares every page.
    Demo(demo::Demo),
    /// Runs a reference guest with the service, for `send` and for trying things out.
    Guest(guest::Guest),
    /// Migrates the guest of a service to a destination: the source-side agent.
    Send(send::Send),
    /// Receives a guest: the destination.
    ///
    /// It takes one migration. After one that failed it ends with 1: start it again before the next `send`. Only where the
    /// source may not have heard of the failure it awaits its question for a while, and takes another guest meanwhile.
    Receive(receive::Receive),
    /// Meters what a guest writes, beside whatever else is going on, and tells whether a migration would converge.
    Rate(rate::Rate),
    /// Tells what a migration would be like, from a trace of what the guest dirties: by the policy of `send`, and by others.
    Plan(plan::Plan),
}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let (name, checked) = match &cli.command {
        Command::Demo(demo) => ("demo", demo.check()),
        Command::Guest(guest) => ("guest", guest.guest.check()),
        Command::Send(send) => ("send", send.check()),
        Command::Receive(receive) => ("receive", receive.check()),
        Command::Rate(rate) => ("rate", rate.check()),
        Command::Plan(plan) => ("plan", plan.check()),
    };
    if let Err(problem) = checked {
        let mut all = Cli::command();
        all.build();
        let command = all.find_subcommand_mut(name);
        // Each is there: it was just parsed.
        if let Some(command) = command {
            command.error(ErrorKind::ArgumentConflict, problem).exit();
        }
    }
    // Whom a destination turned away, its user wants to know.
    let usual = "error,gleaner_migrate::tls=warn,gleaner_migrate::newcomers=warn,gleaner_migrate::receiver=warn,gleaner_migrate::qemu=warn";
    let filter = cli.log.unwrap_or_else(|| usual.into());
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(filter))
        .with_writer(std::io::stderr)
        .log_internal_errors(false)
        .init();
    let outcome = match cli.command {
        Command::Demo(demo) => demo.run(),
        Command::Guest(guest) => guest.run(),
        Command::Send(send) => send.run(),
        Command::Receive(receive) => receive.run(),
        Command::Rate(rate) => rate.run(),
        Command::Plan(plan) => plan.run(),
    };
    match outcome {
        Ok(code) => code,
        Err(failure) => failure.report(),
    }
}

/// Why a command ended before it had anything to report.
#[derive(Debug)]
struct Failure {
    /// What JSON has for it.
    status: &'static str,
    reason: String,
    output: Output,
}

impl Failure {
    fn report(&self) -> ExitCode {
        self.output.ended(self.status, &self.reason);
        ExitCode::FAILURE
    }
}

impl Output {
    /// Turns an error into the failure that this output reports.
    fn failure<E: std::fmt::Display>(self) -> impl Fn(E) -> Failure {
        move |error| Failure {
            status: "failed",
            reason: error.to_string(),
            output: self,
        }
    }
}
