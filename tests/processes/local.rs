//! A guest that stays on its host moves to another process with the memory that it has, whatever is killed meanwhile.

use rustix::process::Signal;

use crate::common::kvm;
use crate::harness::*;
use crate::proxy::*;

const PARTS: [Part; 3] = [Part::Nothing, Part::Half, Part::All];

/// A destination that has no memory yet.
struct There {
    process: Process,
    address: String,
    control: String,
}

impl There {
    fn start(place: &Place, name: &str, more: &[&str]) -> Self {
        let address = place.unix(&format!("{name}.socket"));
        let control = place.arg(&format!("{name}.control"));
        let mut args = vec!["receive", "--json", "--listen", &address, "--resume"];
        args.extend(["--control", &control]);
        args.extend(more);
        let mut process = Process::start(&args);
        process.says("listening at ");
        Self {
            process,
            address,
            control,
        }
    }

    /// The guest runs here: its memory changes.
    fn assert_runs(&mut self) {
        assert!(self.process.runs());
        assert_changes(&ram_of(&self.process));
    }

    /// Moves the guest on, by its service.
    fn send(&self, to: &str, more: &[&str]) -> serde_json::Value {
        until("the service is there", || {
            std::fs::exists(&self.control).unwrap().then_some(())
        });
        let args = ["send", "--json", "--control", &self.control, "--to", to];
        let sent = run(&[&args[..], more].concat());
        sent.status("completed", 0)
    }
}

fn hop(backend: &str) {
    let place = Place::new();
    let on = ["--backend", backend];
    let mut guest = Guest::in_memory(&place, RAM, &on);
    let mut second = There::start(&place, "second", &on);
    let sent = guest.send(&second.address, &["--local"]).end();
    let report = sent.status("completed", 0);
    assert_keys(&report, &SEND);
    assert_eq!(report["local"], true, "{report}");
    assert_eq!(report["pages_sent"], 0, "{report}");
    guest.process.says("has migrated away");
    // Its process may end, without a last word too.
    guest.process.kill();
    second.assert_runs();

    // On to a third process in the same way, and to a fourth one with all its pages.
    let mut third = There::start(&place, "third", &on);
    let report = second.send(&third.address, &["--local"]);
    assert_eq!(report["pages_sent"], 0, "{report}");
    second.process.says("has migrated away");
    let received = second.process.interrupt().status("completed", 0);
    assert_eq!(received["local"], true, "{received}");
    third.assert_runs();
    let mut fourth = Receive::start(&place, "fourth", &[]);
    let report = third.send(&fourth.address, &["--verify"]);
    assert_eq!(report["local"], false, "{report}");
    assert!(report["pages_sent"].as_u64() > Some(0), "{report}");
    fourth.wait_end().status("completed", 0);
    let left = std::fs::read(ram_of(&third.process)).unwrap();
    assert_same(&left, &fourth.ram());
}

#[test]
fn a_guest_of_the_model_hops_from_process_to_process() {
    hop("model");
}

#[test]
fn a_guest_of_kvm_hops_from_process_to_process() {
    if kvm() {
        hop("kvm");
    }
}

#[test]
fn what_is_sent_does_not_grow_with_the_memory() {
    let backend = if kvm() { "kvm" } else { "model" };
    let bytes = ["64M", "1G"].map(|ram| {
        let place = Place::new();
        let on = ["--backend", backend];
        let guest = Guest::in_memory(&place, ram, &[&on[..], &["--churn-kinds", "move"]].concat());
        let mut there = There::start(&place, "there", &on);
        let sent = guest.send(&there.address, &["--local"]).end();
        let report = sent.status("completed", 0);
        there.assert_runs();
        say(&format!(
            "local, {ram}: downtime {} ms",
            report["downtime_ms"]
        ));
        report["bytes_on_wire"].as_u64().unwrap()
    });
    // Numbers of pages and of writes take a few bytes more when they are greater.
    assert!(bytes[0].abs_diff(bytes[1]) < 256, "{bytes:?}");
}

/// A migration that stands still.
fn standing(place: &Place, guest: &Guest, kind: u8, part: Part) -> (Process, There, Held) {
    let name = format!("there-{kind}-{part:?}");
    let there = There::start(place, &name, &[]);
    let line = place.path(&format!("line-{kind}-{part:?}"));
    let socket = place.path(&format!("{name}.socket"));
    let held = hold(&line, socket, Point { kind, part });
    let send = guest.send(&format!("unix:{}", line.display()), &["--local"]);
    (send, there, held.recv().unwrap())
}

/// Before these frames are through, whole, the source has not let go of its guest.
const BEFORE: [u8; 6] = [HELLO, WELCOME, LAYOUT, MEMORY, STATE, READY];

/// The guest runs, and whatever happened before moves with all its memory.
fn assert_unharmed(mut guest: Guest, place: &Place) {
    guest.assert_runs();
    let mut last = There::start(place, "last", &[]);
    let sent = guest.send(&last.address, &["--local"]).end();
    sent.status("completed", 0);
    last.assert_runs();
    let mut end = Receive::start(place, "end", &[]);
    last.send(&end.address, &["--verify"]);
    end.wait_end().status("completed", 0);
}

#[test]
fn whoever_is_killed_before_it_was_let_go_of_leaves_the_guest_running_with_its_memory() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let mut guest = Guest::in_memory(&place, RAM, &[]);
    for kind in BEFORE {
        for part in PARTS {
            if (kind, part) == (READY, Part::All) {
                continue; // with that the agent lets go of it
            }
            let (send, there, held) = standing(&place, &guest, kind, part);
            there.process.kill();
            held.cut();
            send.end().status("failed", 1);
            guest.assert_runs();
        }
    }
    drop(guest.process);
    let place = Place::new();
    let mut guest = Guest::in_memory(&place, RAM, &[]);
    for kind in BEFORE {
        let (send, there, held) = standing(&place, &guest, kind, Part::Half);
        send.kill();
        held.cut();
        guest.assert_runs();
        let ended = there.process.interrupt();
        assert_ne!(ended.json()["status"], "completed", "{ended:?}");
    }
    assert_unharmed(guest, &place);
}

/// Its guest is gone with it, if it ever ran: nobody can tell any more.
#[test]
fn a_destination_killed_after_that_leaves_a_doubt_that_stays() {
    if !kvm() {
        return;
    }
    for (kind, part) in [
        (READY, Part::All),
        (GO, Part::Half),
        (GO, Part::All),
        (RUNNING, Part::Nothing),
    ] {
        let place = Place::new();
        let guest = Guest::in_memory(&place, RAM, &[]);
        let (send, there, held) = standing(&place, &guest, kind, part);
        there.process.kill();
        held.cut();
        send.end().failed("in-doubt", "has not answered");
        let stopped = guest.ram();
        let other = There::start(&place, "other", &[]);
        let asked = guest.send(&other.address, &["--local"]).end();
        asked.failed("in-doubt", "the guest stays stopped here");
        assert_same(&stopped, &guest.ram());
    }
}

#[test]
fn a_doubt_is_settled_by_the_destination_whose_memory_it_is() {
    if !kvm() {
        return;
    }
    // It runs there, and the answer is lost.
    for part in [Part::Nothing, Part::Half] {
        let place = Place::new();
        let mut guest = Guest::in_memory(&place, RAM, &[]);
        let (send, mut there, held) = standing(&place, &guest, RUNNING, part);
        held.cut();
        send.end().failed("in-doubt", "has not answered");
        there.assert_runs();
        let asked = guest.send(&there.address, &["--local"]).end();
        asked.status("completed", 0);
        guest.process.says("has migrated away");
        guest.process.kill();
        there.assert_runs();
        let mut end = Receive::start(&place, "end", &[]);
        there.send(&end.address, &["--verify"]);
        end.wait_end().status("completed", 0);
    }
    // It was never told to run: what it says then gives the guest back, with its memory.
    for part in [Part::Nothing, Part::Half] {
        let place = Place::new();
        let mut guest = Guest::in_memory(&place, RAM, &[]);
        let (send, there, held) = standing(&place, &guest, GO, part);
        let stopped = guest.ram();
        held.cut();
        send.end().failed("in-doubt", "has not answered");
        assert_same(&stopped, &guest.ram());
        let asked = guest.send(&there.address, &["--local"]).end();
        asked.failed("failed", "never ran the guest");
        guest.assert_runs();
        assert_unharmed(guest, &place);
    }
}

#[test]
fn a_guest_that_can_not_be_handed_over_runs_on() {
    let place = Place::new();
    let model = ["--backend", "model"];
    let mut guest = Guest::start(&place, &model);
    let there = There::start(&place, "there", &model);
    let sent = guest.send(&there.address, &["--local"]).end();
    sent.failed("failed", "memory of block ram can't be taken over");
    guest.assert_runs();
    there.process.signal(Signal::INT);

    let place = Place::new();
    let mut guest = Guest::in_memory(&place, RAM, &model);
    for (name, more, why) in [
        ("kept", &["--resume", "--backend", "model"][..], "--ram-dir"),
        ("not-run", &[], "--ram-dir"),
    ] {
        let receive = Receive::start(&place, name, more);
        let sent = guest.send(&receive.address, &["--local"]).end();
        let report = sent.failed("failed", why);
        assert_eq!(report["downtime_ms"], 0.0, "{report}");
        guest.assert_runs();
    }
    // One that has the guest on the wrong backend finds out when the guest is stopped.
    if kvm() {
        let there = There::start(&place, "kvm", &["--backend", "kvm"]);
        let sent = guest.send(&there.address, &["--local"]).end();
        sent.failed("failed", "use --backend model");
        guest.assert_runs();
    }
}
