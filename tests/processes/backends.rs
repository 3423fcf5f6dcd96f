//! What runs the guest: KVM, or the model of it, which runs everywhere.

use crate::common::{MODES, kvm};
use crate::harness::*;

const MODEL: [&str; 2] = ["--backend", "model"];

#[test]
fn the_demo_holds_on_the_model_in_any_mode() {
    for (mode, _) in MODES {
        let size = ["--ram", "32M", "--transactions", "60"];
        let args = [&["demo", "--json", "--tracking", mode][..], &size, &MODEL].concat();
        let ended = run(&args);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        let report = ended.json();
        assert_eq!(report["backend"], "model", "{report}");
        assert_eq!(report["tracking"], mode, "{report}");
        assert_eq!(report["pages_differing"], 0, "{report}");
        assert_eq!(report["guest_check"], "ok", "{report}");
        assert!(report["pages_compared"].as_u64() >= Some(8192), "{report}");
        let kinds = report["transactions"].as_object().unwrap();
        let total: u64 = kinds.values().filter_map(serde_json::Value::as_u64).sum();
        assert!(total >= 60, "{report}");
    }
}

#[test]
fn memory_that_travels_packed_is_the_same() {
    for (codec, channels) in [("lz4", "1"), ("zstd", "3")] {
        let hot = [
            "--workload",
            "hot:2M",
            "--ram",
            "32M",
            "--transactions",
            "60",
        ];
        let args = [
            "demo",
            "--json",
            "--compress",
            codec,
            "--channels",
            channels,
        ];
        let ended = run(&[&args[..], &hot, &MODEL].concat());
        assert_eq!(ended.code, Some(0), "{ended:?}");
        let report = ended.json();
        assert_eq!(report["pages_differing"], 0, "{report}");
        assert_eq!(report["guest_check"], "ok", "{report}");
        for count in ["pages_delta", "bytes_saved"] {
            assert!(report[count].as_u64() > Some(0), "{count} in {report}");
        }
    }
}

#[test]
fn without_a_word_it_is_kvm_or_it_says_so() {
    let there = kvm();
    let ended = run(&["demo", "--json", "--ram", RAM, "--transactions", "5"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(ended.json()["backend"], if there { "kvm" } else { "model" });
    let said: Vec<_> = ended
        .stderr
        .lines()
        .filter(|line| line.contains("running on the model of KVM instead"))
        .collect();
    let line = |said: &&str| said.starts_with("gleaner: /dev/kvm: ");
    assert!(said.iter().all(line), "{ended:?}");
    assert_eq!(said.len(), usize::from(!there), "{ended:?}");
}

#[test]
fn a_guest_on_the_model_hops_and_hops_again() {
    let place = Place::new();
    let guest = Guest::start(&place, &MODEL);
    let control = place.arg("second-control");
    let more = ["--resume", "--control", &control, "--backend", "model"];
    let second = Receive::start(&place, "second", &more);
    guest
        .send(&second.address, &[])
        .end()
        .status("completed", 0);
    assert_changes(&second.ram_file());
    let mut third = Receive::start(&place, "third", &[]);
    let address = third.address.clone();
    until("the second service is there", || {
        std::fs::exists(&control).unwrap().then_some(())
    });
    let sent = run(&["send", "--json", "--control", &control, "--to", &address]);
    sent.status("completed", 0);
    third.wait_end().status("completed", 0);
    assert_same(&second.ram(), &third.ram());
}

#[test]
fn a_destination_on_kvm_refuses_a_guest_of_the_model_and_it_runs_on() {
    let place = Place::new();
    let mut guest = Guest::start(&place, &MODEL);
    let mut receive = Receive::start(&place, "there", &["--resume", "--backend", "kvm"]);
    let why =
        "the guest comes from the model of KVM, this destination runs on KVM: use --backend model";
    let sent = guest.send(&receive.address, &[]).end();
    sent.failed("failed", why);
    receive.wait_end().failed("failed", why);
    guest.assert_runs();
}
