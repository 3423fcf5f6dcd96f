//! Either end killed, without a last word, at every step of the protocol: the guest never runs at both ends, and what is
//! left says where it is.

use crate::common::kvm;
use crate::harness::*;
use crate::proxy::*;
use crate::way::Standing;

/// Before these frames are through, whole, the source has not let go of its guest.
const BEFORE: [u8; 8] = [HELLO, WELCOME, LAYOUT, PAGES, SYNC, APPLIED, STATE, READY];
const PARTS: [Part; 3] = [Part::Nothing, Part::Half, Part::All];

/// It never ran the guest.
fn assert_refused(mut receive: Receive) {
    let received = receive.process.take().unwrap().interrupt();
    let report = received.json();
    assert_ne!(report["status"], "completed", "{received:?}");
    assert_eq!(received.code, Some(1), "{received:?}");
}

#[test]
fn a_killed_agent_leaves_the_guest_running_before_it_was_let_go_of() {
    if !kvm() {
        return;
    }
    for kind in BEFORE {
        let place = Place::new();
        let mut guest = Guest::start(&place, &[]);
        for part in PARTS {
            if (kind, part) == (READY, Part::All) {
                continue; // it has been heard: what follows is the next test
            }
            let receive = Standing::at(&place, &guest, kind, part).kill_agent();
            guest.assert_runs();
            assert_refused(receive);
        }
        guest.assert_migrates(&place);
    }
}

#[test]
fn an_agent_killed_before_go_gets_through_leaves_a_guest_that_the_destination_never_ran() {
    if !kvm() {
        return;
    }
    for (kind, part) in [(READY, Part::All), (GO, Part::Nothing), (GO, Part::Half)] {
        let place = Place::new();
        let mut guest = Guest::start(&place, &[]);
        let receive = Standing::at(&place, &guest, kind, part).kill_agent();
        let asked = guest.send(&receive.address, &[]).end();
        if kind == READY && asked.code == Some(0) {
            // It had not let go of the guest, which has moved by a new attempt.
            asked.status("completed", 0);
            guest.process.says("has migrated away");
            assert_changes(&receive.ram_file());
            continue;
        }
        let asked = asked.status("failed", 1);
        if kind == GO {
            let reason = asked["reason"].as_str().unwrap();
            assert!(reason.contains("it runs on here"), "{asked}");
        }
        guest.assert_runs();
        drop(receive);
        guest.assert_migrates(&place);
    }
}

#[test]
fn an_agent_killed_when_go_is_through_leaves_a_guest_that_runs_at_the_destination() {
    if !kvm() {
        return;
    }
    for (kind, part) in [
        (GO, Part::All),
        (RUNNING, Part::Nothing),
        (RUNNING, Part::Half),
        (RUNNING, Part::All),
    ] {
        let place = Place::new();
        let mut guest = Guest::start(&place, &[]);
        let mut receive = Standing::at(&place, &guest, kind, part).kill_agent();
        let left = guest.ram();
        let asked = guest.send(&receive.address, &[]).end();
        // Killed when it had heard that the guest runs, it may have passed that on.
        if (kind, part) != (RUNNING, Part::All) || asked.code == Some(0) {
            asked.status("completed", 0);
        }
        guest.process.says("has migrated away");
        assert_changes(&receive.ram_file());
        assert_same(&left, &guest.ram());
        let received = receive.process.take().unwrap().interrupt();
        received.status("completed", 0);
    }
}

#[test]
fn a_killed_destination_leaves_the_guest_running_before_it_was_let_go_of() {
    if !kvm() {
        return;
    }
    for kind in BEFORE {
        let place = Place::new();
        let mut guest = Guest::start(&place, &[]);
        for part in PARTS {
            if (kind, part) == (READY, Part::All) {
                continue; // with that the agent lets go of it
            }
            let (sent, _) = Standing::at(&place, &guest, kind, part).kill_destination();
            sent.status("failed", 1);
            guest.assert_runs();
        }
        guest.assert_migrates(&place);
    }
}

/// Its guest is gone with it, if it ever ran: nobody can tell any more.
#[test]
fn a_destination_killed_after_that_leaves_a_doubt_that_stays() {
    if !kvm() {
        return;
    }
    for (kind, part) in [
        (READY, Part::All),
        (GO, Part::Nothing),
        (GO, Part::Half),
        (GO, Part::All),
        (RUNNING, Part::Nothing),
        (RUNNING, Part::Half),
    ] {
        let place = Place::new();
        let mut guest = Guest::start(&place, &[]);
        let (sent, address) = Standing::at(&place, &guest, kind, part).kill_destination();
        sent.failed("in-doubt", "has not answered");
        let stopped = guest.ram();
        let asked = guest.send(&address, &[]).end();
        asked.failed("in-doubt", "the guest stays stopped here");
        // Nor does a destination that knows nothing of it get the guest.
        let mut other = Receive::start(&place, "other", &[]);
        let asked = guest.send(&other.address, &[]).end();
        asked.failed("in-doubt", "the guest stays stopped here");
        assert!(other.process().runs() && guest.process.runs());
        assert_same(&stopped, &guest.ram());
    }
}

#[test]
fn a_destination_killed_when_it_has_said_that_the_guest_runs_has_completed() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let mut guest = Guest::start(&place, &[]);
    let (sent, _) = Standing::at(&place, &guest, RUNNING, Part::All).kill_destination();
    sent.status("completed", 0);
    guest.process.says("has migrated away");
}
