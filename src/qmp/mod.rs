//! QMP: the tracker for tools that speak QEMU's machine protocol.
//!
//! ```text
//!  client --> Values --> Request --> COMMANDS ----> run         stop, cont, query-status, quit
//!    ^        JSON out                       |----> rate        calc-dirty-rate, query-dirty-rate
//!    |        of bytes                       |----> limit       set-, cancel-, query-vcpu-dirty-limit
//!    |                                       |----> settings    migrate-set-*, query-migrate-*
//!  outbox <-- answers                        +----> migration   migrate, migrate_cancel, query-migrate
//!     ^------ events of the guest and of migrations, to all who negotiated
//! ```
//!
//! Names, types, classes of errors and the order of events are QEMU 7.2's; what later versions added (`calc-time-unit`) is
//! taken too. It is the subset that migration and dirty-rate tools use. What differs:
//!
//! * Several clients are served at once, and each gets all events.
//! * `migrate` takes QEMU's URIs `tcp:`, `unix:` and `file:`, and writes QEMU's stream: memory, without the state of
//!   devices and vCPUs. `gleaner:` before one of them writes Gleaner's own, for a [`Receiver`](crate::migrate::Receiver)
//!   that goes on with the guest. There is no `getfd`, and so no `fd:`.
//! * `set-vcpu-dirty-limit` is refused during a migration with `auto-converge`, as that is with dirty limits: both throttle.
//! * A guest that has migrated away does not go on here, whatever `cont` asks for: there would be two of it. Nor does one
//!   that may run elsewhere: its migration is `failed`, and `error-desc` says that it is in doubt.
//! * `max-bandwidth` is 0, no limit, unless it is set; `return-path` is on where the destination can answer.
//! * `downtime-limit` and `max-bandwidth` change a migration that is under way, as they do in QEMU.
//! * A dirty rate in the modes `dirty-bitmap` and `dirty-ring` has a consumer of its own in the dirty store. During a
//!   migration it shares the migration's harvests and takes nothing from it.
//! * Strings stand in double quotes, as JSON has them.
//!
//! What is not there, of which a client hears as of a QEMU that does not have it, and nothing changes:
//!
//! * Commands: there are `qmp_capabilities`, `query-version`, `query-commands`, `query-status`, `stop`, `cont`, `quit`,
//!   `calc-dirty-rate`, `query-dirty-rate`, `set-vcpu-dirty-limit`, `cancel-vcpu-dirty-limit`, `query-vcpu-dirty-limit`,
//!   `migrate`, `migrate_cancel`, `query-migrate`, `migrate-set-parameters`, `query-migrate-parameters`,
//!   `migrate-set-capabilities` and `query-migrate-capabilities`. None of devices, disks, objects, balloons or snapshots; no
//!   `human-monitor-command`, no `system_reset`; no `query-qmp-schema`, so what a command takes can't be asked.
//! * Commands out of band (`exec-oob`): `migrate_cancel` waits behind the commands before it, none of which takes long.
//! * Migrations to here (`migrate-incoming`): a destination is [`Receiver`](crate::migrate::Receiver). Nor
//!   `migrate-continue`, `-pause`, `-recover` and `-start-postcopy`: it is precopy, and switches over by itself.
//! * URIs `exec:`, `rdma:` and `fd:`, TLS, and `migrate`'s `blk`, `inc` and `resume`.
//! * Parameters other than `downtime-limit`, `max-bandwidth` and `multifd-channels`: the steps of auto-converge are told, and
//!   stay as they are. Of the capabilities `events`, `multifd` and `auto-converge` can be changed.
//! * Events other than `STOP`, `RESUME`, `SHUTDOWN`, `MIGRATION` and `MIGRATION_PASS`; states of a guest other than `running`,
//!   `paused`, `finish-migrate` and `postmigrate`; of a migration, the states of postcopy, `device` and `pre-switchover`.
//!
//! What is known to fall short:
//!
//! * `query-migrate` counts on the whole: `transferred` has all bytes of the stream, `multifd-bytes` the pages' contents alone;
//!   `skipped` is always 0, and so is `expected-downtime` while none can be told.
//! * A dirty rate that could not be measured is `unstarted` again, and only the VMM's log says why.
//! * `page-sampling` misses pages that are written with what they held, as QEMU's does. Modes `dirty-ring` and dirty limits take
//!   a tracker with dirty rings, and limits hold in each second on average: a vCPU may be over its own for one.
//! * A client that reads too slowly is hung up on, with answers unread; 16 may be connected, and a command may have 1 MiB.

mod clients;
mod commands;
mod distinct;
mod limit;
mod migration;
mod monitor;
mod outbox;
mod rate;
mod request;
mod run;
mod sampling;
mod settings;
mod source;
mod statistics;
mod values;

use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use gleaner_migrate::{Address, CancelToken, Listener, QemuOptions};

use crate::Result;
use crate::service::Service;
use monitor::Monitor;

/// What QMP can't ask.
#[derive(Clone, Debug, Default)]
pub struct QmpOptions {
    /// What a QEMU that a guest is migrated to has to be told.
    pub qemu: QemuOptions,
    /// Used when a client says `quit`: it is the VMM that ends.
    pub quit: CancelToken,
}

/// A QMP socket. Dropping it hangs up on its clients, cancels a migration that they began and waits for its end, and lets a
/// guest go on that they stopped.
#[derive(Debug)]
pub struct Qmp {
    monitor: Arc<Monitor>,
    door: Option<JoinHandle<()>>,
}

impl Service {
    /// Serves QMP at the Unix socket `path`, mode 0600, for the guest of this service. An agent's migration and one that
    /// QMP began know nothing of each other; whichever comes second to stop the guest fails, and leaves it as it is.
    ///
    /// # Errors
    /// [`Error::Migrate`](crate::Error::Migrate) when `path` is in use or can't be bound;
    /// [`Error::Thread`](crate::Error::Thread).
    pub fn serve_qmp(&self, path: &Path, options: QmpOptions) -> Result<Qmp> {
        let listener = Listener::bind(&Address::Unix(path.to_path_buf()))?;
        let monitor = Monitor::new(self, options);
        let at_door = Arc::clone(&monitor);
        let door = std::thread::Builder::new()
            .name("qmp".into())
            .spawn(move || clients::serve(&listener, &at_door))
            .map_err(|source| crate::Error::Thread {
                name: "qmp",
                source,
            })?;
        Ok(Qmp {
            monitor,
            door: Some(door),
        })
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        self.monitor.ended.cancel();
        self.monitor.clients.hang_up();
        if let Some(door) = self.door.take() {
            // A thread that panicked has said so.
            let _ = door.join();
        }
        self.monitor.end();
    }
}
