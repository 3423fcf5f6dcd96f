//! `gleaner receive`: the destination.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use gleaner_migrate::{
    Address, CancelToken, Listener, Received, Receiver, ReceiverOptions, Status, serve_query,
};

use super::Failure;
use super::guest::watch;
use super::options::cancel_on_signal;
use super::output::Output;
use crate::Tracking;
use crate::service::Service;
use crate::vmm::IncomingMachine;

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
        let Some(machine) = destination.take_machine() else {
            return Ok(ExitCode::SUCCESS);
        };
        let service = match &self.control {
            Some(path) => Some(
                Service::serve(machine.tracker(), path, machine.hooks_factory())
                    .map_err(output.failure())?,
            ),
            None => None,
        };
        std::thread::Builder::new()
            .name("queries".into())
            .spawn(move || {
                while let Ok(stream) = listener.accept() {
                    if let Err(error) = serve_query(stream, &outcomes, QUERY_PATIENCE) {
                        tracing::info!(%error, "query");
                    }
                }
            })
            .map_err(output.failure())?;
        watch(&machine, &cancel).map_err(output.failure())?;
        drop(service);
        Ok(ExitCode::SUCCESS)
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
