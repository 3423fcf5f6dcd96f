//! With --tls both ends prove who they are, or no guest moves.

use crate::certificates::Authority;
use crate::harness::*;
use crate::proxy::*;

const MODEL: [&str; 2] = ["--backend", "model"];

/// A directory for --tls.
fn directory(place: &Place, name: &str, authority: &Authority) -> String {
    authority.directory(place.path(name));
    place.arg(name)
}

#[test]
fn a_guest_moves_with_tls_by_either_kind_of_socket() {
    for address in ["tcp:127.0.0.1:0", "unix"] {
        let place = Place::new();
        let dir = directory(&place, "tls", &Authority::new("one"));
        let tls = ["--tls", &dir];
        let guest = Guest::start(&place, &MODEL);
        let address = match address {
            "unix" => place.unix("there.socket"),
            tcp => tcp.into(),
        };
        let mut receive = Receive::listen(&place, "there", &address, &tls);
        let more = [&tls[..], &["--channels", "2"]].concat();
        let sent = guest.send(&receive.address, &more).end();
        sent.status("completed", 0);
        receive.wait_end().status("completed", 0);
        assert_same(&guest.ram(), &receive.ram());
    }
}

#[test]
fn a_source_of_another_ca_moves_nothing_and_both_ends_say_why() {
    let place = Place::new();
    let one = directory(&place, "one", &Authority::new("one"));
    let two = directory(&place, "two", &Authority::new("two"));
    let mut guest = Guest::start(&place, &MODEL);
    let mut receive = Receive::start(&place, "there", &["--tls", &one]);
    let sent = guest.send(&receive.address, &["--tls", &two]).end();
    let why = "the other end's certificate was not signed by the CA in ca-cert.pem";
    let report = sent.failed("failed", why);
    assert_keys(&report, &SEND);
    assert_eq!(sent.stderr.lines().count(), 1, "{sent:?}");
    let said = receive.process().says("no TLS connection");
    let line = said.lines().last().unwrap();
    let why = "the other end refused: it does not trust the CA of this end's certificate";
    assert!(line.contains(why), "{said}");
    assert_eq!(
        said.lines().count(),
        2,
        "where it listens, and whom it turned away: {said}"
    );
    // Nor does one without TLS; and then the right one is still welcome.
    let plain = guest.send(&receive.address, &[]).end();
    plain.failed("failed", "takes connections with TLS only");
    guest.assert_runs();
    let sent = guest.send(&receive.address, &["--tls", &one]).end();
    sent.status("completed", 0);
    receive.wait_end().status("completed", 0);
    assert_same(&guest.ram(), &receive.ram());
}

#[test]
fn a_file_that_is_missing_is_named_before_anything_happens() {
    let place = Place::new();
    let dir = directory(&place, "tls", &Authority::new("one"));
    for name in ["client-key.pem", "server-key.pem"] {
        std::fs::remove_file(place.path("tls").join(name)).unwrap();
    }
    let mut guest = Guest::start(&place, &MODEL);
    let sent = guest.send("tcp:127.0.0.1:1", &["--tls", &dir]).end();
    sent.failed("failed", "client-key.pem can't be read");
    guest.assert_runs();
    let listen = place.unix("s");
    let received = run(&["receive", "--json", "--listen", &listen, "--tls", &dir]);
    received.failed("failed", "server-key.pem can't be read");
    assert!(!place.path("s").exists());
}

#[test]
fn a_guest_in_doubt_stays_so_when_nobody_can_be_asked_for_lack_of_a_file() {
    let place = Place::new();
    let guest = Guest::start(&place, &MODEL);
    let more = [&["--resume"][..], &MODEL].concat();
    let receive = Receive::start(&place, "there", &more);
    let point = Point {
        kind: RUNNING,
        part: Part::Nothing,
    };
    let held = hold(&place.path("line"), place.path("there.socket"), point);
    let send = guest.send(&place.unix("line"), &[]);
    held.recv().unwrap().cut();
    send.end().failed("in-doubt", "has not answered");
    let tls = ["--tls", &place.arg("nowhere")];
    let asked = guest.send(&receive.address, &tls).end();
    asked.failed("in-doubt", "ca-cert.pem can't be read");
    let asked = guest.send(&receive.address, &[]).end();
    asked.status("completed", 0);
}
