//! What a QEMU sends is kept byte for byte, whatever its capabilities are.

use rustix::process::Signal;
use serde_json::Value;

use crate::harness::*;
use crate::peer::qemu;
use crate::source::{Machine, Source};

const FORMAT: [&str; 2] = ["--format", "qemu"];

fn kept(machine: Machine, address: impl Fn(&Place) -> String, can: &[&str], channels: u16) {
    if !qemu() {
        return;
    }
    let place = Place::new();
    let source = Source::start(&place, machine);
    kept_of(&place, source, &address(&place), can, channels);
}

/// What `receive` reports of a migration of this source.
fn kept_of(place: &Place, mut source: Source, address: &str, can: &[&str], channels: u16) -> Value {
    let count = channels.to_string();
    let mut args = FORMAT.to_vec();
    if channels > 0 {
        args.extend(["--channels", &count]);
    }
    let mut there = Receive::listen(place, "there", address, &args);
    let status = source.migrate(&there.address, can, channels);
    let report = there.wait_end().status("completed", 0);
    assert_eq!(status["status"], "completed", "{status}");
    assert_same(&source.memory(), &there.ram());
    let state = std::fs::metadata(there.dir.join("device-state")).unwrap();
    assert_eq!(report["device_state_bytes"], state.len());
    assert!(state.len() > 0);
    assert_eq!(report["channels"], channels);
    let (sent, count) = (&status["ram"], |what| report[what].as_u64().unwrap());
    let whole = count("pages");
    if channels == 0 {
        assert_eq!(sent["normal"], whole, "{sent} {report}");
    } else {
        // Of packets QEMU counts the bytes alone: a head of 1344 each, and the pages.
        let heads = sent["multifd-bytes"].as_u64().unwrap() - 4096 * whole;
        assert_eq!(heads % 1344, 0, "{sent} {report}");
    }
    assert_eq!(sent["duplicate"], count("zero_pages"), "{sent} {report}");
    assert_eq!(report["machine"], source.machine.name());
    report
}

fn unix(place: &Place) -> String {
    place.unix("incoming")
}

fn tcp(_: &Place) -> String {
    "tcp:127.0.0.1:0".into()
}

#[test]
fn over_one_connection() {
    kept(Machine::None, tcp, &[], 0);
}

#[test]
fn with_a_return_path() {
    kept(Machine::None, unix, &["return-path"], 0);
}

#[test]
fn as_what_has_changed() {
    if !qemu() {
        return;
    }
    let place = Place::new();
    let mut source = Source::start(&place, Machine::None);
    // Few pages, over and over again.
    source.hot = 1 << 20..2 << 20;
    source.bandwidth = 30 << 20;
    let can = ["xbzrle", "return-path"];
    let report = kept_of(&place, source, &unix(&place), &can, 0);
    assert!(report["delta_pages"].as_u64().unwrap() > 0, "{report}");
}

#[test]
fn over_two_channels_of_multifd() {
    kept(Machine::None, unix, &["multifd"], 2);
}

#[test]
fn over_four_channels_of_multifd() {
    kept(Machine::None, tcp, &["multifd", "return-path"], 4);
}

#[test]
fn of_a_guest_that_runs() {
    kept(Machine::Pc, unix, &["return-path"], 0);
    kept(Machine::Pc, tcp, &["multifd", "return-path"], 2);
}

#[test]
fn of_a_file() {
    if !qemu() {
        return;
    }
    let place = Place::new();
    let file = place.arg("stream");
    let mut source = Source::start(&place, Machine::None);
    let status = source.migrate(&format!("exec:cat > {file}"), &[], 0);
    assert_eq!(status["status"], "completed", "{status}");
    let address = format!("file:{file}");
    let mut there = Receive::listen(&place, "there", &address, &FORMAT);
    there.wait_end().status("completed", 0);
    assert_same(&source.memory(), &there.ram());
}

#[test]
fn a_destination_that_is_cancelled_tells_the_source() {
    if !qemu() {
        return;
    }
    let place = Place::new();
    let mut there = Receive::start(&place, "there", &FORMAT);
    let mut source = Source::start(&place, Machine::None);
    source.bandwidth = 1 << 20;
    let address = there.address.clone();
    std::thread::scope(|scope| {
        let migration = scope.spawn(|| source.migrate(&address, &["return-path"], 0));
        there.wait_begun();
        there.process().signal(Signal::INT);
        there.wait_end().failed("cancelled", "cancelled");
        assert_eq!(migration.join().unwrap()["status"], "failed");
    });
    assert!(!there.dir.join("device-state").exists());
}

#[test]
fn multifd_that_was_not_asked_for_is_refused_in_words() {
    if !qemu() {
        return;
    }
    let place = Place::new();
    let mut there = Receive::start(&place, "there", &FORMAT);
    let mut source = Source::start(&place, Machine::None);
    let address = there.address.clone();
    std::thread::scope(|scope| {
        scope.spawn(|| source.migrate(&address, &["multifd", "return-path"], 2));
        there.wait_end().failed("failed", "--channels");
    });
}

#[test]
fn multifd_that_is_asked_for_and_not_used_is_missed() {
    if !qemu() {
        return;
    }
    let place = Place::new();
    let args = [&FORMAT[..], &["--channels", "2"]].concat();
    let mut there = Receive::start(&place, "there", &args);
    let mut source = Source::start(&place, Machine::None);
    let address = there.address.clone();
    std::thread::scope(|scope| {
        scope.spawn(|| source.migrate(&address, &["return-path"], 0));
        there.wait_end().failed("failed", "0 of 2 connections");
    });
}

/// A page of zeros, of a machine without devices.
const SMALL: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x04none\
    \x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\x10\x04\x03ram\0\0\0\0\0\0\x10\0\
    \0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\
    \x03\0\0\0\x02\0\0\0\0\0\0\0\x02\x03ram\0\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\
    \0\x06\0\0\0\x02{}";

/// What comes of a file with these bytes, kept in `there`.
fn of_bytes(place: &Place, bytes: &[u8]) -> Ended {
    std::fs::write(place.path("stream"), bytes).unwrap();
    let address = format!("file:{}", place.arg("stream"));
    Receive::listen(place, "there", &address, &FORMAT).wait_end()
}

#[test]
fn of_half_a_guest_nothing_is_left() {
    let place = Place::new();
    let there = place.path("there");
    std::fs::create_dir(&there).unwrap();
    std::fs::write(there.join("another.ram"), "of another guest").unwrap();
    std::fs::write(there.join("ram.ram"), "of an earlier guest").unwrap();
    let left = || {
        let all = std::fs::read_dir(&there).unwrap();
        let mut names: Vec<_> = all.map(|each| each.unwrap().file_name()).collect();
        names.sort();
        names
    };
    of_bytes(&place, &SMALL[..SMALL.len() - 1]).failed("failed", "truncated");
    assert_eq!(left(), ["another.ram"]);
    of_bytes(&place, SMALL).status("completed", 0);
    assert_eq!(left(), ["another.ram", "device-state", "ram.ram"]);
    // Where another has its memory nothing is touched.
    let ram = std::fs::File::open(there.join("ram.ram")).unwrap();
    rustix::fs::flock(&ram, rustix::fs::FlockOperation::LockExclusive).unwrap();
    of_bytes(&place, SMALL).failed("failed", "another machine");
    assert_eq!(left(), ["another.ram", "ram.ram"]);
}

#[test]
fn whatever_comes_of_it_the_same_is_told() {
    let keys = |report: &Value| -> Vec<String> {
        let all = report.as_object().unwrap();
        all.keys().cloned().collect()
    };
    let place = Place::new();
    let whole = of_bytes(&place, SMALL).status("completed", 0);
    let half = of_bytes(&place, &SMALL[..60]).status("failed", 1);
    assert_eq!(keys(&half), keys(&whole));
    let dir = place.arg("there");
    let missing = format!("file:{}", place.arg("missing"));
    let args = ["receive", "--json", "--listen", &missing, "--ram-dir", &dir];
    let none = run(&[&args[..], &FORMAT].concat()).failed("failed", "missing");
    assert_eq!(keys(&none), keys(&whole));
    let mut waits = Receive::start(&place, "waits", &FORMAT);
    let stopped = waits.process.take().unwrap().interrupt();
    let stopped = stopped.failed("cancelled", "cancelled");
    assert_eq!(keys(&stopped), keys(&whole));
    // Gleaner's own stream has other words for it.
    let none = run(&args).failed("failed", "missing");
    let mut waits = Receive::start(&place, "waits", &[]);
    let stopped = waits.process.take().unwrap().interrupt();
    let stopped = stopped.failed("cancelled", "cancelled");
    assert_eq!(keys(&none), keys(&stopped));
    // A directory that can't be made names what it was asked for with.
    let file = place.arg("stream");
    for format in [&[][..], &FORMAT] {
        let args = [
            "receive",
            "--json",
            "--listen",
            "tcp:127.0.0.1:0",
            "--ram-dir",
            &file,
        ];
        run(&[&args[..], format].concat()).failed("failed", "--ram-dir");
    }
}

#[test]
fn a_gleaner_that_comes_is_told_what_is_awaited() {
    let place = Place::new();
    let guest = Guest::in_memory(&place, "16M", &["--backend", "model"]);
    let mut there = Receive::start(&place, "there", &FORMAT);
    let sent = guest.send(&there.address, &[]).end();
    sent.failed("failed", "add --format qemu");
    assert!(there.process().runs());
}

#[test]
fn a_qemu_that_comes_to_a_gleaner_is_known_for_one() {
    let multifd = [&b"\x11\x22\x33\x44\0\0\0\x01"[..], &[0; 56]].concat();
    for said in [SMALL, &multifd] {
        let place = Place::new();
        let mut there = Receive::start(&place, "there", &[]);
        let path = there.address.strip_prefix("unix:").unwrap();
        let mut source = std::os::unix::net::UnixStream::connect(path).unwrap();
        std::io::Write::write_all(&mut source, said).unwrap();
        there.process().says("add --format qemu");
        std::fs::write(place.path("stream"), said).unwrap();
        let address = format!("file:{}", place.arg("stream"));
        let mut there = Receive::listen(&place, "file", &address, &[]);
        there.wait_end().failed("failed", "add --format qemu");
    }
}

#[test]
fn a_stream_of_another_kind() {
    let place = Place::new();
    std::fs::write(place.path("stream"), b"GLNR and so on").unwrap();
    let address = format!("file:{}", place.arg("stream"));
    let mut there = Receive::listen(&place, "there", &address, &FORMAT);
    there.wait_end().failed("failed", "not QEMU's stream");
}
