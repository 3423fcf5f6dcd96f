//! A stream in a file, which a QEMU reads later: nobody answers, and nothing is asked.

use crate::arrives::{CHURN, to_qemu};
use crate::common::kvm;
use crate::harness::*;
use crate::peer::{Like, Qemu, qemu};

#[test]
fn a_file_is_loaded() {
    if !qemu() {
        return;
    }
    let place = Place::new();
    let ram = 16 << 20;
    let mut guest = Guest::in_memory(&place, &ram.to_string(), &CHURN);
    let file = place.arg("stream");
    let sent = guest.send(&format!("file:{file}"), &to_qemu("1", &[]));
    let sent = sent.end();
    sent.status("completed", 0);
    let arrived = "the guest's memory is in the file, for a QEMU";
    assert!(sent.stderr.contains(arrived), "{sent:?}");
    guest.process.says("the guest has migrated away");
    let like = Like {
        block: "ram",
        ram,
        channels: 1,
    };
    let there = Qemu::start(&place, &like, &format!("exec:cat {file}"));
    assert_same(&guest.ram(), &there.completed());
}

#[test]
fn memory_that_is_plugged_meanwhile_is_refused() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let mut guest = Guest::in_memory(&place, "16M", &["--churn-kinds", "hotplug"]);
    // Slow, so that a block comes or goes meanwhile.
    let slowly = to_qemu("1", &["--bandwidth-limit", "1M"]);
    let file = format!("file:{}", place.arg("stream"));
    let sent = guest.send(&file, &slowly);
    sent.end().failed("failed", "QEMU's stream can't tell that");
    guest.assert_runs();
    guest.assert_migrates(&place);
}
