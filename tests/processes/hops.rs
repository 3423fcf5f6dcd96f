//! A guest arrives as it left, over every kind of stream and with every kind of tracking.

use crate::common::{MODES, kvm};
use crate::harness::*;

fn hop(tracking: &str, address: &str) {
    let place = Place::new();
    let mut guest = Guest::start(&place, &["--tracking", tracking]);
    let address = address.replace('@', &place.arg("stream"));
    let mut receive = Receive::listen(&place, "there", &address, &[]);
    let sent = guest.send(&receive.address, &[]).end();
    let report = sent.status("completed", 0);
    assert_keys(&report, &SEND);
    assert!(report["rounds"].as_u64() > Some(1), "{report}");
    assert!(report["pages_sent"].as_u64() > Some(0), "{report}");
    assert!(report["bytes_on_wire"].as_u64() > Some(4096), "{report}");
    let received = receive.wait_end();
    let report = received.status("completed", 0);
    assert_keys(&report, &RECEIVE);
    assert!(report["blocks"].as_u64() > Some(0), "{report}");
    assert_same(&guest.ram(), &receive.ram());
    guest.process.says("has migrated away");
    assert_eq!(guest.process.interrupt().code, Some(0));
}

#[test]
fn memory_is_the_same_over_a_unix_socket() {
    if kvm() {
        for (mode, _) in MODES {
            hop(mode, "unix:@");
        }
    }
}

#[test]
fn memory_is_the_same_over_tcp() {
    if kvm() {
        for (mode, _) in MODES {
            hop(mode, "tcp:127.0.0.1:0");
        }
    }
}

#[test]
fn memory_is_the_same_from_a_file() {
    if !kvm() {
        return;
    }
    for (mode, _) in MODES {
        let place = Place::new();
        let guest = Guest::start(&place, &["--tracking", mode]);
        let file = format!("file:{}", place.arg("stream"));
        let sent = guest.send(&file, &[]).end();
        let report = sent.status("completed", 0);
        assert_keys(&report, &SEND);
        assert!(sent.stderr.contains("the guest is in the file"), "{sent:?}");
        let mut receive = Receive::listen(&place, "there", &file, &[]);
        let received = receive.wait_end().status("completed", 0);
        assert_keys(&received, &RECEIVE);
        assert_same(&guest.ram(), &receive.ram());
    }
}

#[test]
fn the_guest_runs_on_and_hops_again() {
    if !kvm() {
        return;
    }
    for (mode, _) in MODES {
        let place = Place::new();
        let guest = Guest::start(&place, &["--tracking", mode]);
        let control = place.arg("second-control");
        let mut second = Receive::start(&place, "second", &["--resume", "--control", &control]);
        guest
            .send(&second.address, &[])
            .end()
            .status("completed", 0);
        let left = guest.ram();
        assert_changes(&second.ram_file());
        assert_same(&left, &guest.ram());

        let mut third = Receive::start(&place, "third", &[]);
        let address = third.address.clone();
        until("the second service is there", || {
            std::fs::exists(&control).unwrap().then_some(())
        });
        let sent = run(&["send", "--json", "--control", &control, "--to", &address]);
        sent.status("completed", 0);
        third.wait_end().status("completed", 0);
        assert_same(&second.ram(), &third.ram());
        second.process().says("has migrated away");
        let ended = second.process.take().unwrap().interrupt();
        ended.status("completed", 0);
        assert!(!std::fs::exists(&control).unwrap(), "control socket left");
        assert!(
            !place.path("second.socket").exists(),
            "listening socket left"
        );
    }
}
