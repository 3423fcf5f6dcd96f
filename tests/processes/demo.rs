//! The demo does what it shows.

use crate::common::{MODES, kvm};
use crate::harness::*;

#[test]
fn no_page_differs_and_the_guest_agrees_in_any_mode() {
    if !kvm() {
        return;
    }
    for (mode, _) in MODES {
        let size = ["--ram", "32M", "--transactions", "60"];
        let args = [&["demo", "--json", "--tracking", mode][..], &size].concat();
        let ended = run(&args);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        let report = ended.json();
        assert_eq!(report["pages_differing"], 0, "{report}");
        assert_eq!(report["guest_check"], "ok", "{report}");
        assert_eq!(report["tracking"], mode, "{report}");
        // Plugged blocks come on top.
        assert!(report["pages_compared"].as_u64() >= Some(8192), "{report}");
        let kinds = report["transactions"].as_object().unwrap();
        let total: u64 = kinds.values().filter_map(serde_json::Value::as_u64).sum();
        assert!(total >= 60, "{report}");
        assert_keys(&report, &["downtime_ms", "backend", "status", "reason"]);
    }
}

#[test]
fn ctrl_c_cancels_it() {
    if !kvm() {
        return;
    }
    let endless = ["--transactions", "1000000000", "--ram", RAM];
    let mut demo = Process::start(&[&["demo", "--json"], &endless[..]].concat());
    demo.says("round 1:");
    demo.interrupt().failed("cancelled", "cancelled");
}
