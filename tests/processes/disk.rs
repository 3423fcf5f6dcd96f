//! A disk that is full: the guest runs on, the reason is said, and the next migration arrives whole.

use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Resource;

use crate::common::kvm;
use crate::harness::*;
use crate::way::*;

/// A file system with less room than the guest has memory, and than its page tables alone take in a stream.
struct Tiny(PathBuf);

impl Tiny {
    /// Mounted in `place`. `None`, and one visible line, where that is not allowed.
    fn mount(place: &Place) -> Option<Self> {
        let at = place.path("tiny");
        std::fs::create_dir(&at).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=256K,mode=700", "none"]);
        match mount.arg(&at).output() {
            Ok(done) if done.status.success() => return Some(Self(at)),
            Ok(done) => say(&format!("skipped: a full disk: {}", text(&done.stderr))),
            Err(error) => say(&format!("skipped: a full disk: mount: {error}")),
        }
        None
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        // Lazily: a process that has just been killed may still have a file open there.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_owned()
}

#[test]
fn a_file_that_finds_no_room() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let Some(tiny) = Tiny::mount(&place) else {
        return;
    };
    let mut guest = Guest::start(&place, &[]);
    let to = format!("file:{}", tiny.path().join("guest").display());
    let sent = guest.send(&to, &[]).end();
    let report = sent.failed("failed", "can't go on writing to the stream: No space left");
    assert_keys(&report, &SEND);
    guest.assert_runs();
    // What was written is no guest.
    let dir = place.arg("there");
    run(&["receive", "--json", "--listen", &to, "--ram-dir", &dir]).status("failed", 1);
    guest.assert_migrates(&place);
}

#[test]
fn a_file_that_takes_nothing() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let mut guest = Guest::start(&place, &[]);
    let sent = guest.send("file:/dev/full", &[]).end();
    sent.failed("failed", "No space left");
    guest.assert_runs();
    guest.assert_migrates(&place);
}

#[test]
fn a_destination_whose_memory_finds_no_room() {
    if !kvm() {
        return;
    }
    for (way, resume) in Way::all().flat_map(|way| [(way, false), (way, true)]) {
        let place = Place::new();
        let Some(_tiny) = Tiny::mount(&place) else {
            return;
        };
        let mut guest = Guest::start(&place, &[]);
        let mut more = way.receive(&place);
        more.extend(resume.then(|| "--resume".into()));
        let mut receive = Receive::start(&place, "tiny", &as_str(&more));
        let sent = guest.send(&receive.address, &as_str(&way.send(&place)));
        let sent = sent.end();
        let received = receive.wait_end();
        let reason = received.failed("failed", "ram.ram: No space left");
        let report = sent.failed("failed", "No space left");
        assert_eq!(report["reason"], reason["reason"]);
        guest.assert_runs();
        guest.assert_migrates(&place);
    }
}

/// Bytes of address space that a process has.
fn address_space(process: &Process) -> u64 {
    let pages = std::fs::read_to_string(format!("/proc/{}/statm", process.pid())).unwrap();
    let pages: u64 = pages.split(' ').next().unwrap().parse().unwrap();
    pages * 4096
}

#[test]
fn a_destination_that_finds_no_memory() {
    if !kvm() {
        return;
    }
    for way in Way::all() {
        let place = Place::new();
        let mut guest = Guest::start(&place, &[]);
        let mut receive = Receive::start(&place, "there", &as_str(&way.receive(&place)));
        // Room for threads, and not for the guest.
        let most = address_space(receive.process()) + (12 << 20);
        receive.process().limit(Resource::As, most);
        let sent = guest.send(&receive.address, &as_str(&way.send(&place)));
        let sent = sent.end();
        let received = receive.wait_end();
        let reason = received.failed("failed", "Cannot allocate memory");
        let report = sent.failed("failed", "Cannot allocate memory");
        assert_eq!(report["reason"], reason["reason"]);
        guest.assert_runs();
        guest.assert_migrates(&place);
    }
}
