//! `gleaner receive`: the destination.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use gleaner_migrate::{
    Address, CancelToken, Listener, Outcomes, Received, Receiver, ReceiverOptions, Status,
    serve_query,
};

use super::Failure;
use super::guest::watch;
use super::options::cancel_on_signal;
use super::output::Output;
use crate::Tracking;
use crate::service::ServiceSocket;
use crate::vmm::{IncomingMachine, Machine};

/// How long a peer that asks may be silent.
const QUERY_PATIENCE: Duration = Duration::from_secs(10);

/// The command's options.
#[derive(Debug, Args)]
#[command(
    after_help = "Example: gleaner receive --listen tcp:0.0.0.0:4444 --resume\n\nWith --resume the guest runs on in this process until Ctrl-C, and agents may ask what became of a migration."
)]
pub struct Receive {
    /// Where: tcp:HOST:PORT, unix:PATH, fd:N or file:PATH.
    #[arg(long, value_name = "ADDR")]
    pub listen: Address,
    /// Keep the memory of each block in DIR/<block>.ram; in memory only unless given.
    #[arg(long, value_name = "DIR")]
    pub ram_dir: Option<PathBuf>,
    /// Run the guest when it has come.
    #[arg(long)]
    pub resume: bool,
    /// Serve the guest again at this socket, for a second hop.
    #[arg(long, value_name = "PATH", requires = "resume")]
    pub control: Option<PathBuf>,
    /// Print one JSON object on standard output.
    #[arg(long)]
    pub json: bool,
}

impl Receive {
    /// Receives one guest.
    pub fn run(self) -> Result<ExitCode, Failure> {
        let output = Output { json: self.json };
        let mut destination = IncomingMachine::new();
        if let Some(dir) = self.ram_dir {
            std::fs::create_dir_all(&dir)
                .map_err(|e| output.failure()(format!("{}: {e}", dir.display())))?;
            destination = destination.ram_dir(dir);
        }
        if self.resume {
            destination = destination.resume(Tracking::Auto);
        }
        let cancel = CancelToken::new();
        cancel_on_signal(&cancel).map_err(output.failure())?;
        // Before the guest comes: one that has come must not be lost for a path that is in use.
        let control = self
            .control
            .as_deref()
            .map(ServiceSocket::bind)
            .transpose()
            .map_err(output.failure())?;
        let listener = Listener::bind(&self.listen).map_err(output.failure())?;
        eprintln!(
            "gleaner: listening at {}",
            listener_name(&self.listen, &listener)
        );
        let options = ReceiverOptions {
            cancel: cancel.clone(),
            ..ReceiverOptions::default()
        };
        let outcomes = options.outcomes.clone();
        let received = Receiver::new(&mut destination, options)
            .listen(&listener)
            .map_err(output.failure())?;
        output.result(&received, || summary(&received));
        if received.status != Status::Completed {
            eprintln!(
                "gleaner: {}",
                received.reason.as_deref().unwrap_or("nothing was received")
            );
            return Ok(ExitCode::FAILURE);
        }
        // The result has been told: from here on there is only standard error.
        Ok(match destination.take_machine() {
            Some(machine) => host(&machine, control, &listener, &outcomes, &cancel),
            None => ExitCode::SUCCESS,
        })
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
        eprintln!("gleaner: the guest runs, but can't be served again: {error}");
    }
    std::thread::scope(|scope| {
        scope.spawn(|| answer_queries(listener, outcomes, cancel));
        let watched = watch(machine, cancel);
        // The queries end with the guest.
        cancel.cancel();
        match watched {
            Ok(()) => ExitCode::SUCCESS,
            Err(reason) => {
                eprintln!("gleaner: {reason}");
                ExitCode::FAILURE
            }
        }
    })
}

/// Answers sources that are in doubt.
fn answer_queries(listener: &Listener, outcomes: &Outcomes, cancel: &CancelToken) {
    if !listener.is_socket() {
        return;
    }
    while let Ok(stream) = listener.accept_until(cancel) {
        if let Err(error) = serve_query(stream, outcomes, QUERY_PATIENCE) {
            tracing::info!(%error, "query");
        }
    }
}

/// Where it listens, the port that was chosen for port 0 included.
fn listener_name(address: &Address, listener: &Listener) -> String {
    match listener.local_addr() {
        Some(local) => format!("tcp:{local}"),
        None => address.to_string(),
    }
}

fn summary(received: &Received) -> String {
    format!(
        "{}: {} blocks, {} pages and {} zero pages in {:.0} ms",
        if received.status == Status::Completed {
            "completed"
        } else {
            "not completed"
        },
        received.blocks,
        received.pages,
        received.zero_pages,
        received.total_ms
    )
}
