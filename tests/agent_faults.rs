//! Wherever the agent's connection to the service breaks: the guest never runs at both ends, and where it runs on at the
//! source it migrates the next time, whole.

#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use common::{bytes_of, kvm, machine};
use gleaner::Tracking;
use gleaner::migrate::{
    MigrationId, Outcome, Outcomes, Receiver, ReceiverOptions, Report, Sender, SenderOptions,
    Status, Stream, resolve,
};
use gleaner::service::{Attach, Service, ServiceClient};
use gleaner::vmm::guest::Workload;
use gleaner::vmm::{Backend, IncomingMachine, Machine};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// What happens to a message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    /// The connection ends before it, in the middle of its length or of what it says, or after it.
    Cut(Part),
    /// It comes in pieces, and everything after it.
    Pieces,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Part {
    Nothing,
    HalfALength,
    Half,
    All,
}

const FAULTS: [Fault; 5] = [
    Fault::Cut(Part::Nothing),
    Fault::Cut(Part::HalfALength),
    Fault::Cut(Part::Half),
    Fault::Cut(Part::All),
    Fault::Pieces,
];

/// Requests of an attempt by their numbers on the wire, in the order in which they first come.
const REQUESTS: [(u8, &str); 11] = [
    (0, "hello"),
    (3, "harvest"),
    (1, "layout"),
    (4, "lease"),
    (2, "block"),
    (5, "ack"),
    (7, "stop"),
    (8, "state"),
    (9, "relinquish"),
    (12, "transactions"),
    (10, "complete"),
];

/// Where it happens: to the first request of a kind, or to its answer.
#[derive(Clone, Copy, Debug)]
struct Point {
    request: u8,
    answer: bool,
    fault: Fault,
}

/// A message as it is on the wire, and the descriptor that came along.
fn message(from: &mut UnixStream) -> Option<(Vec<u8>, Option<OwnedFd>)> {
    let mut bytes = vec![0; 4];
    let (got, fd) = from.recv_with_fd(&mut bytes[..]).ok()?;
    if got == 0 {
        return None;
    }
    from.read_exact(&mut bytes[got..]).ok()?;
    let length = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    bytes.resize(4 + usize::try_from(length).unwrap(), 0);
    from.read_exact(&mut bytes[4..]).ok()?;
    Some((bytes, fd.map(OwnedFd::from)))
}

fn send(to: &mut UnixStream, bytes: &[u8], fd: Option<&OwnedFd>) -> std::io::Result<()> {
    let Some((first, rest)) = bytes.split_first() else {
        return Ok(());
    };
    match fd {
        Some(fd) => to.send_with_fd(&[*first][..], fd.as_raw_fd()).map(drop)?,
        None => to.write_all(&[*first])?,
    }
    to.write_all(rest)
}

/// Stands between an agent and the service. Joined, it tells whether the point was reached.
fn between(at: &Path, service: PathBuf, point: Point) -> JoinHandle<bool> {
    let listener = UnixListener::bind(at).unwrap();
    std::thread::spawn(move || {
        let (mut agent, _) = listener.accept().unwrap();
        let mut service = UnixStream::connect(service).unwrap();
        let (mut reached, mut pieces) = (false, false);
        // One asks, the other answers: one after the other.
        'session: while let Some((request, _)) = message(&mut agent) {
            let kind = request[4];
            for answer in [false, true] {
                let (bytes, fd) = if answer {
                    let Some(answer) = message(&mut service) else {
                        break 'session;
                    };
                    answer
                } else {
                    (request.clone(), None)
                };
                let to = if answer { &mut agent } else { &mut service };
                let here = !reached && kind == point.request && answer == point.answer;
                reached |= here;
                pieces |= here && point.fault == Fault::Pieces;
                let through = match point.fault {
                    Fault::Cut(part) if here => match part {
                        Part::Nothing => 0,
                        Part::HalfALength => 2,
                        Part::Half => 4 + (bytes.len() - 4) / 2,
                        Part::All => bytes.len(),
                    },
                    _ => bytes.len(),
                };
                let mut fd = fd;
                let step = if pieces { 7 } else { through.max(1) };
                for piece in bytes[..through].chunks(step) {
                    if send(to, piece, fd.take().as_ref()).is_err() {
                        break 'session;
                    }
                }
                if here && matches!(point.fault, Fault::Cut(_)) {
                    break 'session;
                }
            }
        }
        let _ = agent.shutdown(Shutdown::Both);
        let _ = service.shutdown(Shutdown::Both);
        reached
    })
}

/// A guest with its service.
struct Host {
    machine: Machine,
    service: Service,
    dir: tempfile::TempDir,
}

impl Host {
    fn new(tracking: Tracking) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut machine = machine(tracking, 4 << 20, Workload::Sweep, 3);
        let control = dir.path().join("control");
        let hooks = machine.hooks_factory();
        let service = Service::serve(machine.tracker(), &control, hooks).unwrap();
        machine.start();
        Self {
            machine,
            service,
            dir,
        }
    }

    fn writes(&self) -> u64 {
        self.machine.guest_writes().unwrap()
    }

    /// Waits until the guest has written.
    fn assert_runs(&self) {
        let before = self.writes();
        let end = std::time::Instant::now() + Duration::from_secs(60);
        while self.writes() == before {
            assert!(std::time::Instant::now() < end, "the guest stands still");
            std::thread::yield_now();
        }
    }

    /// An attempt by an agent that reaches the service at `path`: what it says, and what the destination knows.
    fn attempt(&self, path: &Path) -> Option<(Report, Outcome, IncomingMachine)> {
        let id = MigrationId::random().unwrap();
        let Ok(Attach::Ready(mut source)) = ServiceClient::attach(path, id) else {
            return None;
        };
        let (near, far) = UnixStream::pair().unwrap();
        let ram = self.machine.ram().clone();
        let mut destination = IncomingMachine::new()
            .resume(Backend::Kvm, Tracking::Auto)
            .on_complete(Box::new(move |blocks| {
                let same = bytes_of(&blocks["ram"]) == bytes_of(&ram);
                same.then_some(()).ok_or("pages differ".into())
            }));
        let outcomes = Outcomes::default();
        let options = ReceiverOptions {
            outcomes: outcomes.clone(),
            ..ReceiverOptions::default()
        };
        let report = std::thread::scope(|scope| {
            scope.spawn(|| Receiver::new(&mut destination, options).run(Stream::from(far)));
            Sender::new(&mut source, SenderOptions::new(id)).run(Stream::from(near))
        });
        Some((report, outcomes.get(id), destination))
    }

    /// Whoever comes next, directly.
    fn ask(&self) -> gleaner::Result<Attach> {
        ServiceClient::attach(self.service.path(), MigrationId::random().unwrap())
    }
}

/// What an attempt that met a fault leaves behind is as it should be; whether the guest is at the source.
fn check(host: &Host, attempt: Option<(Report, Outcome, IncomingMachine)>, what: &str) -> bool {
    let Some((report, outcome, mut destination)) = attempt else {
        return true; // it never began
    };
    assert!(
        report.status == Status::Completed || report.error.is_some(),
        "{what}"
    );
    let differ = report.reason.as_ref().is_some_and(|r| r.contains("differ"));
    assert!(!differ, "{what}: {report:?}");
    let arrived = destination.take_machine();
    assert_eq!(
        arrived.is_some(),
        outcome == Outcome::Running,
        "{what}: {report:?}"
    );
    match report.status {
        Status::Completed => assert!(arrived.is_some(), "{what}: {report:?}"),
        Status::Failed => assert!(arrived.is_none(), "{what}: {report:?}"),
        _ => assert_eq!(report.status, Status::InDoubt, "{what}: {report:?}"),
    }
    // Asking again ends a doubt, wherever there is one.
    match host.ask() {
        Ok(Attach::InDoubt(mut source, id)) => {
            assert_eq!(id, report.migration_id, "{what}");
            let stopped = host.writes();
            let resolved = resolve(&mut source, outcome).unwrap();
            let moved = arrived.is_some();
            assert_eq!(resolved == Status::Completed, moved, "{what}: {report:?}");
            assert!(!moved || host.writes() == stopped, "{what}");
        }
        Ok(Attach::Ready(source)) => {
            assert!(arrived.is_none(), "two guests: {what}: {report:?}");
            drop(source);
        }
        Err(error) => {
            assert!(
                error.to_string().contains("has migrated away"),
                "{what}: {error}"
            );
            assert!(arrived.is_some(), "no guest: {what}: {report:?}");
        }
    }
    arrived.is_none()
}

#[test]
fn each_request_and_each_answer_fails_in_turn() {
    if !kvm() {
        return;
    }
    let mut host = Host::new(Tracking::Auto);
    let mut n = 0;
    for (request, name) in REQUESTS {
        for answer in [false, true] {
            for fault in FAULTS {
                let point = Point {
                    request,
                    answer,
                    fault,
                };
                let what = format!("{name}: {point:?}");
                n += 1;
                let path = host.dir.path().join(format!("line{n}"));
                let line = between(&path, host.service.path().into(), point);
                let attempt = host.attempt(&path);
                assert!(line.join().unwrap(), "{what}: not reached");
                let whole = attempt
                    .as_ref()
                    .is_some_and(|a| a.0.status == Status::Completed);
                assert!(whole || fault != Fault::Pieces, "{what}");
                if check(&host, attempt, &what) {
                    host.assert_runs();
                } else {
                    host = Host::new(Tracking::Auto);
                }
            }
        }
        // What went before has left nothing behind.
        let (report, outcome, _there) = host.attempt(host.service.path()).unwrap();
        assert_eq!(
            report.status,
            Status::Completed,
            "{name}: {:?}",
            report.reason
        );
        assert_eq!(outcome, Outcome::Running);
        host = Host::new(Tracking::Auto);
    }
}
