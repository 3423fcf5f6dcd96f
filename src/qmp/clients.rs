//! Clients of QMP: each with a thread that reads, and an outbox with a thread that writes.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use gleaner_migrate::{Listener, Stream};
use serde_json::{Value, json};

use super::commands;
use super::monitor::{Monitor, lock};
use super::outbox::{self, Outbox, PATIENCE};
use super::request::{Refusal, Request};
use super::run;
use super::values::{LIMIT, TooLong, Values};
use crate::service::stranger;

/// Clients at a time.
const MOST: usize = 16;
/// Between two tries to accept a connection.
const RETRY: Duration = Duration::from_millis(50);

/// All clients. An event goes to those that have negotiated; nobody waits for one that does not read: when its outbox is
/// full it is hung up on. What it asks waits until it has read what it asked before.
#[derive(Debug, Default)]
pub(super) struct Clients(Mutex<Connected>);

#[derive(Debug, Default)]
struct Connected {
    next: u64,
    clients: BTreeMap<u64, Client>,
}

#[derive(Debug)]
struct Client {
    outbox: Arc<Outbox>,
    stream: UnixStream,
    negotiated: bool,
}

impl Client {
    fn tell(&self, line: Arc<[u8]>) {
        if !self.outbox.push(line) {
            tracing::warn!("a QMP client that does not read is hung up on");
            let _ = self.stream.shutdown(Shutdown::Both);
        }
    }
}

impl Clients {
    /// Tells all of an event.
    pub(super) fn event(&self, name: &str, data: Option<Value>) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.unwrap_or_default();
        let mut event = json!({
            "timestamp": {"seconds": now.as_secs(), "microseconds": now.subsec_micros()},
            "event": name,
        });
        if let Some(data) = data {
            event["data"] = data;
        }
        let event = line(&event);
        let connected = lock(&self.0);
        for client in connected.clients.values().filter(|c| c.negotiated) {
            client.tell(Arc::clone(&event));
        }
    }

    /// Hears no client any more. What was said to each still goes out, if it reads that soon.
    pub(super) fn hang_up(&self) {
        for client in lock(&self.0).clients.values() {
            client.outbox.hang_up();
            let _ = client.stream.shutdown(Shutdown::Read);
        }
    }

    /// Takes a client in: its number, and what is to be written to it.
    fn enter(&self, stream: UnixStream) -> Option<(u64, Arc<Outbox>)> {
        let mut connected = lock(&self.0);
        if connected.clients.len() >= MOST {
            return None;
        }
        let outbox = Arc::<Outbox>::default();
        let number = connected.next;
        connected.next += 1;
        let client = Client {
            outbox: Arc::clone(&outbox),
            stream,
            negotiated: false,
        };
        connected.clients.insert(number, client);
        Some((number, outbox))
    }

    fn leave(&self, number: u64) {
        lock(&self.0).clients.remove(&number);
    }

    fn tell(&self, number: u64, message: Value) {
        if let Some(client) = lock(&self.0).clients.get(&number) {
            client.tell(line(&message));
        }
    }

    /// The client has negotiated; whether it had not before.
    pub(super) fn negotiate(&self, number: u64) -> bool {
        let mut connected = lock(&self.0);
        let client = connected.clients.get_mut(&number);
        client.is_some_and(|client| !std::mem::replace(&mut client.negotiated, true))
    }

    fn has_negotiated(&self, number: u64) -> bool {
        let connected = lock(&self.0);
        connected.clients.get(&number).is_some_and(|c| c.negotiated)
    }
}

/// Serves clients until the monitor ends.
pub(super) fn serve(listener: &Listener, monitor: &Arc<Monitor>) {
    std::thread::scope(|scope| {
        while !monitor.ended.is_cancelled() {
            let stream = match listener.accept_to_greet(&monitor.ended) {
                Ok(Stream::Unix(stream)) => stream,
                Ok(_) | Err(gleaner_migrate::Error::Cancelled) => continue,
                Err(error) => {
                    tracing::warn!(%error, "QMP socket");
                    std::thread::sleep(RETRY);
                    continue;
                }
            };
            let serve = || {
                if let Err(error) = connection(stream, monitor) {
                    tracing::info!(%error, "QMP client");
                }
            };
            if let Err(error) = std::thread::Builder::new().spawn_scoped(scope, serve) {
                tracing::warn!(%error, "no thread for a QMP client");
            }
        }
    });
}

fn connection(mut stream: UnixStream, monitor: &Arc<Monitor>) -> io::Result<()> {
    let refuse = |refusal: String| {
        let refusal = line(&Refusal::from(refusal).answer());
        outbox::write(&stream, &refusal, Instant::now() + PATIENCE)
    };
    if let Some(refusal) = stranger(&stream)? {
        return refuse(refusal);
    }
    let Some((number, outbox)) = monitor.clients.enter(stream.try_clone()?) else {
        let refusal = format!("{MOST} clients are connected already: end one of them");
        return refuse(refusal);
    };
    let entered = Entered {
        monitor,
        number,
        outbox: Arc::clone(&outbox),
        quits: Cell::new(false),
    };
    // Whoever ended the monitor may have looked before there was somebody to hang up on.
    if monitor.ended.is_cancelled() {
        return Ok(());
    }
    let out = stream.try_clone()?;
    std::thread::scope(|scope| {
        std::thread::Builder::new().spawn_scoped(scope, move || outbox.write(&out))?;
        let read = entered.read(&mut stream);
        // With it ends the thread that writes.
        drop(entered);
        read
    })
}

/// A client that is connected, until this is dropped.
struct Entered<'a> {
    monitor: &'a Arc<Monitor>,
    number: u64,
    outbox: Arc<Outbox>,
    /// It has said quit, and has no answer yet.
    quits: Cell<bool>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.monitor.clients.leave(self.number);
        self.outbox.complete();
    }
}

impl Entered<'_> {
    fn tell(&self, message: Value) {
        self.monitor.clients.tell(self.number, message);
    }

    /// Reads what the client asks until it hangs up.
    fn read(&self, stream: &mut UnixStream) -> io::Result<()> {
        self.tell(commands::greeting());
        let mut values = Values::default();
        let mut bytes = [0; 4096];
        loop {
            let got = match stream.read(&mut bytes) {
                Ok(0) => return Ok(()),
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let fed = values.feed(&bytes[..got], |value| {
                // One that is not read any more has nothing to ask.
                if self.outbox.wait_read() {
                    self.tell(self.answer(value));
                }
                if self.quits.take() {
                    run::quit(self.monitor);
                }
            });
            if let Err(TooLong) = fed {
                let refusal = format!("a command is longer than {LIMIT} bytes");
                self.tell(Refusal::from(refusal).answer());
                return Ok(());
            }
        }
    }

    fn answer(&self, value: Result<Value, String>) -> Value {
        let (id, answer) = match value {
            Err(error) => (None, Err(error.into())),
            Ok(value) => {
                let (id, request) = Request::of(value);
                (id, request.and_then(|request| self.execute(request)))
            }
        };
        let mut answer = match answer {
            Ok(value) => json!({"return": value}),
            Err(refusal) => refusal.answer(),
        };
        if let Some(id) = id {
            answer["id"] = id;
        }
        answer
    }

    fn execute(&self, request: Request) -> Result<Value, Refusal> {
        let negotiated = self.monitor.clients.has_negotiated(self.number);
        if request.execute == commands::NEGOTIATE {
            if negotiated {
                return Err(Refusal::no_command("capabilities were negotiated already"));
            }
            commands::negotiate(request.arguments)?;
            self.monitor.clients.negotiate(self.number);
            return Ok(json!({}));
        }
        if !negotiated {
            let text = "capabilities have to be negotiated first, with 'qmp_capabilities'";
            return Err(Refusal::no_command(text));
        }
        let quits = request.execute == commands::QUIT;
        let answer = commands::execute(self.monitor, request)?;
        self.quits.set(quits);
        Ok(answer)
    }
}

/// A message as it goes over the socket.
fn line(message: &Value) -> Arc<[u8]> {
    format!("{message}\r\n").into_bytes().into()
}
