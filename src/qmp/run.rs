//! Whether the guest runs.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use super::commands::none;
use super::monitor::{Monitor, lock};
use super::request::Refusal;
use crate::service::GuestState;
use crate::{Error, Hooks, StoppedGuest};

/// A guest that a client has stopped.
pub(super) struct Pause {
    pub(super) stopped: StoppedGuest,
    pub(super) hooks: Box<dyn Hooks>,
}

impl Pause {
    /// Lets it go on.
    pub(super) fn resume(mut self) {
        self.hooks.resume();
        drop(self.stopped);
    }
}

const BY_A_MIGRATION: &str = "a migration has stopped the guest: wait until it has ended; of one in doubt the guest may run elsewhere";

pub(super) fn query(monitor: &Arc<Monitor>, value: Value) -> Result<Value, Refusal> {
    none(value)?;
    let paused = lock(&monitor.paused).is_some();
    let status = match monitor.watch.state() {
        GuestState::Running => "running",
        GuestState::Stopped if paused => "paused",
        GuestState::Stopped => "finish-migrate",
        GuestState::Away => "postmigrate",
    };
    let running = status == "running";
    Ok(json!({"running": running, "singlestep": false, "status": status}))
}

pub(super) fn stop(monitor: &Arc<Monitor>, value: Value) -> Result<Value, Refusal> {
    none(value)?;
    let mut paused = lock(&monitor.paused);
    if paused.is_none() && monitor.watch.state() != GuestState::Away {
        let mut hooks = monitor.hooks.make();
        let stopped = monitor.tracker.stop(|| hooks.pause_devices());
        *paused = match stopped {
            Ok(stopped) => Some(Pause { stopped, hooks }),
            Err(Error::AlreadyStopped) => return Err(BY_A_MIGRATION.into()),
            Err(error) => {
                // Some devices may be paused already; the guest runs.
                hooks.resume();
                return Err(error.into());
            }
        };
    }
    Ok(json!({}))
}

pub(super) fn cont(monitor: &Arc<Monitor>, value: Value) -> Result<Value, Refusal> {
    none(value)?;
    // Held, so that nobody stops a guest that is about to go on.
    let mut paused = lock(&monitor.paused);
    match (paused.take(), monitor.watch.state()) {
        (Some(pause), _) => pause.resume(),
        (None, GuestState::Running) => {}
        (None, GuestState::Stopped) => return Err(BY_A_MIGRATION.into()),
        (None, GuestState::Away) => return Err("the guest has migrated away: it runs there".into()),
    }
    Ok(json!({}))
}

/// Ends the VMM, for a client that has the answer to its `quit` by now. Whoever else says quit says nothing new.
pub(super) fn quit(monitor: &Monitor) {
    let first = !monitor.quitting.swap(true, Ordering::Relaxed);
    if first && !monitor.options.quit.is_cancelled() {
        let data = json!({"guest": false, "reason": "host-qmp-quit"});
        monitor.clients.event("SHUTDOWN", Some(data));
        monitor.options.quit.cancel();
    }
}
