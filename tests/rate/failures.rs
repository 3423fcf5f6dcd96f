//! What goes wrong is said in one line.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;

use gleaner::service::{Request, Response};
use rustix::process::Signal;

use crate::common::kvm;
use crate::harness::*;

/// One line on standard error, the reason in the object, exit 1.
fn fails(ended: &Ended, reason: &str) {
    ended.failed("failed", reason);
    let lines = ended
        .stderr
        .lines()
        .filter(|line| line.starts_with("gleaner:"));
    assert_eq!(lines.count(), 1, "{ended:?}");
}

#[test]
fn nobody_there_is_said() {
    let place = Place::new();
    let control = place.arg("nobody");
    fails(
        &run(&["rate", "--json", "--control", &control]),
        "No such file",
    );
    std::fs::write(&control, "no socket").unwrap();
    fails(
        &run(&["rate", "--json", "--control", &control]),
        "Connection refused",
    );
}

/// Somebody who answers the first request, whatever it is, with a frame.
fn answering(at: &str, frame: Vec<u8>) -> std::thread::JoinHandle<Request> {
    let listener = UnixListener::bind(at).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut header = [0; 4];
        stream.read_exact(&mut header).unwrap();
        let mut bytes = vec![0; u32::from_le_bytes(header) as usize];
        stream.read_exact(&mut bytes).unwrap();
        stream.write_all(&frame).unwrap();
        Request::decode(&bytes).unwrap()
    })
}

fn framed(response: &Response) -> Vec<u8> {
    let bytes = response.encode().unwrap();
    let length = u32::try_from(bytes.len()).unwrap();
    [&length.to_le_bytes()[..], &bytes].concat()
}

#[test]
fn a_service_that_knows_of_no_meter_is_asked_in_words_that_it_understands() {
    // Version 1 answers a hello of any other version so, and can't read what it does not know.
    let place = Place::new();
    let control = place.arg("old");
    let text = "this service speaks version 1, the agent version 2: use the same gleaner for both";
    let old = answering(&control, framed(&Response::Error(text.into())));
    fails(&run(&["rate", "--json", "--control", &control]), text);
    let asked = old.join().unwrap();
    let Request::Hello { version, .. } = asked else {
        panic!("{asked:?} is no hello");
    };
    assert_ne!(version, 1, "it would begin a migration");
    // As version 1 reads it: variant 0, the version, 16 bytes.
    assert_eq!(asked.encode().unwrap().len(), 1 + 1 + 16);
}

#[test]
fn nonsense_from_a_service_is_refused() {
    for (name, frame) in [
        ("long", vec![0xff; 64]),
        ("garbage", [&8u32.to_le_bytes()[..], &[0xaa; 8]].concat()),
        ("stream", b"GLNR............".to_vec()),
        ("other", framed(&Response::Done)),
        ("short", vec![9, 0]),
    ] {
        let place = Place::new();
        let control = place.arg(name);
        let thread = answering(&control, frame);
        let ended = run(&["rate", "--json", "--control", &control]);
        fails(&ended, "");
        thread.join().unwrap();
    }
}

#[test]
fn a_service_that_ends_in_the_middle_is_said() {
    if !kvm() {
        return;
    }
    for signal in [Signal::KILL, Signal::INT] {
        let place = Place::new();
        let guest = Guest::start(&place, &[]);
        let rate = ["rate", "--json", "--control", &guest.control];
        let args = [&rate[..], &["--duration", "60s", "--interval", "100ms"]].concat();
        let mut meters = [Process::start(&args), Process::start(&args)];
        for meter in &mut meters {
            meter.says("dirtied");
        }
        // One that hangs does not hold it up.
        meters[1].signal(Signal::STOP);
        guest.process.signal(signal);
        guest.process.end();
        meters[1].signal(Signal::CONT);
        for meter in meters {
            let ended = meter.end();
            fails(&ended, "the guest's service has gone");
            // What was found before is not lost with it.
            let found = ended.status("failed", 1);
            assert_keys(&found, &["unique_pages", "curve", "verdict"]);
            assert!(found["duration_ms"].as_f64() > Some(0.0), "{found}");
        }
    }
}

#[test]
fn the_first_ctrl_c_asks_it_to_end_and_the_second_ends_it_at_once() {
    let place = Place::new();
    let guest = Guest::start(&place, &["--backend", "model"]);
    // A picture that goes into a pipe with nobody at its other end: no cancellation reaches who opens it.
    let pipe = place.arg("rate.svg");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mkfifoat(rustix::fs::CWD, &*pipe, mode).unwrap();
    let meter = || {
        let rate = ["rate", "--json", "--control", &guest.control];
        let rest = ["--duration", "1h", "--interval", "100ms", "--svg", &pipe];
        let mut meter = Process::start(&[&rate[..], &rest].concat());
        meter.says("dirtied");
        assert!(meter.catches(Signal::INT));
        meter.signal(Signal::INT);
        until("the first one is heard", || {
            (!meter.catches(Signal::INT)).then_some(())
        });
        meter
    };
    // Once: it ends as it does after its time, the picture and all.
    let once = meter();
    let picture = std::fs::read_to_string(&pipe).unwrap();
    assert!(picture.ends_with("</svg>\n"), "{picture}");
    once.end().status("completed", 0);
    // Twice: there and then, by the signal, with nothing said.
    let twice = meter();
    twice.signal(Signal::INT);
    let ended = twice.end();
    assert_eq!((ended.code, &*ended.stdout), (None, ""), "{ended:?}");
}

#[test]
fn what_can_not_be_asked_for_is_usage() {
    for bad in [
        &["--interval", "10ms"][..],
        &["--duration", "1ms"],
        &["--duration", "0s"],
        &["--json", "--prometheus"],
        &["--serve", "host"],
        &["--bandwidth", "0"],
    ] {
        let args = [&["rate", "--control", "/nowhere"][..], bad].concat();
        let ended = run(&args);
        assert_eq!(ended.code, Some(2), "{ended:?}");
    }
}
