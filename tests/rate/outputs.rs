//! What it says, and in which shape.

use std::io::{Read, Write};
use std::net::TcpStream;

use gleaner::migrate::trace::Trace;
use serde_json::Value;

use crate::common::kvm;
use crate::harness::*;
use crate::metrics::samples;

/// Some tenths of a second of a guest that writes all over its memory.
const SHORT: [&str; 4] = ["--duration", "600ms", "--interval", "100ms"];

fn rate<'a>(guest: &'a Guest, more: &[&'a str]) -> Vec<&'a str> {
    [&["rate", "--control", &guest.control][..], &SHORT, more].concat()
}

#[test]
fn the_object_has_what_scripts_read() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let guest = Guest::start(&place, &["--tracking", "ring"]);
    let ended = run(&rate(&guest, &["--json", "--bandwidth", "100M"]));
    let report = ended.status("completed", 0);
    let keys = [
        "duration_ms",
        "unique_pages",
        "unique_pages_interval95",
        "dirty_bytes_per_second",
    ];
    assert_keys(&report, &keys);
    assert_keys(
        &report,
        &[
            "curve", "vcpus", "blocks", "verdict", "windows", "hottest", "harvests",
        ],
    );
    let number = |value: &Value| value.as_f64().unwrap();
    assert!(number(&report["duration_ms"]) >= 600.0, "{report}");
    // From 50 ms on, more pages in more time, and at last all of them.
    let curve = report["curve"].as_array().unwrap();
    assert_eq!(curve[0]["ms"], 50.0);
    assert!(number(&curve[0]["pages"]) > 0.0, "{report}");
    let pages: Vec<f64> = curve.iter().map(|p| number(&p["pages"])).collect();
    assert!(pages.is_sorted(), "{pages:?}");
    assert_eq!(pages.last().copied(), report["unique_pages"].as_f64());
    // Both vCPUs write; a page counts again after a harvest.
    let vcpus = report["vcpus"].as_array().unwrap();
    assert_eq!(vcpus.len(), 2);
    let written: u64 = vcpus
        .iter()
        .map(|v| v["pages_written"].as_u64().unwrap())
        .sum();
    assert_eq!(report["pages_written"], written);
    assert!(
        vcpus
            .iter()
            .all(|v| v["pages_written"].as_u64() > Some(100)),
        "{report}"
    );
    assert!(number(&report["windows"]["samples"]) >= 4.0, "{report}");
    assert_eq!(report["verdict"]["converges"], true, "{report}");
    let word = report["verdict"]["word"].as_str().unwrap();
    assert!(word.ends_with("converges"), "{report}");
    // In numbers, and in words beside.
    assert!(number(&report["verdict"]["downtime_ms"]["likely"]) > 0.0);
    assert!(report["verdict"]["downtime_ms"]["told"].is_string());
    assert_eq!(report["verdict"]["bandwidth_assumed"], false);
    assert_keys(
        &report["verdict"],
        &["total_ms", "downtime_ms", "bytes", "reason", "needs"],
    );
}

#[test]
fn what_is_recorded_is_a_trace_with_each_page_that_was_written() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let guest = Guest::start(&place, &["--tracking", "ring"]);
    let file = place.path("guest.trace");
    let file = file.to_str().unwrap();
    let report = run(&rate(&guest, &["--json", "--record", file])).status("completed", 0);
    let trace = Trace::read(std::fs::File::open(file).unwrap()).unwrap();
    assert_eq!(trace.cut(), None);
    // Of a guest so small each page is followed.
    let mut seen = std::collections::BTreeSet::new();
    for record in trace.records() {
        for run in trace.runs(record) {
            seen.extend(run.first..run.end());
        }
    }
    assert_eq!(report["unique_pages"], seen.len());
    // A quarter of the limit of 300ms, at looks that are 50ms apart.
    assert!(trace.records().len() >= 4, "{:?}", trace.records());
    let plan = ["plan", "--trace", file, "--bandwidth", "1G", "--json"];
    run(&plan).status("planned", 0);
}

#[test]
fn a_trace_that_cannot_be_written_is_told_before_anything_is_measured() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let guest = Guest::start(&place, &[]);
    let ended = run(&rate(&guest, &["--json", "--record", "/no/such/place/t"]));
    let reason = ended.status("failed", 1)["reason"].to_string();
    assert!(reason.contains("can't write the trace"), "{reason}");
}

#[test]
fn a_guest_that_writes_faster_than_the_link_is_told_what_it_needs() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let guest = Guest::writing(&place, "1000000", &["--workload", "sweep"]);
    let slow = ["--json", "--bandwidth", "1M", "--downtime-limit", "50ms"];
    let report = run(&rate(&guest, &slow)).status("completed", 0);
    let verdict = &report["verdict"];
    assert_eq!(verdict["converges"], false, "{report}");
    assert_eq!(verdict["word"], "does not converge");
    assert!(verdict["total_ms"]["likely"].is_null(), "{report}");
    assert_eq!(verdict["total_ms"]["told"], "without end");
    let needed = verdict["needs"]["bandwidth"]["likely"].as_f64().unwrap();
    assert!(needed > 1e6, "{report}");
    let text = run(&rate(&guest, &slow[1..]));
    assert!(
        text.stdout.contains("verdict: it does not converge"),
        "{text:?}"
    );
    assert!(text.stdout.contains("a bandwidth of"), "{text:?}");
}

#[test]
fn prometheus_gets_every_block_and_vcpu() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let guest = Guest::start(&place, &["--tracking", "ring"]);
    let ended = run(&rate(&guest, &["--prometheus"]));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let found = samples(&ended.stdout);
    assert!(found["gleaner_dirty_bytes_per_second{block=\"ram\"}"] > 0.0);
    assert_eq!(
        found["gleaner_block_bytes{block=\"ram\"}"],
        f64::from(16 << 20)
    );
    assert!(found["gleaner_vcpu_dirtied_bytes_total{vcpu=\"1\"}"] > 0.0);
    assert!(found["gleaner_dirty_curve_bytes{time=\"0.05\"}"] > 0.0);
    assert!(found.contains_key("gleaner_migration_downtime_seconds{bound=\"high\"}"));
}

#[test]
fn an_exporter_serves_what_is_found_until_it_is_interrupted() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let guest = Guest::start(&place, &[]);
    let args = [
        "rate",
        "--control",
        &guest.control,
        "--serve",
        "0",
        "--interval",
        "100ms",
    ];
    let mut meter = Process::start(&args);
    let said = meter.says("metrics at http://");
    let address = said
        .split("http://")
        .nth(1)
        .unwrap()
        .split("/metrics")
        .next()
        .unwrap();
    assert!(address.starts_with("127.0.0.1:"), "{address}");
    let get = |request: &str| {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    // Somebody who says nothing keeps nobody out.
    let _silent = TcpStream::connect(address).unwrap();
    let metered = until("it has found something", || {
        let answer = get("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        let (head, page) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        samples(page).get("gleaner_metered_seconds_total").copied()
    });
    until("it finds more", || {
        let answer = get("GET /metrics HTTP/1.0\r\n\r\n");
        let page = answer.split_once("\r\n\r\n").unwrap().1;
        let more = samples(page)["gleaner_metered_seconds_total"];
        (more > metered).then_some(())
    });
    assert!(get("GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
    assert!(get("PUT /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405"));
    let ended = meter.interrupt();
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert!(ended.stdout.contains("dirtied"), "{ended:?}");
}

#[test]
fn the_picture_is_drawn_whole() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let guest = Guest::start(&place, &["--tracking", "ring"]);
    let file = place.arg("rate.svg");
    let ended = run(&rate(&guest, &["--svg", &file]));
    assert_eq!(ended.code, Some(0), "{ended:?}");
    let svg = std::fs::read_to_string(&file).unwrap();
    let count = |what: &str| svg.matches(what).count();
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    assert_eq!(count("<text "), count("</text>"));
    assert!(count("<rect ") > 50 && count("<circle ") >= 3, "{svg}");
    assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    for what in [
        "D(t)",
        "vCPU 0",
        "A migration",
        "harvests:",
        "where 95 % lie",
    ] {
        assert!(svg.contains(what), "{what}");
    }
    // Where it can't be written that is said.
    let bad = run(&rate(&guest, &["--json", "--svg", "/nowhere/rate.svg"]));
    bad.failed("failed", "can't write /nowhere/rate.svg");
}
