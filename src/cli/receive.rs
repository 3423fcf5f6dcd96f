//! `gleaner receive`: the destination.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use gleaner_migrate::{
    Address, CancelToken, Error, Listener, MigrationId, Outcomes, QemuReceived, Received, Receiver,
    ReceiverOptions, Status,
};

use super::Failure;
use super::doubts::{self, Doubts};
use super::format::Written;
use super::guest::watch;
use super::images;
use super::options::{BackendChoice, TlsOptions, cancel_on_signal};
use super::output::Output;
use crate::Tracking;
use crate::service::ServiceSocket;
use crate::vmm::{IncomingMachine, Machine};

/// The command's options.
#[derive(Debug, Args)]
#[command(
    after_help = "Example: gleaner receive --listen tcp:0.0.0.0:4444 --resume\n\nWith --resume the guest runs on in this process until Ctrl-C, and agents may ask what became of a migration."
)]
pub struct Receive {
    /// Where: tcp:HOST:PORT, unix:PATH, fd:N or file:PATH.
    #[arg(long, value_name = "ADDR")]
    pub listen: Address,
    /// Keep the memory of each block in DIR/<block>.ram, DIR made when it is missing; in memory only unless given. Of a QEMU
    /// that fails or is called off, the files are removed.
    #[arg(long, value_name = "DIR")]
    pub ram_dir: Option<PathBuf>,
    /// What the source writes: native is `gleaner send`; qemu is a stock QEMU, each RAM block of which becomes
    /// DIR/<block>.ram of --ram-dir, and its devices DIR/device-state, as they came. No guest runs of it, so it goes
    /// without --resume, --backend and --control, and without --tls.
    #[arg(long, value_enum, default_value_t = Written::Native)]
    pub format: Written,
    /// Connections of multifd, as many as the source's multifd-channels, 1 to 255; no multifd unless given. Each is
    /// awaited, no other is taken. Only with --format qemu.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..))]
    pub channels: Option<u8>,
    /// Run the guest when it has come.
    #[arg(long)]
    pub resume: bool,
    /// What runs the guest, auto unless given; it has to be what ran it at the source. Only with --resume.
    #[arg(long, value_enum)]
    pub backend: Option<BackendChoice>,
    /// Serve the guest again at this socket, for a second hop. Only with --resume.
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
    #[command(flatten)]
    pub tls: TlsOptions,
    /// Print one JSON object on standard output.
    #[arg(long)]
    pub json: bool,
}

impl Receive {
    /// Receives one guest.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let output = Output { json: self.json };
        if self.format == Written::Qemu {
            return Ok(self.run_qemu(output));
        }
        let ended = self.run_native(output);
        Ok(ended.unwrap_or_else(|failure| {
            note!("gleaner: {}", failure.reason);
            if output.json {
                output.result(&Received::unbegun(failure.reason), String::new);
            }
            ExitCode::FAILURE
        }))
    }

    fn run_native(self, output: Output) -> Result<ExitCode, Failure> {
        let mut destination = IncomingMachine::new();
        if let Some(dir) = &self.ram_dir {
            std::fs::create_dir_all(dir)
                .map_err(|e| output.failure()(format!("--ram-dir {}: {e}", dir.display())))?;
            destination = destination.ram_dir(dir.clone());
        }
        if self.resume {
            destination = destination.resume(
                self.backend.unwrap_or(BackendChoice::Auto).settle(),
                Tracking::Auto,
            );
        }
        let cancel = CancelToken::new();
        cancel_on_signal(&cancel).map_err(output.failure())?;
        let bind = || self.control.as_deref().map(ServiceSocket::bind).transpose();
        // Before the guest comes: one that has come must not be lost for a path that is in use.
        let mut control = bind().map_err(output.failure())?;
        let listener = self.tls.listener(&self.listen).map_err(output.failure())?;
        note!(
            "gleaner: listening at {}",
            listener_name(&self.listen, &listener)
        );
        let options = ReceiverOptions {
            cancel: cancel.clone(),
            ..ReceiverOptions::default()
        };
        let outcomes = options.outcomes.clone();
        let mut doubts = Doubts::default();
        let mut last = None;
        loop {
            if let Some(control) = &control {
                // Before the source can know that the guest runs here, and its user send it on.
                let arriving = control.arriving();
                destination = destination.on_complete(Box::new(move |_| {
                    arriving.cancel();
                    Ok(())
                }));
            }
            let heard = Receiver::new(&mut destination, options.clone())
                .listen_until(&listener, doubts.end());
            let heard = match heard {
                Err(error) if doubts.end().is_some() => {
                    // It must be there to be asked, whatever becomes of others.
                    note!("gleaner: {error}");
                    std::thread::sleep(doubts::RETRY);
                    continue;
                }
                heard => heard.map_err(output.failure())?,
            };
            let Some(received) = heard else {
                break;
            };
            if let Some(id) = received.asked {
                if doubts.settled(id) {
                    break;
                }
                continue;
            }
            if last.is_some() && received.migration_id.is_none() {
                // Called off while nothing came.
                break;
            }
            if received.status == Status::Completed {
                output.result(&received, || summary(&received));
                if let Some(machine) = destination.take_machine() {
                    return Ok(host(&machine, control, &listener, &outcomes, &cancel));
                }
                if let Some(id) = in_doubt(&received, &listener) {
                    doubts.begin(id);
                }
                if doubts.end().is_some() {
                    Doubts::say("its question");
                }
                doubts.wait_out(&listener, &outcomes, &cancel);
                return Ok(ExitCode::SUCCESS);
            }
            let reason = received.reason.as_deref();
            note!("gleaner: {}", reason.unwrap_or("nothing was received"));
            let doubt = in_doubt(&received, &listener);
            if let Some(id) = doubt {
                doubts.begin(id);
                Doubts::say("its question, or another guest,");
            }
            // What is told in the end is about the guest that is awaited, not about whoever came after it.
            if doubt.is_some() || last.is_none() {
                last = Some(received);
            }
            if doubts.end().is_none() {
                break;
            }
            // It has been recorded that this guest never runs here, so another one may come. Until then agents are told that
            // there is none.
            drop(control.take());
            match bind() {
                Ok(again) => control = again,
                Err(error) => {
                    note!("gleaner: no other guest is taken: {error}");
                    break;
                }
            }
        }
        doubts.wait_out(&listener, &outcomes, &cancel);
        if let Some(received) = last {
            output.result(&received, || summary(&received));
        }
        Ok(ExitCode::FAILURE)
    }
}

/// The migration, if its source may ask how it ended.
fn in_doubt(received: &Received, listener: &Listener) -> Option<MigrationId> {
    let id = received.migration_id.filter(|_| received.may_be_asked);
    id.filter(|_| listener.is_socket())
}

impl Receive {
    /// What can't be asked for together, and no attribute of an option can say.
    pub fn check(&self) -> Result<(), String> {
        let problem = match self.format {
            Written::Qemu if self.ram_dir.is_none() => {
                "--format qemu keeps what comes in files: add --ram-dir DIR"
            }
            Written::Qemu if self.resume => "a guest of a QEMU can't run here: leave out --resume",
            Written::Qemu if self.control.is_some() => {
                "a guest of a QEMU can't run here, nor be served: leave out --control"
            }
            Written::Qemu if self.backend.is_some() => {
                "a guest of a QEMU can't run here: leave out --backend"
            }
            Written::Qemu if self.tls.is_asked_for() => {
                "--format qemu goes without TLS: leave out --tls"
            }
            Written::Qemu if self.channels.is_some() && matches!(self.listen, Address::File(_)) => {
                "a file has no connections of multifd: leave out --channels"
            }
            Written::Native if self.control.is_some() && !self.resume => {
                "--control serves a guest that runs here: add --resume"
            }
            Written::Native if self.backend.is_some() && !self.resume => {
                "--backend runs the guest: add --resume"
            }
            Written::Native if self.channels.is_some() => {
                "`gleaner send` says itself how many connections there are: leave out --channels, or add --format qemu"
            }
            Written::Native | Written::Qemu => return Ok(()),
        };
        Err(problem.into())
    }

    fn run_qemu(self, output: Output) -> ExitCode {
        let dir = self.ram_dir.as_deref().unwrap_or(Path::new("."));
        let received = self.receive_qemu(dir);
        let received = received.unwrap_or_else(QemuReceived::unbegun);
        output.result(&received, || images::summary(&received, dir));
        if let Some(reason) = &received.reason {
            note!("gleaner: {reason}");
            return ExitCode::FAILURE;
        }
        ExitCode::SUCCESS
    }

    /// Receives from a stock QEMU.
    fn receive_qemu(&self, dir: &Path) -> gleaner_migrate::Result<QemuReceived> {
        std::fs::create_dir_all(dir)
            .map_err(|e| Error::destination(format!("--ram-dir {}: {e}", dir.display())))?;
        let cancel = CancelToken::new();
        cancel_on_signal(&cancel).map_err(Error::destination)?;
        let listener = Listener::bind(&self.listen)?;
        note!(
            "gleaner: listening at {}",
            listener_name(&self.listen, &listener)
        );
        images::receive(&listener, dir, self.channels.unwrap_or(0), cancel)
    }
}

/// The guest runs here, until the user wants an end.
fn host(
    machine: &Machine,
    control: Option<ServiceSocket>,
    listener: &Listener,
    outcomes: &Outcomes,
    cancel: &CancelToken,
) -> ExitCode {
    let served = control.map(|socket| socket.serve(machine.tracker(), machine.hooks_factory()));
    if let Some(Err(error)) = &served {
        note!("gleaner: the guest runs, but can't be served again: {error}");
    }
    std::thread::scope(|scope| {
        scope.spawn(|| doubts::answer(listener, outcomes, cancel));
        let watched = watch(machine, cancel);
        // The queries end with the guest.
        cancel.cancel();
        match watched {
            Ok(()) => ExitCode::SUCCESS,
            Err(reason) => {
                note!("gleaner: {reason}");
                ExitCode::FAILURE
            }
        }
    })
}

/// Where it listens, the port that was chosen for port 0 included.
fn listener_name(address: &Address, listener: &Listener) -> String {
    match listener.local_addr() {
        Some(local) => format!("tcp:{local}"),
        None => address.to_string(),
    }
}

fn summary(received: &Received) -> String {
    let status = if received.status == Status::Completed {
        "completed"
    } else {
        "not completed"
    };
    let time = received.total_ms;
    let blocks = match received.blocks {
        1 => "1 block".to_owned(),
        blocks => format!("{blocks} blocks"),
    };
    if received.local {
        return format!("{status} on this host: {blocks} taken over in {time:.1} ms");
    }
    let (pages, zeros) = (received.pages, received.zero_pages);
    format!("{status}: {blocks}, {pages} pages and {zeros} zero pages in {time:.0} ms")
}
