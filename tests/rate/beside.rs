//! A meter beside whatever else goes on: it counts right, and is in nobody's way.

use gleaner::migrate::CancelToken;
use gleaner::service::{MeterClient, Request, Response};
use rustix::process::Signal;
use serde_json::Value;

use crate::common::{MODES, kvm};
use crate::harness::*;

/// A meter of a guest, until it is interrupted.
fn meter(guest: &Guest, more: &[&str]) -> Process {
    let mut args = vec!["rate", "--control", &guest.control, "--json"];
    args.extend(["--duration", "60s", "--interval", "100ms"]);
    args.extend(more);
    Process::start(&args)
}

fn block<'a>(report: &'a Value, name: &str) -> &'a Value {
    let blocks = report["blocks"].as_array().unwrap();
    blocks.iter().find(|b| b["name"] == name).unwrap()
}

fn pages_apart(a: &[u8], b: &[u8]) -> u64 {
    let pages = a.chunks(4096).zip(b.chunks(4096));
    pages.filter(|(a, b)| a != b).count() as u64
}

#[test]
fn it_counts_what_changes_in_the_middle_of_a_migration() {
    if !kvm() {
        return;
    }
    for (mode, _) in MODES {
        let place = Place::new();
        let guest = Guest::start(&place, &["--tracking", mode]);
        let receive = Receive::start(&place, "there", &[]);
        // It never gets there.
        let mut send = guest.send(&receive.address, &["--downtime-limit", "0ms"]);
        send.says("round 3:");
        let before = guest.ram();
        let mut meter = meter(&guest, &[]);
        meter.says("dirtied");
        let inside = guest.ram();
        meter.wait_for("five windows are over", |said| {
            said.matches("dirtied").count() >= 5
        });
        let last = guest.ram();
        let report = meter.interrupt().status("completed", 0);
        let after = guest.ram();
        assert_eq!(report["tracking"], mode);
        // Whatever changed while it looked, and nothing that did not while it was there.
        let (least, most) = (
            pages_apart(&inside, &last),
            pages_apart(&before, &after) + 2,
        );
        let found = block(&report, "ram")["unique_pages"].as_u64().unwrap();
        assert!(least > 200, "{mode}: {least} pages changed");
        assert!(
            (least..=most).contains(&found),
            "{mode}: {found}, of {least} to {most}"
        );
        let interval = report["unique_pages_interval95"].as_array().unwrap();
        assert!(interval.iter().all(|n| *n == report["unique_pages"]));
        send.interrupt().status("cancelled", 1);
        drop(receive);
    }
}

#[test]
fn meters_that_hang_or_die_are_in_nobodys_way() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let mut guest = Guest::start(&place, &[]);
    let mut meters: Vec<Process> = (0..3).map(|_| meter(&guest, &[])).collect();
    for meter in &mut meters {
        meter.says("dirtied");
    }
    meters[0].signal(Signal::STOP);
    meters.remove(1).kill();
    guest.assert_runs();
    guest.assert_migrates(&place);
    // The one that is left hears of it, the one that hung too.
    meters[0].signal(Signal::CONT);
    for meter in meters {
        let report = meter.end().status("completed", 0);
        assert_eq!(report["migrated_away"], true);
        assert!(report["unique_pages"].as_u64() > Some(0));
    }
}

#[test]
fn a_meter_gets_no_memory_and_changes_nothing() {
    use std::os::unix::net::UnixStream;
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;

    if !kvm() {
        return;
    }
    let place = Place::new();
    let mut guest = Guest::start(&place, &[]);
    let mut socket = UnixStream::connect(&guest.control).unwrap();
    let mut ask = |request: &Request| {
        use std::io::{Read, Write};
        let bytes = request.encode().unwrap();
        let length = u32::try_from(bytes.len()).unwrap();
        socket.write_all(&length.to_le_bytes()).unwrap();
        socket.write_all(&bytes).unwrap();
        let mut header = [0; 4];
        let (got, file) = socket.recv_with_fd(&mut header).unwrap();
        assert!(file.is_none(), "{request:?}");
        socket.read_exact(&mut header[got..]).unwrap();
        let mut bytes = vec![0; u32::from_le_bytes(header) as usize];
        socket.read_exact(&mut bytes).unwrap();
        Response::decode(&bytes).unwrap()
    };
    let hello = Request::Hello {
        version: gleaner::service::VERSION,
        migration: gleaner::service::METER,
    };
    assert!(matches!(ask(&hello), Response::Welcome { .. }));
    let Response::Look(look) = ask(&Request::Look) else {
        panic!("no look");
    };
    let ram = look.blocks.iter().find(|b| b.name == "ram").unwrap();
    for request in [
        Request::Block(ram.id),
        Request::HandOver(ram.id),
        Request::Stop,
        Request::Lease(1),
        Request::Relinquish,
        hello.clone(),
    ] {
        assert!(matches!(ask(&request), Response::Error(_)), "{request:?}");
    }
    guest.assert_runs();
}

#[test]
fn meters_come_up_to_a_number_and_again_when_one_has_gone() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let guest = Guest::start(&place, &[]);
    let cancel = CancelToken::new();
    let attach = || MeterClient::attach(guest.control.as_ref(), &cancel);
    let mut meters: Vec<MeterClient> = (0..8).map(|_| attach().unwrap()).collect();
    let refused = attach().unwrap_err().to_string();
    assert!(refused.contains("8 meters are here already"), "{refused}");
    for meter in &mut meters {
        assert!(!meter.look().unwrap().blocks.is_empty());
    }
    meters.pop();
    until("there is room again", || attach().ok());
    // An agent has its own.
    guest.assert_migrates(&place);
}

#[test]
fn a_guest_that_moves_on_is_metered_where_it_is() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let guest = Guest::start(&place, &[]);
    let control = place.arg("second");
    let args = ["--resume", "--control", &control];
    let receive = Receive::start(&place, "there", &args);
    guest
        .send(&receive.address, &[])
        .end()
        .status("completed", 0);
    let rate = [
        "rate",
        "--control",
        &control,
        "--json",
        "--duration",
        "200ms",
    ];
    let report = until("it is served there", || {
        let ended = run(&rate);
        (ended.code == Some(0)).then(|| ended.json())
    });
    assert!(report["unique_pages"].as_u64() > Some(0), "{report}");
    // And where it was, nothing is written any more.
    let ended = run(&[
        "rate",
        "--control",
        &guest.control,
        "--json",
        "--duration",
        "5s",
    ]);
    let report = ended.status("completed", 0);
    assert_eq!(report["migrated_away"], true);
    assert_eq!(report["unique_pages"], 0);
    drop(receive);
}
