//! A guest that moves on and on, from process to process, under slot transactions of every kind: at each hop every page of
//! every block is compared while it stands still at both ends, and in the end it checks itself.
//!
//! `GLEANER_LONG=1 cargo test --release --test processes soak` makes many hops.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use gleaner::migrate::{Listener, Receiver, ReceiverOptions, Status};
use gleaner::vmm::{Backend, IncomingMachine};
use gleaner::{PAGE_SIZE, Tracking};

use crate::common::{bytes_of, kvm};
use crate::harness::*;
use crate::proxy::*;

/// Pages by the names of their blocks.
type Blocks = BTreeMap<String, Vec<u8>>;

fn hops() -> usize {
    if std::env::var_os("GLEANER_LONG").is_some() {
        200
    } else {
        10
    }
}

/// The guest's blocks as its process has them open: files of its RAM, and memfds of what was plugged in.
fn blocks_of(process: &Process, ram: &str) -> Blocks {
    let mut blocks = Blocks::new();
    let mut seen = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{}/fd", process.pid())).unwrap() {
        let path = entry.unwrap().path();
        // It may be closed by now.
        let Ok(target) = fs::read_link(&path) else {
            continue;
        };
        let target = target.to_str().unwrap().trim_end_matches(" (deleted)");
        let name = match target.strip_prefix("/memfd:") {
            _ if target == ram => "ram",
            Some(name) => name,
            None => match target.rsplit('/').next().unwrap().strip_suffix(".ram") {
                Some(name) => name,
                None => continue,
            },
        };
        let inode = fs::metadata(&path).unwrap().ino();
        if let Some(other) = seen.insert(name.to_owned(), inode) {
            assert_eq!(other, inode, "two blocks named {name}");
        }
        blocks.insert(name.to_owned(), fs::read(&path).unwrap());
    }
    blocks
}

/// What arrived, as files.
fn blocks_in(receive: &Receive) -> Blocks {
    let files = fs::read_dir(&receive.dir).unwrap();
    let blocks = files.map(|file| {
        let path = file.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        (name, fs::read(path).unwrap())
    });
    blocks.collect()
}

/// All blocks and pages are the same; pages compared.
fn compare(here: &Blocks, there: &Blocks) -> usize {
    let names = |blocks: &Blocks| blocks.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(here), names(there));
    for (name, bytes) in here {
        assert_same(bytes, &there[name]);
    }
    here.values().map(Vec::len).sum::<usize>() / usize::try_from(PAGE_SIZE).unwrap()
}

/// Where the guest runs.
struct Host {
    process: Process,
    control: String,
    ram: String,
}

impl Host {
    fn send(&self, to: &str) -> Process {
        Process::start(&["send", "--json", "--control", &self.control, "--to", to])
    }
}

/// Starts a migration from `host` that stands still before GO, the guest at both ends.
fn before_go(place: &Place, host: &Host, n: usize, to: &str) -> (Process, Held) {
    let line = place.path(&format!("line{n}"));
    let point = Point {
        kind: GO,
        part: Part::Nothing,
    };
    let held = hold(&line, to.strip_prefix("unix:").unwrap().into(), point);
    let send = host.send(&format!("unix:{}", line.display()));
    (send, held.recv().unwrap())
}

#[test]
fn a_guest_that_moves_on_and_on_is_the_same_after_every_hop() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let guest = Guest::start(&place, &["--vcpus", "2"]);
    let mut host = Host {
        process: guest.process,
        control: guest.control,
        ram: place.arg("ram"),
    };
    let (mut pages, mut transactions) = (0, 0);
    for n in 0..hops() {
        let control = place.arg(&format!("control{n}"));
        let name = format!("host{n}");
        let mut next = Receive::start(&place, &name, &["--resume", "--control", &control]);
        let (send, held) = before_go(&place, &host, n, &next.address);
        pages += compare(&blocks_of(&host.process, &host.ram), &blocks_in(&next));
        held.release();
        let report = send.end().status("completed", 0);
        transactions += report["transactions"].as_u64().unwrap();
        host.process.says("has migrated away");
        assert_changes(&next.ram_file());
        host.process.interrupt();
        // Nobody asks for what is gone.
        let _ = fs::remove_dir_all(place.path(&format!("host{}", n.wrapping_sub(1))));
        until("the next service is there", || {
            fs::exists(&control).unwrap().then_some(())
        });
        host = Host {
            ram: next.ram_file().to_str().unwrap().to_owned(),
            process: next.process.take().unwrap(),
            control,
        };
    }
    // The last hop is to this process, where the guest can be asked.
    let address = place.unix("here");
    let listener = Listener::bind(&address.parse().unwrap()).unwrap();
    let mut destination = IncomingMachine::new().resume(Backend::Kvm, Tracking::Auto);
    let (sent, received) = std::thread::scope(|scope| {
        let receiver = Receiver::new(&mut destination, ReceiverOptions::default());
        let receiving = scope.spawn(|| receiver.listen(&listener).unwrap());
        (host.send(&address).end(), receiving.join().unwrap())
    });
    sent.status("completed", 0);
    assert_eq!(received.status, Status::Completed);
    let machine = destination.take_machine().unwrap();
    let check = machine.check(Duration::from_secs(60)).unwrap();
    assert!(check.is_ok(), "the guest's own check: {check}");
    assert!(!bytes_of(machine.ram()).iter().all(|byte| *byte == 0));
    say(&format!(
        "{} hops between processes, {transactions} slot transactions meanwhile, {pages} pages compared, 0 differing",
        hops()
    ));
}
