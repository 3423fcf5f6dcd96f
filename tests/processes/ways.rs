//! Every failure at every step, over several connections, with TLS, packed, and all of these together: the guest runs at
//! one place at most, at exactly one wherever that can be known, and moves on from there with all that it wrote.
//!
//! A fixed selection is walked each time, and all of it by
//! `cargo test --release --test processes ways -- --ignored --nocapture`.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use gleaner::Tracking;
use gleaner::migrate::{Listener, Receiver, ReceiverOptions, Status};
use gleaner::vmm::{Backend, IncomingMachine};
use rustix::process::Signal;

use crate::common::{bytes_of, kvm};
use crate::harness::*;
use crate::steps::*;
use crate::way::*;

/// A guest with contents for every connection.
fn guest(place: &Place) -> Guest {
    let guest = Guest::writing(place, "8000", &[]);
    until("it has written all over its memory", || {
        let ram = guest.ram();
        let written = |part: &[u8]| {
            let pages = part.chunks(4096);
            pages.filter(|page| page.iter().any(|b| *b != 0)).count() >= 32
        };
        ram.chunks(ram.len().div_ceil(3)).all(written).then_some(())
    });
    guest
}

/// A migration that stands still at a step.
fn standing(way: Way, step: Step) -> (Place, Guest, Standing) {
    const TRIES: usize = 20;
    let mut tries = (0..TRIES).filter_map(|_| {
        let place = Place::new();
        let guest = guest(&place);
        let standing = Standing::on(&place, &guest, way, step.spot, &step.options())?;
        Some((place, guest, standing))
    });
    tries.next().expect("a connection that carries something")
}

/// Both ends after a fault.
struct After {
    /// What the agent said, if it lived.
    sent: Option<Ended>,
    receive: Receive,
}

impl After {
    fn of(fault: Fault, standing: Standing, step: Step) -> Self {
        let Standing {
            send,
            mut receive,
            held,
        } = standing;
        let sent = match fault {
            Fault::Cut => {
                held.cut();
                Some(send.end())
            }
            Fault::CutOne(connection) => {
                held.cut_one(connection);
                Some(send.end())
            }
            Fault::KillAgent => {
                send.kill();
                held.cut();
                None
            }
            Fault::KillDestination => {
                receive.process.take().unwrap().kill();
                held.cut();
                Some(send.end())
            }
            // It ends while the line stands still, so nothing that comes over it helps.
            Fault::CancelAgent if step.holds() => {
                let sent = send.interrupt();
                held.release();
                sent.failed("cancelled", "cancelled");
                Some(sent)
            }
            Fault::CancelAgent => {
                send.signal(Signal::INT);
                held.release();
                Some(send.end())
            }
            Fault::CancelDestination => {
                receive.wait_interrupted();
                held.release();
                Some(send.end())
            }
        };
        Self { sent, receive }
    }
}

impl Receive {
    /// It is called off, and never ran the guest.
    fn wait_interrupted(&mut self) {
        let received = self.process.take().unwrap().interrupt();
        assert_ne!(received.json()["status"], "completed", "{received:?}");
        assert_eq!(received.code, Some(1), "{received:?}");
    }
}

/// One failure at one step, and the next migration; why the attempt failed.
fn walk(way: Way, step: Step, fault: Fault) -> String {
    let (place, mut guest, standing) = standing(way, step);
    let stopped = (step.moment >= Moment::LastRound).then(|| guest.ram());
    let After { sent, mut receive } = After::of(fault, standing, step);
    let mut ended = sent.as_ref();
    let reason = ended.map_or("killed".into(), |sent| sent.json()["reason"].to_string());
    if let Some(sent) = ended.filter(|sent| sent.code != Some(0)) {
        sent.failed(sent.json()["status"].as_str().unwrap(), "");
    }
    // Whoever does not know where the guest is has it asked for.
    let doubt = ended.is_some_and(|sent| sent.json()["status"] == "in-doubt");
    let asked;
    if doubt || (ended.is_none() && !step.holds()) {
        asked = guest
            .send(&receive.address, &as_str(&way.send(&place)))
            .end();
        ended = Some(&asked);
    }
    let (code, status) = ended.map_or((1, "failed".into()), |ended| {
        let status = ended.json()["status"].as_str().unwrap().to_owned();
        (ended.code.unwrap(), status)
    });
    let guests = step.guests(fault);
    let found = match &*status {
        "in-doubt" => Guests::InDoubt,
        "completed" if receive.process.is_none() => Guests::Gone,
        // Its agent passed on that it runs there, and was killed.
        "failed" if fault == Fault::KillAgent && step.knows() => Guests::There,
        "completed" => Guests::There,
        _ => Guests::Here,
    };
    assert_eq!(code == 0, status == "completed", "{ended:?}");
    let either = [Guests::Here, Guests::There].contains(&found);
    let good = found == guests || (guests == Guests::HereOrThere && either);
    assert!(good, "{found:?} and not {guests:?}: {sent:?}, {ended:?}");
    let here = place.path("ram");
    match found {
        Guests::Here => {
            guest.assert_runs();
            if receive.process.is_some() {
                receive.wait_interrupted();
            }
            if let Some(stopped) = stopped.filter(|_| !step.holds()) {
                assert_same(&stopped, &receive.ram());
            }
            arrives(&place, &guest.control, &here, way);
        }
        Guests::There => {
            let left = stopped.unwrap_or_else(|| guest.ram());
            guest.process.says("has migrated away");
            assert_changes(&receive.ram_file());
            assert_same(&left, &guest.ram());
            let control = receive.dir.with_extension("control");
            until("the guest is served there", || {
                control.exists().then_some(())
            });
            let there = receive.ram_file();
            arrives(&place, control.to_str().unwrap(), &there, way);
            assert_same(&left, &guest.ram());
        }
        Guests::Gone => {
            guest.process.says("has migrated away");
            assert_same(&stopped.unwrap(), &guest.ram());
        }
        _ => {
            assert!(guest.process.runs());
            assert_same(&stopped.unwrap(), &guest.ram());
        }
    }
    if let Some(sent) = &sent {
        assert_named(sent, step, fault, found);
    }
    reason
}

/// The agent says what happened.
fn assert_named(sent: &Ended, step: Step, fault: Fault, found: Guests) {
    let report = sent.json();
    let why = match (fault, found) {
        _ if sent.code == Some(0) => return,
        (Fault::CancelAgent | Fault::CancelDestination, _) => "cancelled".to_owned(),
        (Fault::CutOne(connection @ 1..), _) => format!("connection {connection}: "),
        _ => "has gone".to_owned(),
    };
    let reason = report["reason"].as_str().unwrap();
    // The first one broke, and one that joins hears so from a destination that awaits a migration again.
    let broken = reason.ends_with("this connection is of no migration that is under way here");
    let named = broken && [Fault::Cut, Fault::CutOne(0)].contains(&fault);
    // Nobody had said hello to it, so it may know of nothing to call off.
    let unheard = fault == Fault::CancelDestination && step.is_before_hello();
    let named = named || (unheard && reason.ends_with("has gone"));
    assert!(named || reason.contains(&why), "{why:?} is not in {sent:?}");
}

/// Without failures the guest moves by the same way: all its memory is the same, and it finds all that it wrote.
fn arrives(place: &Place, control: &str, ram: &Path, way: Way) {
    let address = place.unix("last");
    let mut listener = Listener::bind(&address.parse().unwrap()).unwrap();
    #[cfg(feature = "tls")]
    if let [_, dir] = &way.receive(place)[..] {
        let server = gleaner::migrate::TlsServer::load(Path::new(dir)).unwrap();
        listener = listener.tls(server).unwrap();
    }
    let from: PathBuf = ram.into();
    let mut destination = IncomingMachine::new()
        .resume(Backend::Kvm, Tracking::Auto)
        .on_complete(Box::new(move |blocks| {
            assert_same(&std::fs::read(&from).unwrap(), &bytes_of(&blocks["ram"]));
            Ok(())
        }));
    let options = way.send(place);
    let args = ["send", "--json", "--control", control, "--to", &address];
    let (sent, received) = std::thread::scope(|scope| {
        let receiver = Receiver::new(&mut destination, ReceiverOptions::default());
        let receiving = scope.spawn(|| receiver.listen(&listener).unwrap());
        let sent = run(&[&args[..], &as_str(&options)].concat());
        (sent, receiving.join().unwrap())
    });
    sent.status("completed", 0);
    assert_eq!(received.status, Status::Completed);
    let machine = destination.take_machine().unwrap();
    let check = machine.check(Duration::from_secs(60)).unwrap();
    assert!(check.is_ok(), "the guest's own check: {check}");
}

/// Walks cells of a way, and says what came of it.
fn walk_all(way: Way, cells: Vec<(Step, Fault)>) {
    let start = Instant::now();
    let (mut reasons, mut bad) = (BTreeMap::<_, usize>::new(), Vec::new());
    let count = cells.len();
    for (step, fault) in cells {
        match catch_unwind(AssertUnwindSafe(|| walk(way, step, fault))) {
            Ok(reason) => {
                let reason = reason.split("; the guest stays").next().unwrap();
                let said = format!("{:?}, {fault:?}: {reason}", step.moment);
                *reasons.entry(said).or_default() += 1;
            }
            Err(_) => {
                say(&format!("failed: {fault:?} at {step:?}"));
                bad.push((step, fault));
            }
        }
    }
    for (said, count) in reasons {
        println!("{count} {said}");
    }
    say(&format!(
        "{way:?}: {count} failures, {} not survived, in {:.0} s",
        bad.len(),
        start.elapsed().as_secs_f64()
    ));
    assert!(bad.is_empty(), "{way:?}: {bad:?}");
}

#[test]
fn over_several_connections_the_guest_is_at_one_place_whatever_fails() {
    if kvm() {
        walk_all(Way::CHANNELS, some(Way::CHANNELS, 0));
    }
}

#[test]
#[cfg(feature = "tls")]
fn with_tls_the_guest_is_at_one_place_whatever_fails() {
    if kvm() {
        walk_all(Way::TLS, some(Way::TLS, 1));
    }
}

#[test]
fn packed_the_guest_is_at_one_place_whatever_fails() {
    if kvm() {
        walk_all(Way::PACKED, some(Way::PACKED, 2));
    }
}

#[test]
#[cfg(feature = "tls")]
fn by_all_ways_together_the_guest_is_at_one_place_whatever_fails() {
    if kvm() {
        walk_all(Way::TOGETHER, some(Way::TOGETHER, 3));
    }
}

#[test]
#[ignore = "2,036 failures take a quarter of an hour"]
fn at_every_step_and_part_of_a_frame_too() {
    if !kvm() {
        return;
    }
    std::thread::scope(|scope| {
        for way in Way::others() {
            scope.spawn(move || walk_all(way, every(way)));
        }
    });
}
