//! A migration that tells whether it converges, obeys its time limit, and leaves a trace.

use std::fs;

use serde_json::Value;

use crate::common::kvm;
use crate::harness::*;

/// All of a small guest's memory in half a second: too slow for one that writes as fast as it can.
const SLOW: &str = "32M";

#[test]
fn a_dry_run_tells_whether_it_would_converge_and_sends_nothing() {
    if !kvm() {
        return;
    }
    // A busy machine's harvests take long, and count: the first limit leaves room for them.
    for (rate, limit, verdict) in [
        ("1", "2s", "converges"),
        ("100000", "100ms", "does-not-converge"),
    ] {
        let place = Place::new();
        let mut guest = Guest::writing(&place, rate, &["--churn-kinds", "split,merge"]);
        // Nobody listens there, and nobody is asked.
        let nowhere = place.unix("nowhere");
        let limits = ["--bandwidth-limit", SLOW, "--downtime-limit", limit];
        let ended = guest
            .send(&nowhere, &[&["--dry-run"], &limits[..]].concat())
            .end();
        let found = ended.status("dry-run", 0);
        assert_eq!(found["verdict"], verdict, "{found}");
        assert_eq!(
            (&found["pages_sent"], &found["bytes_on_wire"]),
            (&0.into(), &0.into())
        );
        assert_eq!(found["total_pages"], 4096, "{found}");
        let never = found["forecast"]["total_ms"]["likely"].is_null();
        assert_eq!(never, verdict != "converges", "{found}");
        let reason = found["reason"].as_str().unwrap();
        let helps = reason.contains("would do");
        assert_eq!(helps, verdict != "converges", "{reason}");
        if rate != "1" {
            guest.assert_runs();
        }
        guest.assert_migrates(&place);
    }
}

#[test]
fn a_dry_run_needs_no_destination() {
    let place = Place::new();
    // A guest that nothing is plugged into keeps its size.
    let guest = Guest::start(
        &place,
        &["--backend", "model", "--churn-kinds", "split,merge"],
    );
    let ended = run(&["send", "--control", &guest.control, "--dry-run"]);
    assert_eq!(ended.code, Some(0), "{ended:?}");
    for part in [
        "converge",
        "guest: 16 MiB",
        "link: 1.0 GiB/s, assumed",
        "downtime",
    ] {
        assert!(ended.stdout.contains(part), "{part}: {ended:?}");
    }
}

#[test]
fn a_time_limit_ends_what_does_not_converge_as_asked() {
    if !kvm() {
        return;
    }
    let limits = [
        "--bandwidth-limit",
        SLOW,
        "--downtime-limit",
        "10ms",
        "--timeout",
        "2s",
    ];
    let place = Place::new();
    let mut guest = Guest::writing(&place, "100000", &[]);
    let mut receive = Receive::start(&place, "there", &[]);
    let sent = guest.send(&receive.address, &limits).end();
    let report = sent.failed("failed", "time limit");
    // What the last round knew is said too.
    assert!(
        report["reason"]
            .as_str()
            .unwrap()
            .contains("a switchover would stop the guest for")
    );
    receive.wait_end().status("cancelled", 1);
    guest.assert_runs();

    let mut receive = Receive::start(&place, "then", &[]);
    let more = [&limits[..], &["--on-timeout", "switchover"]].concat();
    let report = guest
        .send(&receive.address, &more)
        .end()
        .status("completed", 0);
    receive.wait_end().status("completed", 0);
    assert_same(&guest.ram(), &receive.ram());
    let rounds = report["progress"].as_array().unwrap();
    let [.., last, _] = &rounds[..] else {
        panic!("{report}");
    };
    let reason = last["reason"].as_str().unwrap();
    assert!(
        reason.contains("time limit") && reason.contains("switching over"),
        "{reason}"
    );
    // It was foretold, and the report says how well.
    let [forecast, off, downtime] = [
        &report["forecast_downtime_ms"]["likely"],
        &report["forecast_error_ms"],
        &report["downtime_ms"],
    ]
    .map(|number| number.as_f64().unwrap());
    assert!((forecast + off - downtime).abs() < 1e-6, "{report}");
}

#[test]
fn a_trace_has_every_round_and_how_it_ended() {
    let place = Place::new();
    let guest = Guest::start(&place, &["--backend", "model"]);
    let mut receive = Receive::start(&place, "there", &[]);
    let trace = place.arg("trace");
    let sent = guest.send(&receive.address, &["--trace", &trace]).end();
    let report = sent.status("completed", 0);
    receive.wait_end();
    let text = fs::read_to_string(&trace).unwrap();
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let [start, rounds @ .., end] = &lines[..] else {
        panic!("{text}");
    };
    assert_eq!(
        (&start["kind"], &start["trace"]),
        (&"start".into(), &1.into())
    );
    assert_eq!(start["migration_id"], report["migration_id"]);
    assert_eq!(
        (&end["kind"], &end["status"]),
        (&"end".into(), &"completed".into())
    );
    assert_eq!(rounds.len(), report["progress"].as_array().unwrap().len());
    for (line, round) in rounds.iter().zip(report["progress"].as_array().unwrap()) {
        assert_eq!(line["kind"], "round");
        assert_keys(
            line,
            &[
                "dirty_ms",
                "remaining_pages",
                "bytes",
                "harvest_ms",
                "curve",
            ],
        );
        for (key, value) in round.as_object().unwrap() {
            assert_eq!(&line[key], value, "{key}");
        }
        assert!(!line["reason"].as_str().unwrap().is_empty(), "{line}");
    }
}

#[test]
fn a_trace_that_cannot_be_written_is_one_clear_line_and_the_guest_is_untouched() {
    let place = Place::new();
    let mut guest = Guest::start(&place, &["--backend", "model"]);
    let trace = format!("{}/trace", place.arg("nowhere"));
    for more in [&["--trace", &*trace][..], &["--trace", &trace, "--dry-run"]] {
        let sent = guest.send(&place.unix("there"), more).end();
        sent.failed("failed", &format!("can't write the trace {trace}"));
        assert_eq!(sent.stderr.lines().count(), 1, "{sent:?}");
    }
    guest.assert_runs();
    guest.assert_migrates(&place);
}

#[test]
fn progress_on_a_pipe_is_a_plain_line_for_each_round() {
    let place = Place::new();
    let guest = Guest::start(&place, &["--backend", "model"]);
    let mut receive = Receive::start(&place, "there", &[]);
    let sent = guest.send(&receive.address, &[]).end();
    let report = sent.status("completed", 0);
    receive.wait_end();
    assert!(!sent.stderr.contains(['\r', '\x1b']), "{sent:?}");
    let lines: Vec<&str> = sent.stderr.lines().collect();
    let rounds = report["progress"].as_array().unwrap();
    assert_eq!(lines.len(), rounds.len(), "{sent:?}");
    for (line, round) in lines.iter().zip(rounds) {
        let number = format!("round {}: ", round["round"]);
        assert!(line.starts_with(&number), "{line}");
        assert!(line.ends_with(round["reason"].as_str().unwrap()), "{line}");
        assert!(
            line.contains(" left, ") && line.contains("/s dirtied"),
            "{line}"
        );
    }
}
