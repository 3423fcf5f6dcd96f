//! What scripts depend on: help, exit status, one clear line.

use std::io::Read;
use std::os::unix::net::UnixListener;

use rustix::process::Signal;

use crate::common::kvm;
use crate::harness::*;

const COMMANDS: [&str; 5] = ["demo", "guest", "send", "receive", "plan"];

#[test]
fn every_help_has_an_example() {
    for command in COMMANDS {
        for help in ["--help", "-h"] {
            let said = run(&[command, help]);
            assert_eq!(said.code, Some(0), "{said:?}");
            let example = format!("Example: gleaner {command} ");
            assert!(said.stdout.contains(&example), "{said:?}");
        }
    }
    let said = run(&["--help"]);
    assert!(said.stdout.contains("Example: gleaner "), "{said:?}");
    for command in COMMANDS {
        assert!(said.stdout.contains(command), "{said:?}");
    }
}

#[test]
fn wrong_usage_is_2_and_names_the_fault() {
    let guest = ["guest", "--control", "/nowhere/socket"];
    let send = ["send", "--json", "--control", "/nowhere", "--to", "unix:/x"];
    let qemu = [&send[..], &["--format", "qemu"]].concat();
    let from_qemu = "receive --listen unix:/x --format qemu --ram-dir /nowhere/x";
    let from_qemu: Vec<_> = from_qemu.split(' ').collect();
    let with = |base: &[&'static str], more: &[&'static str]| [base, more].concat();
    for (args, fault) in [
        (vec![], "Usage"),
        (vec!["migrate"], "unrecognized subcommand 'migrate'"),
        (vec!["guest"], "--control"),
        (vec!["receive"], "--listen"),
        (vec!["plan", "--trace", "x"], "--bandwidth"),
        (vec!["plan", "--generate", "idle"], "write --bandwidth"),
        (vec!["plan", "--generate", "busy"], "no kind of trace"),
        (vec!["send", "--control", "/x"], "--to"),
        (with(&guest, &["--ram", "4X"]), "\"4X\" is no size"),
        (with(&guest, &["--ram", "0"]), "\"0\" is no size"),
        (with(&guest, &["--ram", "3M"]), "4 MiB to 16 GiB"),
        (with(&guest, &["--ram", "4097K"]), "a multiple of 4096"),
        (with(&guest, &["--ram", "1T"]), "4 MiB to 16 GiB"),
        (with(&guest, &["--ram", "99999999T"]), "at most"),
        (with(&guest, &["--vcpus", "0"]), "1 to 16"),
        (with(&guest, &["--vcpus", "17"]), "1 to 16"),
        (with(&guest, &["--workload", "hot:999G"]), "does not fit"),
        (vec!["demo", "--workload", "hot:999G"], "gleaner demo"),
        (vec!["demo", "--compare-apply", "--ram", "1G"], "--ram"),
        (vec!["demo", "--compare-apply", "--verify"], "--verify"),
        (
            vec!["demo", "--compare-apply", "--transactions", "9"],
            "--transactions",
        ),
        (with(&guest, &["--vcpus", "two"]), "no number of vCPUs"),
        (with(&guest, &["--workload", "sort"]), "\"sort\""),
        (with(&guest, &["--workload", "hot:many"]), "many"),
        (with(&guest, &["--tracking", "guess"]), "guess"),
        (with(&guest, &["--write-rate", "0"]), "0"),
        (with(&guest, &["--churn", "-1"]), "-1"),
        (with(&guest, &["--churn", "often"]), "\"often\" is no rate"),
        (with(&guest, &["--churn-kinds", "hole,knot"]), "knot"),
        (with(&guest, &["--backend", "xen"]), "auto, kvm, model"),
        (
            vec!["receive", "--listen", "unix:/x", "--backend", "model"],
            "--resume",
        ),
        (with(&send, &["--machine", "none"]), "add --format qemu"),
        (with(&send, &["--qemu-version", "9"]), "add --format qemu"),
        (with(&qemu, &["--qemu-version", "5"]), "7.2, 9, 10"),
        (with(&qemu, &["--verify"]), "leave out --verify"),
        (with(&qemu, &["--local"]), "leave out --local"),
        (with(&qemu, &["--tls", "/x"]), "leave out --tls"),
        (with(&qemu, &["--compress", "lz4"]), "leave out --compress"),
        (
            with(&send, &["--timeout", "soon"]),
            "\"soon\" is no duration",
        ),
        (
            with(&send, &["--downtime-limit", "3"]),
            "\"3\" is no duration",
        ),
        (
            with(&send, &["--bandwidth-limit", "fast"]),
            "\"fast\" is no size",
        ),
        (with(&send, &["--on-timeout", "pray"]), "cancel, switchover"),
        (with(&send, &["--on-timeout", "cancel"]), "--timeout"),
        (with(&send, &["--timeout", "0ms"]), "leaves no time"),
        (with(&send, &["--timeout", "1d"]), "5m (minutes) or 1h"),
        (
            with(&send, &["--timeout", "99999999999999999999h"]),
            "too long",
        ),
        (
            with(&send, &["--dry-run", "--verify"]),
            "leave out --verify",
        ),
        (
            with(&send, &["--dry-run", "--compress", "zstd"]),
            "leave out --compress",
        ),
        (
            with(&send, &["--dry-run", "--channels", "2"]),
            "leave out --channels",
        ),
        (
            with(&send, &["--dry-run", "--tls", "/x"]),
            "leave out --tls",
        ),
        (
            with(&send, &["--local", "--bandwidth-limit", "1M"]),
            "leave out --bandwidth-limit",
        ),
        (
            with(&send, &["--local", "--throttle", "auto"]),
            "leave out --throttle",
        ),
        (with(&send, &["--local", "--verify"]), "gleaner send"),
        (
            vec![
                "send",
                "--control",
                "/x",
                "--to",
                "file:/x",
                "--channels",
                "4",
            ],
            "takes one connection",
        ),
        (
            vec!["send", "--control", "/x", "--to", "file:/x", "--verify"],
            "leave out --verify",
        ),
        (
            with(&send, &["--throttle", "hard"]),
            "never, auto, all, writers",
        ),
        (
            with(&send, &["--local", "--channels", "2"]),
            "--local takes one connection",
        ),
        (with(&send, &["--local", "--verify"]), "leave out --verify"),
        (
            with(&send, &["--local", "--compress", "lz4"]),
            "leave out --compress",
        ),
        (with(&send, &["--local", "--tls", "/x"]), "leave out --tls"),
        (
            with(&send, &["--local", "--dry-run"]),
            "leave out --dry-run",
        ),
        (
            vec!["send", "--control", "/x", "--local", "--to", "tcp:h:1"],
            "--local stays on this host",
        ),
        (
            vec!["send", "--control", "/x", "--local", "--to", "file:/x"],
            "--local stays on this host",
        ),
        (vec!["receive", "--listen", "rdma:x"], "unknown scheme"),
        (vec!["receive", "--listen", "tcp:x"], "no port"),
        (
            vec!["receive", "--listen", "unix:/x", "--control", "/y"],
            "--resume",
        ),
        (
            vec!["receive", "--listen", "unix:/x", "--channels", "2"],
            "leave out --channels",
        ),
        // Where no guest runs it is of no use to ask for what goes with one.
        (
            with(&from_qemu, &["--control", "/y"]),
            "leave out --control",
        ),
        (
            with(&from_qemu, &["--backend", "model"]),
            "leave out --backend",
        ),
        (with(&from_qemu, &["--resume"]), "leave out --resume"),
        (with(&from_qemu, &["--channels", "256"]), "255"),
        (vec!["demo", "--transactions", "-1"], "-1"),
        (vec!["demo", "--compress", "gzip"], "gzip"),
    ] {
        let ended = run(&args);
        assert_eq!(ended.code, Some(2), "{ended:?}");
        assert!(ended.stdout.is_empty(), "{ended:?}");
        let said = ended.stderr.contains(fault);
        assert!(said, "{fault:?} is not in {ended:?}");
    }
}

#[test]
fn what_the_machine_cannot_be_is_1_and_one_line() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let control = place.arg("control");
    let (short, file) = (place.arg("short"), format!("{}/file", place.arg("nowhere")));
    std::fs::write(&short, [1; 4096]).unwrap();
    for (more, fault) in [
        (["--ram-file", &*short], "short: it has 4096 bytes"),
        (["--ram-file", &*file], &*file),
    ] {
        let base = ["--control", &*control];
        let ended = run(&[&["guest"], &base[..], &more].concat());
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");
        assert!(ended.stderr.starts_with("gleaner: "), "{ended:?}");
        assert!(ended.stderr.contains(fault), "{fault:?}: {ended:?}");
        assert!(!std::fs::exists(&control).unwrap(), "{ended:?}");
        let demo = run(&[&["demo", "--json"], &more[..]].concat());
        demo.failed("failed", fault);
    }
    assert_eq!(
        std::fs::read(&short).unwrap(),
        [1; 4096],
        "a file of another size"
    );
}

#[test]
fn a_destination_that_cannot_listen_says_why_in_json() {
    const TEXT: &str = "something of mine, which is as long as a header at least";
    let place = Place::new();
    let file = place.path("file");
    std::fs::write(&file, TEXT).unwrap();
    let file = file.to_str().unwrap();
    for (args, fault) in [
        (["--listen", "unix:/nowhere/socket"], "/nowhere/socket"),
        (["--listen", &format!("unix:{file}")], "is not a socket"),
        (["--listen", "tcp:192.0.2.1:1"], "tcp:192.0.2.1:1"),
        (["--listen", "file:/nowhere/file"], "/nowhere/file"),
        (
            ["--listen", &format!("file:{file}")],
            "not a Gleaner stream",
        ),
        (["--listen", "fd:99"], "fd:99"),
    ] {
        let ended = run(&[&["receive", "--json"], &args[..]].concat());
        ended.failed("failed", fault);
        // It has listened to what is there, and to nothing else.
        let there = fault == "not a Gleaner stream";
        assert_eq!(ended.stderr.contains("listening"), there, "{ended:?}");
    }
    let listen = place.unix("socket");
    let args = ["receive", "--json", "--listen", &listen, "--ram-dir", file];
    run(&args).failed("failed", file);
    assert_eq!(std::fs::read_to_string(file).unwrap(), TEXT);
}

#[test]
fn a_socket_of_the_wrong_kind_is_said_to_be_that() {
    let place = Place::new();
    let guest = Guest::start(&place, &["--backend", "model"]);
    let mut receive = Receive::start(&place, "there", &[]);
    let socket = receive.address.strip_prefix("unix:").unwrap();
    let advice = "--control takes a guest's socket, --to what a destination listens at";
    let to = format!("unix:{}", guest.control);
    guest.send(&to, &[]).end().failed("failed", advice);
    let send = ["send", "--json", "--control", socket, "--to", &to];
    run(&send).failed("failed", advice);
    // Neither is worse for it.
    guest
        .send(&receive.address, &[])
        .end()
        .status("completed", 0);
    receive.wait_end().status("completed", 0);
}

#[test]
fn a_guest_that_is_killed_is_said_to_be_gone() {
    let place = Place::new();
    let guest = Guest::start(&place, &["--backend", "model"]);
    let receive = Receive::start(&place, "there", &[]);
    let send = guest.send(&receive.address, &["--bandwidth-limit", "1M"]);
    receive.wait_begun();
    guest.process.kill();
    send.end().failed("failed", "the guest's service has gone");
}

#[test]
fn ctrl_c_ends_a_guest_and_removes_its_socket() {
    if !kvm() {
        return;
    }
    for signal in [Signal::INT, Signal::TERM] {
        let place = Place::new();
        let guest = Guest::start(&place, &[]);
        guest.process.signal(signal);
        assert_eq!(guest.process.end().code, Some(0));
        assert!(!std::fs::exists(&guest.control).unwrap(), "socket left");
    }
}

#[test]
fn ctrl_c_ends_a_guest_that_an_agent_migrates() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let guest = Guest::start(&place, &[]);
    let mut receive = Receive::start(&place, "there", &[]);
    let send = guest.send(&receive.address, &["--bandwidth-limit", "4M"]);
    receive.wait_begun();
    assert_eq!(guest.process.interrupt().code, Some(0));
    send.end().status("failed", 1);
    receive.wait_end().failed("cancelled", "service socket");
}

#[test]
fn ctrl_c_ends_a_destination_that_waits() {
    for address in ["unix:@", "tcp:127.0.0.1:0"] {
        let place = Place::new();
        let address = address.replace('@', &place.arg("socket"));
        let mut receive = Receive::listen(&place, "there", &address, &[]);
        let received = receive.process.take().unwrap().interrupt();
        let report = received.failed("cancelled", "cancelled");
        assert_keys(&report, &RECEIVE);
        assert!(!place.path("socket").exists(), "socket left");
    }
}

#[test]
fn an_agent_whose_guest_has_not_come_yet_is_told_so() {
    let place = Place::new();
    let (control, there) = (place.arg("control"), place.unix("there"));
    let receive = ["receive", "--json", "--listen", &there, "--resume"];
    let mut receive = Process::start(&[&receive[..], &["--control", &control]].concat());
    receive.says("listening at ");
    let to = place.unix("elsewhere");
    let send = ["send", "--json", "--control", &control];
    for more in [&["--to", &*to][..], &["--dry-run"]] {
        run(&[&send[..], more].concat()).failed("failed", "no guest is here yet");
    }
    receive.interrupt().failed("cancelled", "cancelled");
    assert!(!std::fs::exists(&control).unwrap(), "control socket left");
}

#[test]
fn ctrl_c_ends_an_agent_whose_service_does_not_answer() {
    let place = Place::new();
    let control = place.arg("control");
    let service = UnixListener::bind(&control).unwrap();
    let to = place.unix("there");
    let send = ["send", "--json", "--control", &control, "--to", &to];
    let send = Process::start(&send);
    let (mut agent, _) = service.accept().unwrap();
    agent.read_exact(&mut [0; 4]).unwrap();
    send.interrupt().failed("cancelled", "does not answer");
}
