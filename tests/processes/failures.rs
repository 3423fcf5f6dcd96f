//! Whatever fails before the guest is let go of: it runs on at the source, and migrates the next time, whole.

use std::fs;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;

use rustix::process::Signal;

use crate::common::kvm;
use crate::harness::*;
use crate::way::*;

/// Long enough to be broken off: 16M at so many bytes a second.
const SLOWLY: [&str; 2] = ["--bandwidth-limit", "1M"];

/// Starts a migration, and breaks it off by `fault` while memory is sent.
fn broken_off(
    fault: impl FnOnce(Process, &mut Receive) -> Option<Ended>,
) -> (Option<Ended>, Ended) {
    let place = Place::new();
    let mut guest = Guest::start(&place, &[]);
    let mut receive = Receive::start(&place, "there", &[]);
    let send = guest.send(&receive.address, &SLOWLY);
    receive.wait_begun();
    let sent = fault(send, &mut receive);
    let received = receive.wait_end();
    assert!(
        !place.path("there.socket").exists() || received.code.is_none(),
        "listening socket left"
    );
    guest.assert_runs();
    guest.assert_migrates(&place);
    (sent, received)
}

#[test]
fn no_destination() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let mut guest = Guest::start(&place, &[]);
    for to in [
        &*place.unix("nobody"),
        "tcp:127.0.0.1:1",
        "file:/nowhere/file",
    ] {
        let sent = guest.send(to, &[]).end();
        let report = sent.failed("failed", to);
        assert_keys(&report, &SEND);
    }
    guest.assert_runs();
    guest.assert_migrates(&place);
}

#[test]
fn a_destination_that_refuses_is_quoted() {
    if !kvm() {
        return;
    }
    for way in Way::all() {
        let place = Place::new();
        let mut guest = Guest::start(&place, &[]);
        let mut receive = Receive::start(&place, "there", &as_str(&way.receive(&place)));
        fs::create_dir(receive.ram_file()).unwrap();
        let sent = guest.send(&receive.address, &as_str(&way.send(&place)));
        let report = sent.end().failed("failed", "ram.ram: Is a directory");
        let received = receive.wait_end().failed("failed", "ram.ram");
        assert_eq!(report["reason"], received["reason"]);
        guest.assert_runs();
        guest.assert_migrates(&place);
    }
}

#[test]
fn a_destination_that_is_killed() {
    if !kvm() {
        return;
    }
    let (sent, _) = broken_off(|send, receive| {
        receive.process().signal(Signal::KILL);
        Some(send.end())
    });
    sent.unwrap().failed("failed", "the other end has gone");
}

#[test]
fn a_destination_that_is_interrupted() {
    if !kvm() {
        return;
    }
    let (sent, received) = broken_off(|send, receive| {
        receive.process().signal(Signal::INT);
        Some(send.end())
    });
    sent.unwrap().failed("failed", "cancelled");
    received.failed("cancelled", "cancelled");
}

#[test]
fn an_agent_that_is_killed() {
    if !kvm() {
        return;
    }
    let (_, received) = broken_off(|send, _| {
        send.kill();
        None
    });
    received.failed("failed", "the other end has gone");
}

#[test]
fn an_agent_that_is_interrupted() {
    if !kvm() {
        return;
    }
    for signal in [Signal::INT, Signal::TERM] {
        let (sent, received) = broken_off(|send, _| {
            send.signal(signal);
            Some(send.end())
        });
        let report = sent.unwrap().failed("cancelled", "cancelled");
        assert_keys(&report, &SEND);
        received.failed("cancelled", "cancelled");
    }
}

#[test]
fn a_timeout_cancels() {
    if !kvm() {
        return;
    }
    for way in Way::all() {
        let place = Place::new();
        let mut guest = Guest::start(&place, &[]);
        let mut receive = Receive::start(&place, "there", &as_str(&way.receive(&place)));
        let mut limits = way.send(&place);
        // Packed too.
        limits.extend(["--bandwidth-limit", "64K"].map(String::from));
        limits.extend(["--timeout", "300ms", "--on-timeout", "cancel"].map(String::from));
        let sent = guest.send(&receive.address, &as_str(&limits)).end();
        sent.failed("failed", "time limit of 300 ms");
        receive.wait_end().failed("cancelled", "time limit");
        guest.assert_runs();
        guest.assert_migrates(&place);
    }
}

#[test]
fn a_timeout_forces_the_switchover() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    // It writes faster than the limit lets pages go, and by far.
    let guest = Guest::start(&place, &["--workload", "hot:4M"]);
    let mut receive = Receive::start(&place, "there", &[]);
    let limits = ["--bandwidth-limit", "16M", "--downtime-limit", "1ms"];
    let limits = [
        &limits[..],
        &["--timeout", "500ms", "--on-timeout", "switchover"],
    ]
    .concat();
    let sent = guest.send(&receive.address, &limits).end();
    sent.status("completed", 0);
    receive.wait_end().status("completed", 0);
    assert_same(&guest.ram(), &receive.ram());
}

#[test]
fn a_second_agent_is_refused_and_disturbs_nothing() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let guest = Guest::start(&place, &[]);
    let mut receive = Receive::start(&place, "there", &[]);
    let slowly = ["--bandwidth-limit", "8M", "--downtime-limit", "10s"];
    let first = guest.send(&receive.address, &slowly);
    receive.wait_begun();
    let second = guest.send(&place.unix("elsewhere"), &[]).end();
    second.failed("failed", "another agent is attached");
    first.end().status("completed", 0);
    receive.wait_end().status("completed", 0);
    assert_same(&guest.ram(), &receive.ram());
    // Nobody takes a guest twice.
    let again = guest.send(&place.unix("elsewhere"), &[]).end();
    again.failed("failed", "has migrated away");
}

#[test]
fn connections_that_bring_nothing_are_no_migration() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let guest = Guest::start(&place, &[]);
    let mut receive = Receive::start(&place, "there", &[]);
    // A second destination looks whether the first one is alive.
    let (address, dir) = (receive.address.clone(), place.arg("other"));
    let other = ["receive", "--json", "--listen", &address, "--ram-dir", &dir];
    run(&other).failed("failed", "socket path in use");
    for text in [&b""[..], b"GET / HTTP/1.1\r\nHost: destination\r\n\r\n"] {
        use std::io::{Read, Write};
        let path = address.strip_prefix("unix:").unwrap();
        let mut stream = std::os::unix::net::UnixStream::connect(path).unwrap();
        stream.write_all(text).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    }
    guest.send(&address, &[]).end().status("completed", 0);
    receive.wait_end().status("completed", 0);
    assert_same(&guest.ram(), &receive.ram());
}

#[test]
fn a_peer_that_says_nothing_keeps_nobody_out_and_is_told_of() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let guest = Guest::start(&place, &[]);
    let mut receive = Receive::listen(&place, "there", "tcp:127.0.0.1:0", &["--resume"]);
    let path = receive.address.strip_prefix("tcp:").unwrap().to_owned();
    // Heard out one after the other they would take longer than the source waits.
    let mute: Vec<_> = (0..20)
        .map(|_| TcpStream::connect(&path).unwrap())
        .collect();
    guest
        .send(&receive.address, &[])
        .end()
        .status("completed", 0);
    for peer in &mute {
        let peer = peer.local_addr().unwrap();
        let told = format!("{peer} has connected and said nothing for 5 s");
        let said = receive.process().says(&told);
        assert_eq!(said.matches(&told).count(), 1, "{said}");
    }
}

#[test]
fn sockets_are_private_and_not_taken_from_anybody() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let guest = Guest::start(&place, &[]);
    let mode = fs::metadata(&guest.control).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let second = run(&["guest", "--control", &guest.control, "--ram", RAM]);
    assert_eq!(second.code, Some(1));
    assert!(second.stderr.contains("socket path in use"), "{second:?}");
    assert_eq!(second.stderr.lines().count(), 1, "{second:?}");

    // Nor is a guest received that could not be served again.
    let listen = place.unix("listen");
    let control = ["--resume", "--control", &guest.control];
    let receive = [&["receive", "--json", "--listen", &listen][..], &control].concat();
    run(&receive).failed("failed", "socket path in use");
    guest.assert_migrates(&place);

    let missing = place.arg("missing");
    let sent = run(&[
        "send",
        "--json",
        "--control",
        &missing,
        "--to",
        "tcp:127.0.0.1:1",
    ]);
    let report = sent.failed("failed", &missing);
    assert_keys(&report, &SEND);
}

#[test]
fn a_socket_that_nobody_listens_on_is_replaced() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let guest = Guest::start(&place, &[]);
    guest.process.kill();
    assert!(fs::exists(&guest.control).unwrap());
    let again = Guest::start(&place, &[]);
    again.assert_migrates(&place);
}
