//! An agent that is killed while it slows the guest.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use gleaner::migrate::{MigrationId, Source, Throttle};
use gleaner::service::{Attach, ServiceClient};

use crate::common::kvm;
use crate::harness::*;

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

#[test]
fn a_guest_whose_agent_is_killed_while_it_slows_it_is_at_full_speed_again() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let (control, ram) = (place.arg("control"), place.path("ram"));
    // As fast as it can: one that is paced makes up for its rests.
    let ram_file = place.arg("ram");
    let args = ["guest", "--control", &control, "--ram", RAM, "--ram-file"];
    let mut guest = Process::start(&[&args[..], &[&*ram_file]].concat());
    guest.says("guest runs");
    let mut agent = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "slowed::agent", "--ignored"])
        .env(CONTROL, &control)
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
    assert!(guest.runs());
}
