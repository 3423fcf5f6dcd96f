//! All pages are compared before the guest runs at the destination.

use crate::common::kvm;
use crate::harness::*;

#[test]
fn a_guest_whose_pages_are_the_same_moves_over_any_number_of_connections() {
    if !kvm() {
        return;
    }
    for more in [&["--verify"][..], &["--verify", "--channels", "4"]] {
        let place = Place::new();
        let guest = Guest::start(&place, &[]);
        let mut receive = Receive::start(&place, "there", &[]);
        let sent = guest.send(&receive.address, more).end();
        let report = sent.status("completed", 0);
        // Plugged blocks come on top.
        assert!(report["verified_pages"].as_u64() >= Some(4096), "{report}");
        let [verify, downtime] =
            ["verify_ms", "downtime_ms"].map(|key| report[key].as_f64().unwrap());
        assert!(verify > 0.0 && verify < downtime, "{report}");
        receive.wait_end().status("completed", 0);
        assert_same(&guest.ram(), &receive.ram());
    }
}

#[test]
fn a_file_is_refused_and_the_guest_runs_on() {
    let place = Place::new();
    let mut guest = Guest::start(&place, &["--backend", "model"]);
    let file = format!("file:{}", place.arg("stream"));
    let sent = guest.send(&file, &["--verify"]).end();
    assert_eq!(sent.code, Some(2), "{sent:?}");
    assert!(sent.stderr.contains("leave out --verify"), "{sent:?}");
    assert!(!place.path("stream").exists());
    guest.assert_runs();
}
