//! How migrations shall be: `migrate-set-parameters`, `migrate-set-capabilities`, and what asks for them.

use std::sync::Arc;
use std::time::Duration;

use gleaner_migrate::{ThrottleGoal, Tuning};
use serde::Deserialize;
use serde_json::{Value, json};

use super::commands::none;
use super::monitor::{Monitor, lock};
use super::request::{Refusal, arguments};

/// The most that QEMU takes, in milliseconds.
const LONGEST_DOWNTIME: u64 = 2_000_000;

/// How the next migration shall be.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    /// Milliseconds.
    downtime_limit: u64,
    /// Bytes a second; 0 is no limit.
    max_bandwidth: u64,
    multifd_channels: u16,
    multifd: bool,
    auto_converge: bool,
    /// MIGRATION and MIGRATION_PASS are told.
    pub(super) events: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            downtime_limit: 300,
            max_bandwidth: 0,
            multifd_channels: 2,
            multifd: false,
            auto_converge: false,
            events: false,
        }
    }
}

impl Settings {
    pub(super) const fn channels(&self) -> u16 {
        if self.multifd {
            self.multifd_channels
        } else {
            1
        }
    }

    pub(super) const fn auto_converge(&self) -> bool {
        self.auto_converge
    }

    pub(super) const fn throttle(&self) -> ThrottleGoal {
        if self.auto_converge {
            ThrottleGoal::All
        } else {
            ThrottleGoal::Never
        }
    }

    pub(super) fn tune(&self, tuning: &Tuning) {
        tuning.limit_downtime(Duration::from_millis(self.downtime_limit));
        tuning.limit_bandwidth(Some(self.max_bandwidth));
    }
}

pub(super) fn set_parameters(monitor: &Arc<Monitor>, value: Value) -> Result<Value, Refusal> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "kebab-case")]
    struct Arguments {
        downtime_limit: Option<u64>,
        max_bandwidth: Option<u64>,
        multifd_channels: Option<u16>,
    }
    let asked: Arguments = arguments(value)?;
    let mut settings = lock(&monitor.settings);
    let mut changed = settings.clone();
    if let Some(limit) = asked.downtime_limit {
        if limit > LONGEST_DOWNTIME {
            return Err(format!("downtime-limit has to be 0 to {LONGEST_DOWNTIME} ms").into());
        }
        changed.downtime_limit = limit;
    }
    if let Some(limit) = asked.max_bandwidth {
        changed.max_bandwidth = limit;
    }
    if let Some(channels) = asked.multifd_channels {
        if !(1..=gleaner_migrate::wire::MAX_CHANNELS).contains(&channels) {
            let most = gleaner_migrate::wire::MAX_CHANNELS;
            return Err(format!("multifd-channels has to be 1 to {most}").into());
        }
        changed.multifd_channels = channels;
    }
    *settings = changed;
    if let Some(tuning) = lock(&monitor.migration).under_way() {
        settings.tune(tuning);
    }
    Ok(json!({}))
}

pub(super) fn query_parameters(monitor: &Arc<Monitor>, value: Value) -> Result<Value, Refusal> {
    none(value)?;
    let settings = lock(&monitor.settings);
    Ok(json!({
        "downtime-limit": settings.downtime_limit,
        "max-bandwidth": settings.max_bandwidth,
        "multifd-channels": settings.multifd_channels,
        // Steps of the throttle that auto-converge brings.
        "cpu-throttle-initial": 20,
        "cpu-throttle-increment": 10,
        "max-cpu-throttle": 99,
    }))
}

/// What a migration can do, and whether it is on; the others of QEMU's can't be switched on.
const ABSENT: [&str; 12] = [
    "xbzrle",
    "rdma-pin-all",
    "postcopy-ram",
    "x-colo",
    "release-ram",
    "pause-before-switchover",
    "dirty-bitmaps",
    "postcopy-blocktime",
    "late-block-activate",
    "x-ignore-shared",
    "validate-uuid",
    "background-snapshot",
];

pub(super) fn set_capabilities(monitor: &Arc<Monitor>, value: Value) -> Result<Value, Refusal> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Arguments {
        capabilities: Vec<Capability>,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Capability {
        capability: String,
        state: bool,
    }
    let asked: Arguments = arguments(value)?;
    let mut settings = lock(&monitor.settings);
    if lock(&monitor.migration).under_way().is_some() {
        return Err("a migration is under way: its capabilities stay as they are".into());
    }
    let mut changed = settings.clone();
    for Capability { capability, state } in asked.capabilities {
        match (&*capability, state) {
            ("events", state) => changed.events = state,
            ("multifd", state) => changed.multifd = state,
            ("auto-converge", state) => changed.auto_converge = state,
            ("return-path", true) => {}
            ("return-path", false) => {
                return Err(
                    "return-path stays on: without it no page is known to have come".into(),
                );
            }
            (name, false) if ABSENT.contains(&name) => {}
            (name, true) if ABSENT.contains(&name) => {
                return Err(format!("capability '{name}' is not there").into());
            }
            (name, _) => return Err(format!("there is no capability '{name}'").into()),
        }
    }
    *settings = changed;
    Ok(json!({}))
}

pub(super) fn query_capabilities(monitor: &Arc<Monitor>, value: Value) -> Result<Value, Refusal> {
    none(value)?;
    let settings = lock(&monitor.settings);
    let there = [
        ("events", settings.events),
        ("multifd", settings.multifd),
        ("auto-converge", settings.auto_converge),
        ("return-path", true),
    ];
    let absent = ABSENT.map(|name| (name, false));
    let of = |(name, state): &(&str, bool)| json!({"capability": name, "state": state});
    Ok(there.iter().chain(&absent).map(of).collect())
}
