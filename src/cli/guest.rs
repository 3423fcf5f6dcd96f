//! `gleaner guest`: a reference guest with the service.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use gleaner_migrate::CancelToken;

use super::Failure;
use super::format::{QemuVersion, qemu_options};
use super::options::{GuestOptions, cancel_on_signal};
use super::output::Output;
use super::units;
use crate::qmp::QmpOptions;
use crate::service::Service;
use crate::vmm::{Machine, MachineStatus};

/// How often the machine's status is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// The command's options.
#[derive(Debug, Args)]
#[command(
    after_help = "Example: gleaner guest --control /tmp/g.sock --ram 1G --workload hot:64M --churn 100\n\nAfter the guest has migrated away it stays stopped, its RAM file untouched. Ctrl-C ends it; a second one at once.\n\nWith QMP: gleaner guest --control /tmp/g.sock --qmp unix:/tmp/g.qmp --tracking ring"
)]
pub struct Guest {
    /// Socket of the service.
    #[arg(long, value_name = "PATH")]
    pub control: PathBuf,
    /// Serve QEMU's machine protocol (QMP) at this Unix socket: unix:PATH.
    #[arg(long, value_name = "unix:PATH", value_parser = units::unix_path)]
    pub qmp: Option<PathBuf>,
    /// Machine of the QEMU that QMP's migrate reaches, with its version: none, pc-i440fx-7.2. None unless given.
    #[arg(long, value_name = "NAME", requires = "qmp", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub machine: Option<String>,
    /// Version of that QEMU, which matters with multifd: 7.2 is any before 8.1, 9 any from 8.1 on. The default is 9.
    #[arg(long, value_enum, value_name = "V", requires = "qmp")]
    pub qemu_version: Option<QemuVersion>,
    #[command(flatten)]
    pub guest: GuestOptions,
}

impl Guest {
    /// Runs the guest until it is ended.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let output = Output { json: false };
        let mut machine = Machine::new(&self.guest.machine(None)).map_err(output.failure())?;
        let cancel = CancelToken::new();
        cancel_on_signal(&cancel).map_err(output.failure())?;
        let hooks = machine.hooks_factory();
        let service =
            Service::serve(machine.tracker(), &self.control, hooks).map_err(output.failure())?;
        let qmp = QmpOptions {
            qemu: qemu_options(self.machine.as_deref(), self.qemu_version),
            quit: cancel.clone(),
        };
        let qmp = self
            .qmp
            .map(|path| service.serve_qmp(&path, qmp))
            .transpose();
        let qmp = qmp.map_err(output.failure())?;
        machine.start();
        note!(
            "gleaner: guest runs on {} with {} tracking, service at {}",
            machine.backend(),
            machine.tracker().mode(),
            service.path().display()
        );
        watch(&machine, &cancel).map_err(output.failure())?;
        drop(qmp);
        drop(service);
        Ok(ExitCode::SUCCESS)
    }
}

/// Returns when the user wants an end; an error when the guest failed.
pub fn watch(machine: &Machine, cancel: &CancelToken) -> Result<(), String> {
    let mut said = MachineStatus::Running;
    while !cancel.is_cancelled() {
        let status = machine.status();
        if status != said {
            match &status {
                MachineStatus::Running => {}
                MachineStatus::MigratedAway => {
                    note!("gleaner: the guest has migrated away, it stays stopped here")
                }
                MachineStatus::Failed(reason) => return Err(reason.clone()),
            }
            said = status;
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}
