//! `gleaner demo`: all of it on one machine.
//!
//! A guest with its service, an agent, and a destination that goes on running the guest: the same code as `guest`, `send`
//! and `receive`, in one process, so that all pages can be compared while the guest stands still at both ends.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::Args;
use gleaner_migrate::{
    Address, CancelToken, Connector, Listener, MigrationId, Receiver, ReceiverOptions, Report,
    Sender, Status,
};
use serde_json::json;
use vm_memory::{Bytes, VolatileMemory};

use super::Failure;
use super::options::{GuestOptions, MigrationOptions, cancel_on_signal};
use super::output::Output;
use super::send::{exit_code, summary};
use super::trace::{Trace, recording};
use super::units::Churn;
use crate::service::{Attach, Service, ServiceClient};
use crate::vmm::churn::Kind;
use crate::vmm::{IncomingMachine, Machine};
use crate::{Block, PAGE_SIZE, Tracker};

/// How long the guest may take to check its memory.
const CHECK_PATIENCE: Duration = Duration::from_secs(120);

/// The command's options.
#[derive(Debug, Args)]
#[command(
    after_help = "Example: gleaner demo --tracking bitmap-clear --ram 1G --transactions 1000 --json"
)]
pub struct Demo {
    #[command(flatten)]
    pub guest: GuestOptions,
    #[command(flatten)]
    pub migration: MigrationOptions,
    /// No switchover before so many slot transactions have happened.
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub transactions: u64,
    /// No migration: compare ways to apply changes of memory slots, on a model of KVM. It takes no other option than --json.
    #[arg(long, conflicts_with_all = ["GuestOptions", "MigrationOptions", "transactions"])]
    pub compare_apply: bool,
    /// Print one JSON object on standard output.
    #[arg(long)]
    pub json: bool,
}

/// What comparing all pages found.
#[derive(Clone, Default)]
struct Comparison {
    compared: u64,
    differing: u64,
    /// The first pages that differ, for people.
    first: Vec<String>,
    took: Duration,
}

impl Demo {
    /// What can't be asked for together, and no attribute of an option can say.
    pub fn check(&self) -> Result<(), String> {
        self.guest.check()
    }

    /// Migrates a guest to this very process.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let output = Output { json: self.json };
        if self.compare_apply {
            return super::compare::run(output);
        }
        let trace = self.migration.trace().map_err(output.failure())?;
        let cancel = CancelToken::new();
        cancel_on_signal(&cancel).map_err(output.failure())?;
        let mut machine = Machine::new(&self.guest.machine(Some(Churn(Some(200.0)))))
            .map_err(output.failure())?;
        let tracker = machine.tracker().clone();
        let dir = tempfile::tempdir().map_err(output.failure())?;
        let control = dir.path().join("control");
        let service = Service::serve(&tracker, &control, machine.hooks_factory())
            .map_err(output.failure())?;
        machine.start();
        note!(
            "gleaner: guest of {} MiB with {} vCPUs on {}, workload {}, {} tracking",
            self.guest.ram >> 20,
            self.guest.vcpus,
            machine.backend(),
            self.guest.workload,
            tracker.mode()
        );

        let comparison = Arc::new(Mutex::new(Comparison::default()));
        let mut destination = IncomingMachine::new()
            .resume(machine.backend(), self.guest.tracking)
            .on_complete(compare_all(&tracker, &comparison));
        let address = Address::Unix(dir.path().join("stream"));
        let listener = Listener::bind(&address).map_err(output.failure())?;
        // Its own: were both ends called off at once, it would be chance which one says so to the other.
        let not_coming = CancelToken::new();
        let report = std::thread::scope(|scope| {
            let receiver = Receiver::new(
                &mut destination,
                ReceiverOptions {
                    cancel: not_coming.clone(),
                    ..ReceiverOptions::default()
                },
            );
            let receiving = scope.spawn(|| receiver.listen(&listener));
            let report = self.send(
                &control,
                &address,
                &tracker,
                &cancel,
                trace.as_ref(),
                output,
            );
            if report.is_err() {
                not_coming.cancel();
            }
            // What the destination says of itself the source has heard.
            let _ = receiving.join();
            report
        })?;

        let check = match destination.take_machine() {
            Some(arrived) if report.status == Status::Completed => {
                match arrived.check(CHECK_PATIENCE) {
                    Ok(result) if result.is_ok() => "ok".to_string(),
                    Ok(result) => result.to_string(),
                    Err(error) => error.to_string(),
                }
            }
            _ => "not run: the guest did not arrive".into(),
        };
        let comparison = comparison
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        drop(service);
        self.tell(output, &report, &comparison, &check, &machine);
        let good = comparison.differing == 0 && check == "ok" && report.status == Status::Completed;
        if report.status != Status::Completed {
            return Ok(exit_code(&report));
        }
        if !good {
            note!(
                "gleaner: guest check: {check}; pages that differ: {}",
                comparison.differing
            );
        }
        Ok(if good {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }

    fn send(
        &self,
        control: &std::path::Path,
        to: &Address,
        tracker: &Tracker,
        cancel: &CancelToken,
        trace: Option<&Trace>,
        output: Output,
    ) -> Result<Report, Failure> {
        let id = MigrationId::random().map_err(output.failure())?;
        let mut source = match ServiceClient::attach(control, id).map_err(output.failure())? {
            Attach::Ready(source) => source,
            Attach::InDoubt(..) => return Err(output.failure()("a fresh service is in doubt")),
        };
        let mut options = self.migration.sender(id, cancel.clone(), trace);
        let (tracker, before, wanted) =
            (tracker.clone(), tracker.transactions(), self.transactions);
        options.held_back = "until so many slot transactions have happened as --transactions says";
        options.hold = Some(Box::new(move || tracker.transactions() - before >= wanted));
        let pages = trace
            .map(Trace::pages)
            .transpose()
            .map_err(output.failure())?;
        let clock = options.clock.clone();
        let report = recording(&mut source, pages, &clock, |source| {
            Sender::new(source, options).run_to(&Connector::new(to.clone()))
        });
        if let Some(trace) = trace {
            trace.end(&report);
        }
        Ok(report)
    }

    fn tell(
        &self,
        output: Output,
        report: &Report,
        comparison: &Comparison,
        check: &str,
        machine: &Machine,
    ) {
        let (counts, mode) = (machine.churn_counts(), machine.tracker().mode());
        // The comparison happens while the guest stands still, and is no part of a migration.
        let downtime_ms = (report.downtime_ms - comparison.took.as_secs_f64() * 1e3).max(0.0);
        let kinds: BTreeMap<&str, u64> = counts.kinds.iter().map(|(k, n)| (k.name(), *n)).collect();
        let mut blackouts: Vec<f64> = counts
            .blackouts
            .iter()
            .map(|b| b.as_secs_f64() * 1e6)
            .collect();
        blackouts.sort_by(f64::total_cmp);
        // By permille, so that the index is whole.
        let at = |permille: usize| {
            let last = blackouts.len().saturating_sub(1);
            blackouts
                .get(last * permille / 1000)
                .copied()
                .unwrap_or(0.0)
        };
        let object = json!({
            "status": report.status,
            "reason": report.reason,
            "pages_compared": comparison.compared,
            "pages_differing": comparison.differing,
            "transactions": kinds,
            "transactions_while_migrating": report.transactions,
            "guest_check": check,
            "downtime_ms": downtime_ms,
            "tracking": mode.name(),
            "backend": machine.backend().name(),
            "rounds": report.rounds,
            "pages_sent": report.pages_sent,
            "zero_pages": report.zero_pages,
            "bytes_on_wire": report.bytes_on_wire,
            "verified_pages": report.verified_pages,
            "verify_ms": report.verify_ms,
            "pages_delta": report.pages_delta,
            "bytes_saved": report.bytes_saved,
            "total_ms": report.total_ms,
            "first_round_gb_per_second": report.first_round_bytes_per_second / 1e9,
            "blackout_us": {"p50": at(500), "p99": at(990), "max": at(1000)},
        });
        output.result(&object, || {
            let kinds: Vec<String> = Kind::ALL
                .iter()
                .filter_map(|k| counts.kinds.get(k).map(|n| format!("{k} {n}")))
                .collect();
            let mut lines = vec![
                summary(report),
                format!(
                    "tracking {mode} on {}, first round {:.2} GB/s",
                    machine.backend(),
                    report.first_round_bytes_per_second / 1e9
                ),
                format!(
                    "slot transactions: {} ({})",
                    counts.total(),
                    kinds.join(", ")
                ),
                format!(
                    "blackout of a transaction: median {:.0} us, p99 {:.0} us, most {:.0} us",
                    at(500),
                    at(990),
                    at(1000)
                ),
                format!("downtime without the comparison: {downtime_ms:.1} ms"),
                format!(
                    "pages compared: {}, differing: {}",
                    comparison.compared, comparison.differing
                ),
                format!("guest check at the destination: {check}"),
            ];
            lines.extend(comparison.first.iter().map(|p| format!("  differs: {p}")));
            lines.join("\n")
        });
    }
}

/// Compares all pages of all blocks of the stopped source with the destination that does not run yet.
fn compare_all(tracker: &Tracker, into: &Arc<Mutex<Comparison>>) -> crate::vmm::OnComplete {
    let (tracker, into) = (tracker.clone(), Arc::clone(into));
    Box::new(move |arrived| {
        let start = Instant::now();
        let mut found = Comparison::default();
        let layout = tracker.layout();
        for info in layout.blocks() {
            let here = tracker
                .block(info.id)
                .ok_or("a block went while the guest was stopped")?;
            let there = arrived
                .get(&info.name)
                .ok_or_else(|| format!("block {} did not arrive", info.name))?;
            compare(&here, there, &mut found)?;
        }
        found.took = start.elapsed();
        let differing = found.differing;
        *into.lock().unwrap_or_else(PoisonError::into_inner) = found;
        match differing {
            0 => Ok(()),
            n => Err(format!("{n} pages differ from the source")),
        }
    })
}

fn compare(here: &Block, there: &Block, found: &mut Comparison) -> Result<(), String> {
    const CHUNK: usize = 1 << 20;
    let page = usize::try_from(PAGE_SIZE).map_err(|e| e.to_string())?;
    let (a, b) = (here.memory(), there.memory());
    if a.size() != b.size() {
        return Err(format!(
            "block {} has another length at the destination",
            here.info().name
        ));
    }
    let (mut left, mut right) = (vec![0; CHUNK], vec![0; CHUNK]);
    for at in (0..a.size()).step_by(CHUNK) {
        let len = CHUNK.min(a.size() - at);
        let read = |from: &vm_memory::MmapRegion<crate::WriteLog>, into: &mut [u8]| {
            from.as_volatile_slice()
                .read_slice(into, at)
                .map_err(|e| e.to_string())
        };
        read(a, &mut left[..len])?;
        read(b, &mut right[..len])?;
        found.compared += (len / page) as u64;
        if left[..len] == right[..len] {
            continue;
        }
        for n in (0..len)
            .step_by(page)
            .filter(|n| left[*n..n + page] != right[*n..n + page])
        {
            found.differing += 1;
            if found.first.len() < 10 {
                found.first.push(format!(
                    "block {} page {}",
                    here.info().name,
                    (at + n) / page
                ));
            }
        }
    }
    Ok(())
}
