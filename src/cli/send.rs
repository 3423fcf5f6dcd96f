//! `gleaner send`: the source-side agent.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use gleaner_migrate::units::Seconds;
use gleaner_migrate::{
    Address, CancelToken, Error, MigrationId, Outcome, Report, Sender, Status, query, resolve,
};

use super::format::FormatOptions;
use super::options::{MigrationOptions, Packing, Slow, TlsOptions, cancel_on_signal};
use super::output::Output;
use super::trace::{Trace, recording};
use super::{Failure, dry_run};
use crate::service::{Attach, ServiceClient};

/// How long a destination may take to say what became of an earlier attempt.
const QUERY_PATIENCE: Duration = Duration::from_secs(10);

/// The command's options.
#[derive(Debug, Args)]
#[command(
    after_help = "Example: gleaner send --control /tmp/g.sock --to tcp:host2:4444 --downtime-limit 100ms\nTo a QEMU: gleaner send --control /tmp/g.sock --to tcp:host2:4444 --format qemu --machine pc-i440fx-7.2\n\nWhen an earlier attempt is in doubt, the destination at --to is asked what became of it, and nothing else is done.\nCtrl-C cancels: the guest runs on at the source."
)]
pub struct Send {
    /// Socket of the service.
    #[arg(long, value_name = "PATH")]
    pub control: PathBuf,
    /// Where to: tcp:HOST:PORT, unix:PATH, fd:N or file:PATH. The stream's checksums cover all but the contents of pages:
    /// what changes those in a file is not noticed.
    #[arg(long, value_name = "ADDR", required_unless_present = "dry_run")]
    pub to: Option<Address>,
    #[command(flatten)]
    pub migration: MigrationOptions,
    #[command(flatten)]
    pub format: FormatOptions,
    #[command(flatten)]
    pub tls: TlsOptions,
    /// Only tell whether it would converge, from a look at the guest for about 2 s: nothing is sent, nobody is connected
    /// to. The link is taken to carry --bandwidth-limit, or 1G.
    #[arg(long)]
    pub dry_run: bool,
    /// To a `receive --resume` on this host, at unix:PATH: it goes on with the guest's own memory, of which nothing is
    /// sent. The guest stands still for as long as its state takes, however much memory it has.
    #[arg(long)]
    pub local: bool,
    /// Print one JSON object on standard output.
    #[arg(long)]
    pub json: bool,
}

impl Send {
    /// What can't be asked for together, and no attribute of an option can say.
    pub fn check(&self) -> Result<(), String> {
        self.format.check()?;
        let migration = &self.migration;
        let problem = if self.format.is_qemu() {
            match () {
                () if self.local => "a QEMU takes no memory that is handed over: leave out --local",
                () if self.tls.is_asked_for() => "--format qemu goes without TLS: leave out --tls",
                () if migration.verify => "a QEMU compares no pages: leave out --verify",
                () if migration.compress != Packing::None => {
                    "QEMU's stream is not compressed: leave out --compress"
                }
                () => return Ok(()),
            }
        } else if self.local {
            match &self.to {
                Some(Address::Tcp { .. } | Address::File(_)) => {
                    "--local stays on this host: write --to unix:PATH"
                }
                _ if self.dry_run => "--local needs no forecast: leave out --dry-run",
                _ if self.tls.is_asked_for() => "--local sends no memory: leave out --tls",
                _ if migration.channels != 1 => {
                    "--local takes one connection: leave out --channels"
                }
                _ if migration.verify => "--local makes no copy to compare: leave out --verify",
                _ if migration.compress != Packing::None => {
                    "--local sends no memory: leave out --compress"
                }
                _ if migration.bandwidth_limit.is_some() => {
                    "--local sends no memory: leave out --bandwidth-limit"
                }
                _ if migration.throttle != Slow::Never => {
                    "--local has no rounds to converge: leave out --throttle"
                }
                _ => return Ok(()),
            }
        } else if self.dry_run {
            match () {
                () if self.tls.is_asked_for() => "--dry-run connects to nobody: leave out --tls",
                () if migration.channels != 1 => {
                    "--dry-run connects to nobody: leave out --channels"
                }
                () if migration.verify => "--dry-run sends nothing to compare: leave out --verify",
                () if migration.compress != Packing::None => {
                    "--dry-run compresses nothing, so it can't tell what that would do: leave out --compress"
                }
                () => return Ok(()),
            }
        } else {
            match &self.to {
                Some(Address::File(_) | Address::Fd(_)) if migration.channels != 1 => {
                    "a file or a descriptor takes one connection: leave out --channels"
                }
                Some(Address::File(_)) if migration.verify => {
                    "a file can't compare what is written to it: leave out --verify"
                }
                _ => return Ok(()),
            }
        };
        Err(problem.into())
    }

    /// Migrates.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let output = Output { json: self.json };
        let trace = self.migration.trace().map_err(output.failure())?;
        let id = MigrationId::random().map_err(output.failure())?;
        let cancel = CancelToken::new();
        cancel_on_signal(&cancel).map_err(output.failure())?;
        let Some(address) = self.to.as_ref().filter(|_| !self.dry_run) else {
            return self.rehearse(output, id, cancel, trace.as_ref());
        };
        let pages = match &trace {
            // Of memory that is handed over no page is sent, so none is looked for.
            Some(trace) if !self.local => Some(trace.pages().map_err(output.failure())?),
            _ => None,
        };
        let to = self.tls.connector(address.clone());
        let mut source = match ServiceClient::attach_until(&self.control, id, &cancel) {
            Ok(Attach::Ready(source)) => source,
            Ok(Attach::InDoubt(_, earlier)) if self.format.is_qemu() => {
                return Ok(unasked(output, earlier));
            }
            Ok(Attach::InDoubt(source, earlier)) => {
                note!("gleaner: migration {earlier} is in doubt, asking {address}");
                let outcome = to.and_then(|to| query(&to, earlier, QUERY_PATIENCE));
                return Ok(settle(output, source, earlier, outcome));
            }
            Err(error) => return Ok(give_up(output, id, &cancel, &error)),
        };
        // Not before: of a guest in doubt it must not be said that it runs here.
        let to = match to {
            Ok(to) => to,
            Err(error) => return Ok(give_up(output, id, &cancel, &error)),
        };
        let mut options = self.migration.sender(id, cancel, trace.as_ref());
        options.local = self.local;
        options.format = self.format.format();
        let clock = options.clock.clone();
        let report = recording(&mut source, pages, &clock, |source| {
            Sender::new(source, options).run_to(&to)
        });
        if let Some(trace) = trace {
            trace.end(&report);
        }
        output.result(&report, || summary(&report) + &foretold(&report));
        Ok(exit_code(&report))
    }

    fn rehearse(
        &self,
        output: Output,
        id: MigrationId,
        cancel: CancelToken,
        trace: Option<&Trace>,
    ) -> Result<ExitCode, Failure> {
        match ServiceClient::attach_until(&self.control, id, &cancel).map_err(output.failure())? {
            Attach::Ready(mut source) => {
                let options = self.migration.sender(id, cancel, trace);
                dry_run::run(&mut source, &options, trace, output)
            }
            Attach::InDoubt(_, earlier) => {
                let doubt =
                    format!("migration {earlier} is in doubt: settle it first, without --dry-run");
                Err(output.failure()(doubt))
            }
        }
    }
}

/// An earlier attempt is in doubt, and its destination was asked.
fn settle(
    output: Output,
    mut source: ServiceClient,
    earlier: MigrationId,
    outcome: Result<Outcome, Error>,
) -> ExitCode {
    let answer = outcome
        .map_err(|e| e.to_string())
        .and_then(|outcome| resolve(&mut source, outcome).map_err(|e| e.to_string()));
    // Whatever went wrong, the service has not let the guest go on.
    let (status, reason) = match answer {
        Ok(Status::Completed) => (
            Status::Completed,
            "the guest runs at the destination".to_string(),
        ),
        Ok(status @ (Status::Failed | Status::Cancelled)) => (
            status,
            "the destination never ran the guest; it runs on here".into(),
        ),
        Ok(Status::InDoubt) => (
            Status::InDoubt,
            "the destination does not know of it; the guest stays stopped here".into(),
        ),
        Err(error) => (
            Status::InDoubt,
            format!("{error}; the guest stays stopped here"),
        ),
    };
    told(output, earlier, status, &reason)
}

/// An earlier attempt is in doubt, and a QEMU can't be asked what became of it.
fn unasked(output: Output, earlier: MigrationId) -> ExitCode {
    let reason = "it is in doubt, and a QEMU can't be asked; where its query-migrate says completed, the guest's memory \
                  is there; the guest stays stopped here";
    told(output, earlier, Status::InDoubt, reason)
}

/// What became of an earlier attempt.
fn told(output: Output, earlier: MigrationId, status: Status, reason: &str) -> ExitCode {
    let reason = format!("migration {earlier}: {reason}");
    let mut report = Report::new(earlier);
    report.status = status;
    report.reason = Some(reason.clone());
    output.result(&report, || reason);
    exit_code(&report)
}

/// It failed before a byte was sent.
fn give_up(
    output: Output,
    id: MigrationId,
    cancel: &CancelToken,
    error: &dyn std::error::Error,
) -> ExitCode {
    let mut report = Report::new(id);
    report.status = if cancel.is_cancelled() {
        Status::Cancelled
    } else {
        Status::Failed
    };
    report.reason = Some(error.to_string());
    output.result(&report, || summary(&report));
    exit_code(&report)
}

/// What happened, for people.
pub fn summary(report: &Report) -> String {
    let verified = match report.verified_pages {
        0 => String::new(),
        pages => format!(
            ", of which {:.1} ms to verify {pages} pages",
            report.verify_ms
        ),
    };
    let saved = match report.bytes_saved {
        0 => String::new(),
        bytes => format!(
            " ({:.1} MB saved, {} pages as changes)",
            bytes as f64 / 1e6,
            report.pages_delta
        ),
    };
    let status = match report.status {
        Status::Completed => "completed",
        Status::Failed => "failed",
        Status::Cancelled => "cancelled",
        Status::InDoubt => "in doubt",
    };
    if report.local {
        return format!(
            "{status} on this host, no page sent: {} bytes on the wire in {:.1} ms, downtime {:.1} ms, {} slot transactions",
            report.bytes_on_wire, report.total_ms, report.downtime_ms, report.transactions
        );
    }
    format!(
        "{status}: {} rounds, {} pages of contents and {} of zeros, {:.1} MB on the wire{saved} in {:.0} ms, downtime {:.1} ms{verified}, {} slot transactions",
        report.rounds,
        report.pages_sent,
        report.zero_pages,
        report.bytes_on_wire as f64 / 1e6,
        report.total_ms,
        report.downtime_ms,
        report.transactions
    )
}

/// How far the downtime was from its forecast, for people.
fn foretold(report: &Report) -> String {
    let (Some(forecast), Some(off)) = (report.forecast_downtime_ms, report.forecast_error_ms)
    else {
        return String::new();
    };
    let than = if off < 0.0 { "shorter" } else { "longer" };
    let [likely, low, high] =
        [forecast.likely, forecast.low, forecast.high].map(|ms| Seconds(ms / 1e3));
    format!(
        "; downtime was {} {than} than the forecast of {likely} ({low} to {high})",
        Seconds(off.abs() / 1e3)
    )
}

/// 0 when the guest has moved; else the reason goes to standard error.
pub fn exit_code(report: &Report) -> ExitCode {
    if report.status == Status::Completed {
        return ExitCode::SUCCESS;
    }
    note!(
        "gleaner: {}",
        report
            .reason
            .as_deref()
            .unwrap_or("the migration did not complete")
    );
    ExitCode::FAILURE
}
