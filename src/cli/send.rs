//! `gleaner send`: the source-side agent.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use gleaner_migrate::{
    Address, CancelToken, MigrationId, Report, Sender, Status, connect, query, resolve,
};
use serde_json::json;

use super::Failure;
use super::options::{MigrationOptions, cancel_on_signal};
use super::output::Output;
use crate::service::{Attach, ServiceClient};

/// How long a destination may take to say what became of an earlier attempt.
const QUERY_PATIENCE: Duration = Duration::from_secs(10);

/// The command's options.
#[derive(Debug, Args)]
#[command(
    after_help = "Example: gleaner send --control /tmp/g.sock --to tcp:host2:4444 --downtime-limit 100ms\n\nWhen an earlier attempt is in doubt, the destination at --to is asked what became of it, and nothing else is done.\nCtrl-C cancels: the guest runs on at the source."
)]
pub struct Send {
    /// Socket of the service.
    #[arg(long, value_name = "PATH")]
    pub control: PathBuf,
    /// Where to: tcp:HOST:PORT, unix:PATH, fd:N or file:PATH.
    #[arg(long, value_name = "ADDR")]
    pub to: Address,
    #[command(flatten)]
    pub migration: MigrationOptions,
    /// Print one JSON object on standard output.
    #[arg(long)]
    pub json: bool,
}

impl Send {
    /// Migrates.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let output = Output { json: self.json };
        let id = MigrationId::random().map_err(output.failure())?;
        let cancel = CancelToken::new();
        cancel_on_signal(&cancel).map_err(output.failure())?;
        let mut source = match ServiceClient::attach(&self.control, id).map_err(output.failure())? {
            Attach::Ready(source) => source,
            Attach::InDoubt(source, earlier) => return self.resolve(output, source, earlier),
        };
        let stream = connect(&self.to).map_err(output.failure())?;
        let options = self.migration.sender(id, cancel);
        let report = Sender::new(&mut source, options).run(stream);
        output.result(&report, || summary(&report));
        Ok(exit_code(&report))
    }

    /// An earlier attempt is in doubt: asks its destination.
    fn resolve(
        &self,
        output: Output,
        mut source: ServiceClient,
        earlier: MigrationId,
    ) -> Result<ExitCode, Failure> {
        eprintln!(
            "gleaner: migration {earlier} is in doubt, asking {}",
            self.to
        );
        let outcome = query(&self.to, earlier, QUERY_PATIENCE).map_err(|error| Failure {
            reason: format!(
                "migration {earlier} stays in doubt, the guest stays stopped here: {error}"
            ),
            output,
        })?;
        let status = resolve(&mut source, outcome).map_err(output.failure())?;
        let reason = match status {
            Status::Completed => "the guest runs at the destination",
            Status::Failed | Status::Cancelled => {
                "the destination never ran the guest; it runs on here"
            }
            Status::InDoubt => "the destination does not know; the guest stays stopped here",
        };
        let object =
            json!({"status": status, "reason": reason, "migration_id": earlier.to_string()});
        output.result(&object, || format!("migration {earlier}: {reason}"));
        Ok(match status {
            Status::Completed => ExitCode::SUCCESS,
            _ => ExitCode::FAILURE,
        })
    }
}

/// What happened, for people.
pub fn summary(report: &Report) -> String {
    format!(
        "{}: {} rounds, {} pages and {} zero pages sent, {:.1} MB on the wire in {:.0} ms, downtime {:.1} ms, {} slot transactions",
        match report.status {
            Status::Completed => "completed",
            Status::Failed => "failed",
            Status::Cancelled => "cancelled",
            Status::InDoubt => "in doubt",
        },
        report.rounds,
        report.pages_sent,
        report.zero_pages,
        report.bytes_on_wire as f64 / 1e6,
        report.total_ms,
        report.downtime_ms,
        report.transactions
    )
}

/// 0 when the guest has moved; else the reason goes to standard error.
pub fn exit_code(report: &Report) -> ExitCode {
    if report.status == Status::Completed {
        return ExitCode::SUCCESS;
    }
    eprintln!(
        "gleaner: {}",
        report
            .reason
            .as_deref()
            .unwrap_or("the migration did not complete")
    );
    ExitCode::FAILURE
}
