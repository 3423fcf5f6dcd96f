//! What arrives is what the source holds, byte for byte.

use crate::harness::*;
use crate::peer::{Like, Qemu, qemu};

/// All slot transactions that leave the RAM blocks as they are.
pub const CHURN: [&str; 2] = ["--churn-kinds", "hole,fill,split,merge,move,flags,remap"];

/// To a QEMU 7.2, over so many connections.
pub fn to_qemu<'a>(channels: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["--format", "qemu", "--qemu-version", "7.2"];
    args.extend(["--channels", channels]);
    args.extend(more);
    args
}

/// A writing guest migrates while its slots change, to memory that held something else.
fn arrives(ram: u64, address: impl Fn(&Place) -> String, channels: u16, rate: &str) {
    if !qemu() {
        return;
    }
    let place = Place::new();
    let address = address(&place);
    let like = Like {
        block: "ram",
        ram,
        channels,
    };
    let there = Qemu::listen(&place, &like, &address);
    let more = [CHURN[0], CHURN[1], "--vcpus", "2"];
    let mut guest = Guest::in_memory_writing(&place, &ram.to_string(), rate, &more);
    let channels = channels.to_string();
    let sent = guest.send(&address, &to_qemu(&channels, &["--downtime-limit", "10s"]));
    let sent = sent.end();
    let report = sent.status("completed", 0);
    let arrived = "the guest's memory is at the QEMU";
    assert!(sent.stderr.contains(arrived), "{sent:?}");
    assert_keys(&report, &SEND);
    guest.process.says("the guest has migrated away");
    assert!(report["transactions"].as_u64().unwrap() > 0, "{report}");
    assert!(report["pages_sent"].as_u64().unwrap() > 0, "{report}");
    // Pages of zeros have to be sent: what is there is not zero.
    assert!(report["zero_pages"].as_u64().unwrap() > 0, "{report}");
    assert_same(&guest.ram(), &there.completed());
    assert!(guest.process.runs());
}

const SMALL: u64 = 64 << 20;
const LARGE: u64 = 1 << 30;
const RATE: &str = "5000";

fn unix(place: &Place) -> String {
    place.unix("incoming")
}

/// A port that was free a moment ago: QEMU does not tell which one it has chosen.
fn tcp(_: &Place) -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("tcp:{}", listener.local_addr().unwrap())
}

#[test]
fn over_a_unix_socket() {
    arrives(SMALL, unix, 1, RATE);
}

#[test]
fn over_tcp() {
    arrives(SMALL, tcp, 1, RATE);
}

#[test]
fn over_two_channels_of_multifd() {
    arrives(SMALL, unix, 2, RATE);
}

#[test]
fn over_four_channels_of_multifd() {
    arrives(SMALL, unix, 4, RATE);
}

#[test]
fn over_four_channels_of_multifd_by_tcp() {
    arrives(SMALL, tcp, 4, RATE);
}

#[test]
#[ignore = "1 GiB"]
fn large_guests() {
    for channels in [1, 2, 4] {
        arrives(LARGE, unix, channels, "50000");
        arrives(LARGE, tcp, channels, "50000");
    }
}
