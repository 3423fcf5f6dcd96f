//! A migration in QEMU's words: the bytes that are due, what has no words, and when the source lets go of its guest.

#![allow(clippy::unwrap_used)] // a test that can't go on fails

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};

use common::{Guest, ToySource, options};
use gleaner_migrate::{
    Compress, Connector, Error, Format, QemuOptions, Report, Sender, SenderOptions, Status, Stream,
};

fn qemu() -> SenderOptions {
    SenderOptions {
        format: Format::Qemu(QemuOptions::default()),
        ..options()
    }
}

fn send_to_file(source: &ToySource, options: SenderOptions) -> (Report, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stream");
    let to = Connector::new(format!("file:{}", path.display()).parse().unwrap());
    let report = Sender::new(&mut source.clone(), options).run_to(&to);
    (report, std::fs::read(&path).unwrap_or_default())
}

/// What a page holds that was written with a byte: eight of them, at eight times the byte.
fn page(bytes: &[u8]) -> Vec<u8> {
    let mut page = vec![0; 4096];
    for byte in bytes {
        page[usize::from(*byte) * 8..][..8].fill(*byte);
    }
    page
}

#[test]
fn each_record_is_where_it_is_due() {
    let source = ToySource::new(4);
    source.guest().add_block("mem1", 2);
    let (report, bytes) = send_to_file(&source, qemu());
    assert_eq!(report.status, Status::Completed, "{:?}", report.reason);
    let expected = [
        b"QEVM\0\0\0\x03" as &[u8],
        b"\x07\0\0\0\x04none",
        b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04",
        b"\0\0\0\0\0\0\x60\x04",
        b"\x03ram\0\0\0\0\0\0\x40\0",
        b"\x04mem1\0\0\0\0\0\0\x20\0",
        b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02",
        // The guest runs.
        b"\x02\0\0\0\x02",
        b"\0\0\0\0\0\0\0\x08\x03ram",
        &page(&[0x11]),
        b"\0\0\0\0\0\0\x30\x28",
        &page(&[0x11]),
        b"\0\0\0\0\0\0\x10\x22\0",
        b"\0\0\0\0\0\0\x20\x22\0",
        b"\0\0\0\0\0\0\0\x02\x04mem1\0",
        b"\0\0\0\0\0\0\x10\x22\0",
        // It is stopped, and saving its state has written a page.
        b"\0\0\0\0\0\0\x10\x08\x03ram",
        &page(&[0x77]),
        b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02",
        // It is let go of.
        b"\x03\0\0\0\x02\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02",
        b"\0\x06\0\0\0\x02{}",
    ]
    .concat();
    assert!(bytes == expected, "{bytes:02x?}");
    assert_eq!(report.bytes_on_wire, bytes.len() as u64);
}

#[test]
fn blocks_that_come_or_go_are_refused() {
    let come = |guest: &mut Guest, number: u32| {
        if number == 2 {
            guest.add_block("dimm", 2);
        }
    };
    let go = |guest: &mut Guest, number: u32| {
        if number == 2 {
            guest.remove_block("mem1");
        }
    };
    for (script, came, gone) in [
        (come as common::Script, "dimm", ""),
        (go as common::Script, "", "mem1"),
    ] {
        let source = ToySource::scripted(8, script);
        source.guest().add_block("mem1", 2);
        let (report, _) = send_to_file(&source, qemu());
        let Some(Error::Hotplug {
            came: new,
            gone: old,
        }) = &report.error
        else {
            panic!("{report:?}");
        };
        assert_eq!((new.concat(), old.concat()), (came.into(), gone.into()));
        assert_eq!(report.status, Status::Failed);
        let guest = source.guest();
        assert!(guest.running && guest.no_leases());
        assert!(!guest.calls.contains(&"relinquish"));
    }
}

#[test]
fn what_the_stream_has_no_words_for_is_refused_before_anything_is_sent() {
    let verify = SenderOptions {
        verify: true,
        ..qemu()
    };
    let local = SenderOptions {
        local: true,
        ..qemu()
    };
    let compress = SenderOptions {
        compress: Compress::Lz4,
        ..qemu()
    };
    for options in [verify, local, compress] {
        let source = ToySource::new(8);
        let (report, bytes) = send_to_file(&source, options);
        assert!(matches!(report.error, Some(Error::NotInFormat { .. })));
        assert!(bytes.is_empty() && source.guest().running);
    }
}

/// When a QEMU goes.
#[derive(Clone, Copy, PartialEq)]
enum Goes {
    /// When it was asked so many questions.
    At(u32),
    /// When it has read the end.
    AtEnd,
    /// Then, with this on the return path.
    Shutting(u8),
}

/// A QEMU, of which there is nothing but its answers. Returns whether it has read the end.
fn stand_in(mut stream: UnixStream, source: ToySource, goes: Goes) -> JoinHandle<bool> {
    const PING: &[u8] = b"\x08\0\x02\0\x04";
    const END: &[u8] = b"\x06\0\0\0\x02{}";
    thread::spawn(move || {
        let (mut seen, mut asked) = (Vec::new(), 0);
        let mut next = [0];
        while let Ok(1) = stream.read(&mut next) {
            seen.push(next[0]);
            if seen.len() >= 9 && seen[..seen.len() - 4].ends_with(PING) {
                asked += 1;
                if goes == Goes::At(asked) {
                    return false;
                }
                let number = &seen[seen.len() - 4..];
                let _ = stream.write_all(&[b"\0\x02\0\x04", number].concat());
            }
            if seen.ends_with(END) {
                // Whoever has read it may run.
                assert!(source.guest().calls.contains(&"relinquish"));
                if let Goes::Shutting(value) = goes {
                    let _ = stream.write_all(&[0, 1, 0, 4, 0, 0, 0, value]);
                }
                return true;
            }
        }
        false
    })
}

fn send_to(goes: Goes) -> (ToySource, Report, bool) {
    let source = ToySource::new(64);
    let (near, far) = UnixStream::pair().unwrap();
    let there = stand_in(far, source.clone(), goes);
    let report = Sender::new(&mut source.clone(), qemu()).run(Stream::from(near));
    (source, report, there.join().unwrap())
}

#[test]
fn a_load_that_is_acknowledged_completes() {
    let (source, report, ended) = send_to(Goes::Shutting(0));
    assert_eq!(report.status, Status::Completed, "{:?}", report.reason);
    assert!(ended && !source.guest().running);
    assert_eq!(source.guest().calls.last(), Some(&"complete"));
}

#[test]
fn whenever_it_goes_before_the_end_the_guest_runs_here() {
    let mut question = 0;
    loop {
        question += 1;
        let (source, report, ended) = send_to(Goes::At(question));
        if ended {
            break; // there are no more questions
        }
        assert_eq!(report.status, Status::Failed, "{question}");
        let guest = source.guest();
        assert!(guest.running && guest.no_leases(), "{question}");
        assert!(!guest.calls.contains(&"relinquish"), "{question}");
    }
    // Welcome, Adopted, Applied of a round and of the rest, Ready: at least.
    assert!(question > 5, "{question}");
}

#[test]
fn when_it_goes_after_the_end_the_guest_runs_nowhere_until_somebody_has_looked() {
    for goes in [Goes::AtEnd, Goes::Shutting(1)] {
        let (source, report, ended) = send_to(goes);
        assert!(ended && !source.guest().running);
        assert_eq!(report.status, Status::InDoubt);
        assert!(!source.guest().calls.contains(&"resume"));
        let reason = report.reason.unwrap();
        assert!(reason.contains("look at the QEMU"), "{reason}");
    }
}
