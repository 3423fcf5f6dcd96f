//! Wherever the line breaks: the guest never runs at both ends, and whoever asks again learns where it is.

use rustix::process::Signal;

use crate::common::kvm;
use crate::harness::*;
use crate::proxy::*;

/// Both ends, after the line between them broke.
struct Broken {
    place: Place,
    guest: Guest,
    receive: Receive,
    sent: Ended,
}

/// Migrates `guest` to a destination that would run it, over a line that breaks.
fn migrate(place: Place, guest: Guest, n: usize, kind: u8, part: Part) -> Broken {
    let name = format!("there{n}");
    let receive = Receive::start(&place, &name, &["--resume"]);
    let line = place.path(&format!("line{n}"));
    let socket = place.path(&format!("{name}.socket"));
    let held = hold(&line, socket, Point { kind, part });
    let send = guest.send(&format!("unix:{}", line.display()), &[]);
    held.recv().unwrap().cut();
    let sent = send.end();
    Broken {
        place,
        guest,
        receive,
        sent,
    }
}

impl Broken {
    fn new(kind: u8, part: Part) -> Self {
        let place = Place::new();
        let guest = Guest::start(&place, &[]);
        migrate(place, guest, 0, kind, part)
    }

    /// The agent asks the destination what became of the attempt.
    fn ask(&self) -> Ended {
        self.guest.send(&self.receive.address, &[]).end()
    }

    /// The guest runs at the destination, and not at the source.
    fn assert_moved(&mut self) {
        let left = self.guest.ram();
        assert_changes(&self.receive.ram_file());
        assert_same(&left, &self.guest.ram());
        self.guest.process.says("has migrated away");
    }
}

#[test]
fn before_the_guest_is_let_go_of_it_runs_on() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let mut guest = Guest::start(&place, &[]);
    let cuts = [
        (HELLO, Part::Half),
        (WELCOME, Part::Half),
        (LAYOUT, Part::Half),
        (PAGES, Part::Nothing),
        (PAGES, Part::Half),
        (PAGES, Part::All),
        (APPLIED, Part::Nothing),
        (STATE, Part::Nothing),
        (STATE, Part::Half),
        (READY, Part::Nothing),
        (READY, Part::Half),
    ];
    let mut here = place;
    for (n, (kind, part)) in cuts.into_iter().enumerate() {
        let mut broken = migrate(here, guest, n, kind, part);
        let report = broken.sent.status("failed", 1);
        assert_keys(&report, &SEND);
        // Built, it awaits the question of a source in doubt; its guest does not run.
        let built = (kind == READY).then(|| {
            broken.receive.process().says("may be in doubt");
            broken.receive.ram()
        });
        broken.guest.assert_runs();
        if let Some(built) = built {
            assert_same(&built, &broken.receive.ram());
        }
        let received = broken.receive.process.take().unwrap().interrupt();
        let report = received.json();
        assert_ne!(report["status"], "completed", "{kind} {part:?}: {report}");
        assert_eq!(received.code, Some(1), "{received:?}");
        (here, guest) = (broken.place, broken.guest);
    }
    guest.assert_migrates(&here);
}

#[test]
fn a_destination_that_never_heard_go_lets_the_source_resume() {
    if !kvm() {
        return;
    }
    for (kind, part) in [(READY, Part::All), (GO, Part::Nothing), (GO, Part::Half)] {
        let mut broken = Broken::new(kind, part);
        broken.sent.failed("in-doubt", "has not answered");
        broken.receive.process().says("may be in doubt");
        let stopped = broken.guest.ram();
        let asked = broken.ask().failed("failed", "it runs on here");
        assert_eq!(asked["migration_id"], broken.sent.json()["migration_id"]);
        broken.guest.assert_runs();
        assert!(stopped != broken.guest.ram());
        broken.receive.wait_end().status("failed", 1);
        broken.guest.assert_migrates(&broken.place);
    }
}

#[test]
fn a_destination_that_awaits_a_question_takes_another_guest_and_never_runs_the_first() {
    if !kvm() {
        return;
    }
    // The source has taken its guest back, or is in doubt.
    for (kind, part) in [(READY, Part::Nothing), (GO, Part::Nothing)] {
        let mut broken = Broken::new(kind, part);
        let first = broken.sent.json();
        broken.receive.process().says("may be in doubt");
        let guest = &broken.guest;
        let sent = if kind == READY {
            guest.send(&broken.receive.address, &[]).end()
        } else {
            let stopped = guest.ram();
            let (place, to) = (Place::new(), &broken.receive.address);
            let other = Guest::start(&place, &[]);
            let sent = other.send(to, &[]).end();
            assert_same(&stopped, &guest.ram());
            // The answer is what it was before the other guest came.
            let asked = guest
                .send(to, &[])
                .end()
                .failed("failed", "it runs on here");
            assert_eq!(asked["migration_id"], first["migration_id"]);
            broken.guest.assert_runs();
            sent
        };
        sent.status("completed", 0);
        assert_changes(&broken.receive.ram_file());
        let received = broken.receive.process.take().unwrap().interrupt();
        let report = received.status("completed", 0);
        assert_ne!(report["migration_id"], first["migration_id"]);
    }
}

/// One that keeps memory alone, and has taken a guest that is in doubt. The guest, where it is reached, and what its agent
/// said.
fn doubtful(place: &Place, more: &[&str]) -> (Guest, Receive, Ended) {
    let guest = Guest::start(place, &[]);
    let mut receive = Receive::start(place, "there", more);
    let line = place.path("line");
    let point = Point {
        kind: GO,
        part: Part::Nothing,
    };
    let held = hold(&line, place.path("there.socket"), point);
    let send = guest.send(&format!("unix:{}", line.display()), &[]);
    let held = held.recv().unwrap();
    if let [_, "--control", path] = more {
        // What comes back to its name finds another file there.
        std::fs::remove_file(path).unwrap();
        std::fs::write(path, "mine").unwrap();
    }
    held.cut();
    let sent = send.end();
    sent.failed("in-doubt", "has not answered");
    receive.process().says("may be in doubt");
    (guest, receive, sent)
}

#[test]
fn a_destination_of_memory_alone_awaits_the_question_though_another_guest_has_come() {
    if !kvm() {
        return;
    }
    let (place, elsewhere) = (Place::new(), Place::new());
    let (mut guest, mut receive, _) = doubtful(&place, &[]);
    let other = Guest::start(&elsewhere, &[]);
    let sent = other.send(&receive.address, &[]).end();
    sent.status("completed", 0);
    let asked = guest.send(&receive.address, &[]).end();
    asked.failed("failed", "it runs on here");
    guest.assert_runs();
    receive.wait_end().status("completed", 0);
}

#[test]
fn a_destination_that_is_in_the_way_of_its_own_next_guest_still_awaits_the_question() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let control = place.arg("next");
    let (mut guest, mut receive, _) = doubtful(&place, &["--resume", "--control", &control]);
    receive.process().says("no other guest is taken");
    let asked = guest.send(&receive.address, &[]).end();
    asked.failed("failed", "it runs on here");
    guest.assert_runs();
    receive.wait_end().status("failed", 1);
}

#[test]
fn a_destination_that_can_accept_nobody_for_a_while_still_awaits_the_question() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let (mut guest, mut receive, _) = doubtful(&place, &[]);
    let usual = receive.process().limit_files(3);
    let path = receive.address.strip_prefix("unix:").unwrap();
    let stranger = std::os::unix::net::UnixStream::connect(path).unwrap();
    receive.process().says("Too many open files");
    drop(stranger);
    receive.process().limit_files(usual);
    let asked = guest.send(&receive.address, &[]).end();
    asked.failed("failed", "it runs on here");
    guest.assert_runs();
    receive.wait_end().status("failed", 1);
}

#[test]
fn a_destination_tells_of_the_guest_in_doubt_whoever_else_has_failed() {
    if !kvm() {
        return;
    }
    let (place, elsewhere) = (Place::new(), Place::new());
    let (guest, mut receive, sent) = doubtful(&place, &[]);
    let other = Guest::start(&elsewhere, &[]);
    let line = elsewhere.path("line");
    let point = Point {
        kind: LAYOUT,
        part: Part::Half,
    };
    let held = hold(&line, place.path("there.socket"), point);
    let send = other.send(&format!("unix:{}", line.display()), &[]);
    held.recv().unwrap().cut();
    send.end().status("failed", 1);
    receive.process().says("the other end has gone");
    let asked = guest.send(&receive.address, &[]).end();
    asked.failed("failed", "it runs on here");
    let report = receive.wait_end().status("failed", 1);
    assert_eq!(report["migration_id"], sent.json()["migration_id"]);
}

#[test]
fn a_destination_that_runs_completes_the_source() {
    if !kvm() {
        return;
    }
    for (kind, part) in [
        (GO, Part::All),
        (RUNNING, Part::Nothing),
        (RUNNING, Part::Half),
    ] {
        let mut broken = Broken::new(kind, part);
        broken.sent.failed("in-doubt", "has not answered");
        let asked = broken.ask().status("completed", 0);
        assert_keys(&asked, &SEND);
        broken.assert_moved();
        broken.ask().failed("failed", "has migrated away");
        let received = broken.receive.process.take().unwrap().interrupt();
        received.status("completed", 0);
    }
}

#[test]
fn a_destination_that_was_to_take_memory_alone_can_be_asked_too() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let mut guest = Guest::start(&place, &[]);
    let mut receive = Receive::start(&place, "there", &[]);
    let line = place.path("line");
    let point = Point {
        kind: RUNNING,
        part: Part::Nothing,
    };
    let held = hold(&line, place.path("there.socket"), point);
    let send = guest.send(&format!("unix:{}", line.display()), &[]);
    held.recv().unwrap().cut();
    send.end().failed("in-doubt", "has not answered");
    receive.process().says("may be in doubt");
    let asked = guest.send(&receive.address, &[]).end();
    asked.status("completed", 0);
    guest.process.says("has migrated away");
    receive.wait_end().status("completed", 0);
    assert_same(&guest.ram(), &receive.ram());
}

#[test]
fn after_the_guest_is_said_to_run_the_line_matters_no_more() {
    if !kvm() {
        return;
    }
    let mut broken = Broken::new(RUNNING, Part::All);
    broken.sent.status("completed", 0);
    broken.assert_moved();
}

#[test]
fn what_proves_nothing_leaves_the_doubt() {
    if !kvm() {
        return;
    }
    let mut broken = Broken::new(RUNNING, Part::Nothing);
    broken.sent.failed("in-doubt", "has not answered");
    let stopped = broken.guest.ram();
    // Nobody there, a destination that knows nothing, and a file, which keeps what it holds.
    let nobody = broken.place.unix("nobody");
    broken
        .guest
        .send(&nobody, &[])
        .end()
        .failed("in-doubt", &nobody);
    let mut other = Receive::start(&broken.place, "other", &[]);
    let asked = broken.guest.send(&other.address, &[]).end();
    asked.failed("in-doubt", "does not know");
    assert!(other.process().runs(), "a question is no migration");
    let file = broken.place.path("file");
    std::fs::write(&file, "a guest").unwrap();
    let to = format!("file:{}", file.display());
    broken.guest.send(&to, &[]).end().failed("in-doubt", &to);
    assert_eq!(std::fs::read(&file).unwrap(), b"a guest");
    assert_same(&stopped, &broken.guest.ram());
    broken.ask().status("completed", 0);
    broken.assert_moved();
}

#[test]
fn an_agent_killed_after_the_guest_was_let_go_of_leaves_it_in_doubt() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let guest = Guest::start(&place, &[]);
    let mut receive = Receive::start(&place, "there", &["--resume"]);
    let (line, socket) = (place.path("line"), place.path("there.socket"));
    let point = Point {
        kind: GO,
        part: Part::Nothing,
    };
    let held = hold(&line, socket, point);
    let send = guest.send(&format!("unix:{}", line.display()), &[]);
    // GO was sent and is held on the line: the guest has been let go of, and runs nowhere.
    let held = held.recv().unwrap();
    let stopped = guest.ram();
    send.signal(Signal::KILL);
    send.end();
    let nobody = guest.send(&place.unix("nobody"), &[]).end();
    nobody.failed("in-doubt", "nobody");
    assert_same(&stopped, &receive.ram());
    assert_same(&stopped, &guest.ram());
    held.release();
    let asked = until("the destination has decided", || {
        let asked = guest.send(&receive.address, &[]).end();
        (asked.json()["status"] != "in-doubt").then_some(asked)
    });
    // GO got through: it is the destination that runs the guest.
    asked.status("completed", 0);
    assert_changes(&receive.ram_file());
    assert_same(&stopped, &guest.ram());
    receive.process.take().unwrap().interrupt();
}
