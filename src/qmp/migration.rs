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

impl Attempt {
    /// It has got so far, if that is news: it does not go back, and what is over stays so.
    fn becomes(&mut self, stage: Stage) -> Option<Stage> {
        let before = self.stage;
        let back = stage == Stage::Active && before != Stage::Setup;
        if before == stage || before.is_over() || back {
            return None;
        }
        if before == Stage::Setup {
            self.setup_ms = self.began.elapsed().as_secs_f64() * 1e3;
        }
        self.stage = stage;
        Some(stage)
    }
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

    /// The migration has got so far.
    fn becomes(&self, stage: Stage) {
        let events = lock(&self.settings).events;
        if let Some(attempt) = &mut lock(&self.migration).0 {
            self.tell(attempt.becomes(stage).filter(|_| events));
        }
    }

    /// Tells that a migration has got so far, if that is to be told.
    fn tell(&self, news: Option<Stage>) {
        if let Some(stage) = news {
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
    if let Address::Fd(_) = address {
        // None but the VMM's own are there, the guest's memory among them.
        return Err("'fd:' is not there: no descriptor can be passed by 'getfd'".into());
    }
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
    let id = MigrationId::random().map_err(|error| error.to_string())?;
    let mut options = SenderOptions::new(id);
    options.name = concat!("gleaner ", env!("CARGO_PKG_VERSION")).into();
    options.format = format;
    follow(&mut options, monitor);
    {
        // Both held, so that who changes either finds the migration under way, or was before it.
        let settings = lock(&monitor.settings);
        let mut migration = lock(&monitor.migration);
        if migration.under_way().is_some() {
            return Err("a migration is under way already".into());
        }
        if settings.auto_converge() && lock(&monitor.limits).hold() {
            return Err("vCPUs have dirty limits: cancel them, or switch auto-converge off".into());
        }
        options.channels = settings.channels();
        options.throttle = settings.throttle();
        settings.tune(&options.tuning);
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
    let events = lock(&monitor.settings).events;
    // Held, so that nothing ends in between: what is over is not called off any more.
    let mut migration = lock(&monitor.migration);
    if let Some(attempt) = migration
        .0
        .as_mut()
        .filter(|attempt| !attempt.stage.is_over())
    {
        monitor.tell(attempt.becomes(Stage::Cancelling).filter(|_| events));
        attempt.cancel.cancel();
    }
    Ok(json!({}))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Stage; 6] = [
        Stage::Setup,
        Stage::Active,
        Stage::Cancelling,
        Stage::Cancelled,
        Stage::Completed,
        Stage::Failed,
    ];

    #[test]
    fn a_migration_that_is_over_stays_so_whoever_calls_it_off() {
        for over in ALL.into_iter().filter(|stage| stage.is_over()) {
            for stage in ALL {
                let mut attempt = Attempt {
                    stage: over,
                    began: Instant::now(),
                    setup_ms: 0.0,
                    sent: Sent::default(),
                    multifd: false,
                    report: None,
                    cancel: CancelToken::new(),
                    tuning: Tuning::default(),
                };
                assert_eq!(attempt.becomes(stage), None, "{over:?} to {stage:?}");
                assert_eq!(attempt.stage, over);
            }
        }
    }
}
