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

#[test]
fn a_stream_of_another_kind() {
    let place = Place::new();
    std::fs::write(place.path("stream"), b"GLNR and so on").unwrap();
    let address = format!("file:{}", place.arg("stream"));
    let mut there = Receive::listen(&place, "there", &address, &FORMAT);
    there.wait_end().failed("failed", "not QEMU's stream");
}
