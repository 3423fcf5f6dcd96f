//! `migrate` and `migrate_cancel`: a migration on a thread of its own, and what it has come to.
//!
//! ```text
//! migrate            harvest           stop, GO, RUNNING
//!    | setup ---------> active ---------------------------> completed
//!    |  |                 |  migrate_cancel
//!    |  |                 +-------------------> cancelling -> cancelled
//!    |  +-----------------+-------------------> failed
//! ```

use std::sync::Arc;
use std::time::Instant;

use gleaner_migrate::{
    Address, CancelToken, Connector, Format, MigrationId, Progress, Report, Sender, SenderOptions,
    Status, Throttle, Tick, Tuning,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::commands::none;
use super::monitor::{Monitor, lock};
use super::request::{Refusal, arguments};
use super::source::Monitored;
use crate::service::GuestState;

/// Where a migration is, in QEMU's words.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Stage {
    Setup,
    Active,
    Cancelling,
    Cancelled,
    Completed,
    Failed,
}

impl Stage {
    const fn is_over(self) -> bool {
        matches!(self, Self::Cancelled | Self::Completed | Self::Failed)
    }
}

/// The latest migration, if there was one.
#[derive(Debug, Default)]
pub(super) struct Migration(Option<Attempt>);

/// A migration.
#[derive(Debug)]
pub(super) struct Attempt {
    pub(super) stage: Stage,
    pub(super) began: Instant,
    /// Its setup took so long.
    pub(super) setup_ms: f64,
    pub(super) sent: Sent,
    /// Page contents go over connections of their own.
    pub(super) multifd: bool,
    /// How it ended.
    pub(super) report: Option<Report>,
    cancel: CancelToken,
    tuning: Tuning,
}

/// What it has sent so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sent {
    pub(super) pages: u64,
    pub(super) zeros: u64,
    pub(super) bytes: u64,
    /// Of them, in the round with the guest stopped.
    pub(super) downtime_bytes: u64,
    pub(super) remaining_pages: u64,
    pub(super) total_pages: u64,
    /// Harvests, each of which begins a pass over what it found.
    pub(super) passes: u64,
    pub(super) dirty_pages_per_second: f64,
    pub(super) pages_per_second: f64,
    pub(super) expected_downtime_ms: Option<f64>,
    pub(super) throttle_percent: Option<u8>,
}

impl Migration {
    pub(super) const fn latest(&self) -> Option<&Attempt> {
        self.0.as_ref()
    }

    /// What the migration that is under way goes by.
    pub(super) fn under_way(&self) -> Option<&Tuning> {
        let attempt = self.0.as_ref().filter(|attempt| !attempt.stage.is_over());
        attempt.map(|attempt| &attempt.tuning)
    }

    /// Calls off what is under way.
    pub(super) fn cancel(&self) {
        if let Some(attempt) = &self.0 {
            attempt.cancel.cancel();
        }
    }
}

impl Monitor {
    /// Changes what is told of the migration.
    pub(super) fn sent(&self, change: impl FnOnce(&mut Sent)) {
        if let Some(attempt) = &mut lock(&self.migration).0 {
            change(&mut attempt.sent);
        }
    }

    /// The source was harvested: a pass over what it found begins.
    pub(super) fn pass(&self) {
        self.becomes(Stage::Active);
        let mut pass = 0;
        self.sent(|sent| {
            sent.passes += 1;
            pass = sent.passes;
        });
        if lock(&self.settings).events {
            let data = json!({"pass": pass});
            self.clients.event("MIGRATION_PASS", Some(data));
        }
    }

    /// The migration has got so far; it does not go back.
    fn becomes(&self, stage: Stage) {
        let events = lock(&self.settings).events;
        let mut migration = lock(&self.migration);
        let Some(attempt) = &mut migration.0 else {
            return;
        };
        let before = attempt.stage;
        if before == stage || (stage == Stage::Active && before != Stage::Setup) {
            return;
        }
        if before == Stage::Setup {
            attempt.setup_ms = attempt.began.elapsed().as_secs_f64() * 1e3;
        }
        attempt.stage = stage;
        if events {
            let data = json!({"status": stage});
            self.clients.event("MIGRATION", Some(data));
        }
    }

    fn ended(&self, report: Report) {
        let stage = match report.status {
            Status::Completed => Stage::Completed,
            Status::Cancelled => Stage::Cancelled,
            Status::Failed | Status::InDoubt => Stage::Failed,
        };
        if let Some(attempt) = &mut lock(&self.migration).0 {
            attempt.sent.pages = report.pages_sent;
            attempt.sent.zeros = report.zero_pages;
            attempt.sent.bytes = report.bytes_on_wire;
            if stage == Stage::Completed {
                attempt.sent.remaining_pages = 0;
                let last = report.progress.last();
                attempt.sent.downtime_bytes = last.map_or(0, |round| round.bytes);
            }
            attempt.report = Some(report);
        }
        self.becomes(stage);
    }
}

/// Where to, and in which format.
fn destination(monitor: &Monitor, uri: &str) -> Result<(Address, Format), Refusal> {
    let (uri, format) = match uri.strip_prefix("gleaner:") {
        Some(uri) => (uri, Format::Native),
        None => (uri, Format::Qemu(monitor.options.qemu.clone())),
    };
    let address = uri
        .parse()
        .map_err(|e: gleaner_migrate::Error| e.to_string())?;
    Ok((address, format))
}

pub(super) fn migrate(monitor: &Arc<Monitor>, value: Value) -> Result<Value, Refusal> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        uri: String,
        /// Taken and without meaning, as in QEMU.
        #[serde(default)]
        detach: Option<bool>,
        #[serde(default)]
        blk: bool,
        #[serde(default)]
        inc: bool,
        #[serde(default)]
        resume: bool,
    }
    let asked: Arguments = arguments(value)?;
    let _ = asked.detach;
    for (name, is) in [
        ("blk", asked.blk),
        ("inc", asked.inc),
        ("resume", asked.resume),
    ] {
        if is {
            return Err(format!("'{name}' is not there: memory is migrated, by precopy").into());
        }
    }
    let (address, format) = destination(monitor, &asked.uri)?;
    if monitor.watch.state() == GuestState::Away {
        return Err("the guest has migrated away".into());
    }
    let settings = lock(&monitor.settings).clone();
    if settings.auto_converge() && lock(&monitor.limits).is_some() {
        return Err("vCPUs have dirty limits: cancel them, or switch auto-converge off".into());
    }
    let id = MigrationId::random().map_err(|error| error.to_string())?;
    let mut options = SenderOptions::new(id);
    options.name = concat!("gleaner ", env!("CARGO_PKG_VERSION")).into();
    options.format = format;
    options.channels = settings.channels();
    options.throttle = settings.throttle();
    settings.tune(&options.tuning);
    follow(&mut options, monitor);
    {
        let mut migration = lock(&monitor.migration);
        if migration.under_way().is_some() {
            return Err("a migration is under way already".into());
        }
        migration.0 = Some(Attempt {
            stage: Stage::Setup,
            began: Instant::now(),
            setup_ms: 0.0,
            sent: Sent::default(),
            multifd: settings.channels() > 1,
            report: None,
            cancel: options.cancel.clone(),
            tuning: options.tuning.clone(),
        });
        if settings.events {
            let data = json!({"status": Stage::Setup});
            monitor.clients.event("MIGRATION", Some(data));
        }
    }
    let started = monitor.spawn("qmp-migrate", move |monitor| {
        let mut source = Monitored::new(monitor);
        let report = Sender::new(&mut source, options).run_to(&Connector::new(address));
        // First: what it says of where the guest is holds when the end is told.
        drop(source);
        monitor.ended(report);
    });
    if let Err(error) = started {
        lock(&monitor.migration).0 = None;
        return Err(error.into());
    }
    Ok(json!({}))
}

/// Lets a sender tell how far it is.
fn follow(options: &mut SenderOptions, monitor: &Arc<Monitor>) {
    let ticking = Arc::downgrade(monitor);
    options.on_tick = Some(Box::new(move |tick: &Tick| {
        if let Some(monitor) = ticking.upgrade() {
            monitor.sent(|sent| {
                sent.pages = tick.pages_sent;
                sent.zeros = tick.zero_pages;
                sent.bytes = tick.bytes_on_wire;
                sent.remaining_pages = tick.left_pages;
                sent.pages_per_second = tick.pages_per_second;
            });
        }
    }));
    let told = Arc::downgrade(monitor);
    options.on_progress = Some(Box::new(move |round: &Progress| {
        if let Some(monitor) = told.upgrade() {
            monitor.sent(|sent| sent.round(round));
        }
    }));
}

impl Sent {
    fn round(&mut self, round: &Progress) {
        self.remaining_pages = round.remaining_pages;
        self.total_pages = round.total_pages;
        self.dirty_pages_per_second = round.dirty_pages_per_second;
        self.expected_downtime_ms = round.forecast_downtime_ms.map(|ms| ms.likely);
        self.throttle_percent = match round.throttle {
            Throttle::All { percent } => Some(percent),
            Throttle::Off | Throttle::Writers { .. } => None,
        };
    }
}

pub(super) fn cancel(monitor: &Arc<Monitor>, value: Value) -> Result<Value, Refusal> {
    none(value)?;
    let under_way = lock(&monitor.migration).under_way().is_some();
    if under_way {
        monitor.becomes(Stage::Cancelling);
        lock(&monitor.migration).cancel();
    }
    Ok(json!({}))
}
