//! What a QEMU does not take, and one that is gone: a line says what is likely, and the guest runs on at the source.

use crate::arrives::{CHURN, to_qemu};
use crate::harness::*;
use crate::peer::{Like, Qemu, qemu};

const RAM: u64 = 16 << 20;
const FITTING: Like<'_> = Like {
    block: "ram",
    ram: RAM,
    channels: 1,
};

/// What went wrong.
struct Refused {
    /// What the sender says contains this,
    reason: &'static str,
    /// and what QEMU says this.
    said: &'static str,
}

fn refused(like: &Like<'_>, args: &[&str], expected: &Refused) {
    if !qemu() {
        return;
    }
    let place = Place::new();
    let address = place.unix("incoming");
    let mut there = Qemu::listen(&place, like, &address);
    let mut guest = Guest::in_memory(&place, "16M", &CHURN);
    let sent = guest.send(&address, args).end();
    sent.failed("failed", expected.reason);
    let said = there.said();
    assert!(said.contains(expected.said), "{said}");
    guest.assert_runs();
    guest.assert_migrates(&place);
}

#[test]
fn another_machine() {
    let args = to_qemu("1", &["--machine", "pc-i440fx-7.2"]);
    let expected = Refused {
        reason: "a QEMU with -incoming, of the machine \"pc-i440fx-7.2\"",
        said: "Machine type received is 'pc-i440fx-7.2'",
    };
    refused(&FITTING, &args, &expected);
}

#[test]
fn a_block_of_another_length() {
    let like = Like {
        ram: 2 * RAM,
        ..FITTING
    };
    let expected = Refused {
        reason: "RAM blocks ram of 16777216 bytes; its standard error says more",
        said: "Size mismatch: ram",
    };
    refused(&like, &to_qemu("1", &[]), &expected);
}

#[test]
fn an_unknown_block() {
    let like = Like {
        block: "mem0",
        ..FITTING
    };
    let expected = Refused {
        reason: "RAM blocks ram of 16777216 bytes; its standard error says more",
        said: "Unknown ramblock \"ram\"",
    };
    refused(&like, &to_qemu("1", &[]), &expected);
}

#[test]
fn multifd_of_a_later_version() {
    let like = Like {
        channels: 2,
        ..FITTING
    };
    let expected = Refused {
        reason: "the QEMU has to be of version 8.1 or later",
        said: "Unknown combination of migration flags: 0x200",
    };
    // What is sent unless another version is asked for, refused here by a QEMU of before 8.1.
    let args = ["--format", "qemu", "--channels", "2"];
    refused(&like, &args, &expected);
}

#[test]
fn more_channels_than_there_are() {
    let like = Like {
        channels: 2,
        ..FITTING
    };
    let expected = Refused {
        reason: "multifd-channels 4",
        said: "load of migration failed",
    };
    refused(&like, &to_qemu("4", &[]), &expected);
}

#[test]
fn fewer_channels_than_there_are_are_told_of_before_they_are_an_error() {
    if !qemu() {
        return;
    }
    let place = Place::new();
    let address = place.unix("incoming");
    let like = Like {
        channels: 4,
        ..FITTING
    };
    let there = Qemu::listen(&place, &like, &address);
    let mut guest = Guest::in_memory(&place, "16M", &CHURN);
    let mut send = guest.send(&address, &to_qemu("2", &[]));
    let said = send.says("the QEMU has said nothing for");
    assert!(said.contains("multifd-channels 2"), "{said}");
    send.interrupt().failed("cancelled", "cancelled");
    drop(there);
    guest.assert_runs();
    guest.assert_migrates(&place);
}

#[test]
fn a_destination_that_is_killed() {
    if !qemu() {
        return;
    }
    for channels in [1, 4] {
        let place = Place::new();
        let address = place.unix("incoming");
        let like = Like {
            channels,
            ..FITTING
        };
        let there = Qemu::listen(&place, &like, &address);
        let mut guest = Guest::in_memory(&place, "16M", &CHURN);
        let slowly = ["--bandwidth-limit", "1M"];
        let channels = channels.to_string();
        let send = guest.send(&address, &to_qemu(&channels, &slowly));
        there.wait_begun();
        there.kill();
        send.end()
            .failed("failed", "the QEMU's standard error may say more");
        guest.assert_runs();
        guest.assert_migrates(&place);
    }
}

#[test]
fn a_destination_of_another_kind() {
    if !qemu() {
        return;
    }
    let place = Place::new();
    let mut guest = Guest::in_memory(&place, "16M", &CHURN);
    let receive = Receive::start(&place, "there", &[]);
    let sent = guest.send(&receive.address, &to_qemu("1", &[])).end();
    sent.failed("failed", "not a QEMU");
    drop(receive);
    guest.assert_runs();
    guest.assert_migrates(&place);
}
