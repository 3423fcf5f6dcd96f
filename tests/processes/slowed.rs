//! A migration that fails while it slows the guest.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use gleaner::migrate::{MigrationId, Source, Throttle};
use gleaner::service::{Attach, ServiceClient};

use crate::common::kvm;
use crate::harness::*;
use crate::way::*;

/// Names the guest's socket to the agent.
const CONTROL: &str = "GLEANER_TEST_CONTROL";

/// Slows the guest, and does nothing else until it is killed.
#[test]
#[ignore = "the agent of the test below, which starts it in a process of its own"]
fn agent() {
    let Ok(control) = std::env::var(CONTROL) else {
        return;
    };
    let attached = ServiceClient::attach(Path::new(&control), MigrationId([1; 16])).unwrap();
    let Attach::Ready(mut agent) = attached else {
        panic!("{attached:?}");
    };
    agent.throttle(Throttle::All { percent: 99 }).unwrap();
    loop {
        std::thread::park();
    }
}

/// Share of looks at a guest's memory between which it has changed. One look sees pages from all over it.
fn moving(ram: &Path) -> f64 {
    const LOOKS: u32 = 50;
    let file = File::open(ram).unwrap();
    let pages = file.metadata().unwrap().len() / 4096;
    let look = || -> Vec<u8> {
        let mut seen = vec![0; 4096 * 64];
        for (page, seen) in (0..).step_by(61).zip(seen.chunks_mut(4096)) {
            file.read_exact_at(seen, page % pages * 4096).unwrap();
        }
        seen
    };
    let (mut before, mut changes) = (look(), 0);
    for _ in 0..LOOKS {
        std::thread::sleep(Duration::from_millis(10));
        let now = look();
        changes += u32::from(now != before);
        before = now;
    }
    f64::from(changes) / f64::from(LOOKS)
}

/// One that writes as fast as it can: one that is paced makes up for its rests.
fn at_full_speed(place: &Place, more: &[&str]) -> Guest {
    Guest::writing(place, "1000000000", more)
}

#[test]
fn a_guest_whose_agent_is_killed_while_it_slows_it_is_at_full_speed_again() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let (mut guest, ram) = (at_full_speed(&place, &[]), place.path("ram"));
    let mut agent = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "slowed::agent", "--ignored"])
        .env(CONTROL, &guest.control)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    until("the guest is slowed", || {
        assert!(agent.try_wait().unwrap().is_none(), "the agent has ended");
        (moving(&ram) < 0.2).then_some(())
    });
    agent.kill().unwrap();
    agent.wait().unwrap();
    until("the guest is at full speed", || {
        (moving(&ram) > 0.6).then_some(())
    });
    assert!(guest.process.runs());
}

#[test]
fn a_guest_whose_destination_is_killed_while_it_is_slowed_is_at_full_speed_again() {
    if !kvm() {
        return;
    }
    let way = Way {
        compress: None,
        ..Way::others().last().unwrap()
    };
    let place = Place::new();
    let (mut guest, ram) = (
        at_full_speed(&place, &["--workload", "hot:1M"]),
        place.path("ram"),
    );
    let mut receive = Receive::start(&place, "there", &as_str(&way.receive(&place)));
    let mut options = way.send(&place);
    // Blocks that are plugged in alone take longer: it is slowed as far as can be, and rounds go on.
    let limits = ["--bandwidth-limit", "8M", "--downtime-limit", "20ms"];
    options.extend(["--throttle", "all"].map(String::from));
    options.extend(limits.map(String::from));
    let mut send = guest.send(&receive.address, &as_str(&options));
    until("the guest is slowed", || {
        assert!(send.runs(), "the migration has ended");
        (moving(&ram) < 0.2).then_some(())
    });
    receive.process.take().unwrap().kill();
    send.end().failed("failed", "has gone");
    until("the guest is at full speed", || {
        (moving(&ram) > 0.6).then_some(())
    });
    assert!(guest.process.runs());
    guest.assert_migrates(&place);
}
