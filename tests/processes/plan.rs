//! `gleaner plan`: from a trace to a table, an object and a drawing; what is no trace is one clear line.

use std::fs;
use std::process::{Command, Stdio};

use rustix::process::Signal;

use crate::harness::{Guest, Place, Process, Receive, assert_keys, run, until};

/// A trace of a minute or less, made up, in `place`.
fn made(place: &Place, kind: &str) -> String {
    let trace = place.arg(kind);
    let made = run(&[
        "plan",
        "--generate",
        kind,
        "--ram",
        "64M",
        "--duration",
        "10s",
        "--trace",
        &trace,
        "--json",
    ]);
    assert_eq!(
        (&made.json()["status"], made.code),
        (&"generated".into(), Some(0)),
        "{made:?}"
    );
    trace
}

#[test]
fn a_plan_has_every_rule_and_draws_them() {
    let place = Place::new();
    let (trace, svg) = (made(&place, "database"), place.arg("plan.svg"));
    let asked = [
        "plan",
        "--trace",
        &*trace,
        "--bandwidth",
        "100M",
        "--svg",
        &*svg,
    ];
    let plan = run(&[&asked[..], &["--json"]].concat()).json();
    assert_keys(
        &plan,
        &["status", "trace", "bandwidth", "downtime_limit_ms", "rules"],
    );
    let rules = plan["rules"].as_array().unwrap();
    assert_eq!(rules.len(), 9);
    let (drawn, table) = (fs::read_to_string(&svg).unwrap(), run(&asked).stdout);
    for rule in rules {
        assert_keys(
            rule,
            &[
                "moved",
                "rounds",
                "total_ms",
                "bytes",
                "downtime_ms",
                "overshoot_ms",
                "throttle",
                "reason",
            ],
        );
        assert!(
            rule["bytes"].as_f64().unwrap() >= f64::from(64 << 20),
            "{rule}"
        );
        let name = rule["rule"].as_str().unwrap();
        assert!(drawn.contains(&format!(">{name}</text>")), "{name}");
        assert!(
            table.lines().any(|line| line.starts_with(name)),
            "{name}: {table}"
        );
    }
    assert!(drawn.starts_with("<svg ") && drawn.ends_with("</svg>\n"));
    // What few who show pictures know would hide the numbers from the others.
    assert!(!drawn.contains("paint-order"));
    for what in ["100 MiB/s", "limit 300 ms", "not moved within"] {
        assert!(drawn.contains(what), "{what}");
    }
}

#[test]
fn what_is_no_trace_is_one_clear_line() {
    let place = Place::new();
    let trace = made(&place, "idle");
    let whole = fs::read(&trace).unwrap();
    let refused = |bytes: &[u8], reason: &str| {
        fs::write(&trace, bytes).unwrap();
        let said = run(&["plan", "--trace", &trace, "--bandwidth", "1G", "--json"]);
        said.failed("failed", reason);
        assert_eq!(said.stderr.lines().count(), 1, "{said:?}");
    };
    let changed = |at: usize, byte: u8| {
        let mut bytes = whole.clone();
        bytes[at] = byte;
        bytes
    };
    refused(b"", "not a trace");
    refused(b"GIF89a and more", "not a trace");
    refused(
        &changed(8, 9),
        "the trace has version 9, this release reads 1",
    );
    refused(
        &changed(whole.len() - 1, !whole[whole.len() - 1]),
        "damaged at byte",
    );
    // The rounds of a migration, beside which there are no pages.
    refused(b"{\"kind\":\"start\"}", "is no trace; of one that");
    refused(&whole[..20], "the trace has no record to plan by");

    // One whose writer was killed is used as far as it goes, and says so.
    fs::write(&trace, &whole[..whole.len() - 3]).unwrap();
    let cut = run(&["plan", "--trace", &trace, "--bandwidth", "1G", "--json"]);
    assert!(cut.stderr.contains("the trace is cut at byte"), "{cut:?}");
    assert_eq!(
        (&cut.json()["status"], cut.code),
        (&"planned".into(), Some(0)),
        "{cut:?}"
    );
}

#[test]
fn what_was_asked_for_and_can_t_be_written_is_a_failure_with_a_line() {
    let place = Place::new();
    let asked = [
        "plan",
        "--generate",
        "idle",
        "--ram",
        "64M",
        "--duration",
        "10s",
    ];
    let plan = |more: &[&str], out: Stdio, err: Stdio| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gleaner"));
        command.args(asked).args(["--bandwidth", "1G"]).args(more);
        let ended = command.stdout(out).stderr(err).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (ended.status.code(), text(ended.stdout), text(ended.stderr))
    };
    let full = || Stdio::from(fs::File::options().write(true).open("/dev/full").unwrap());
    for more in [&[][..], &["--json"]] {
        let (code, _, said) = plan(more, full(), Stdio::piped());
        assert_eq!((code, said.lines().count()), (Some(1), 1), "{said}");
        assert!(
            said.contains("can't be written to standard output"),
            "{said}"
        );
    }
    // Nobody hears of it, and it is no harm.
    let (code, told, _) = plan(&[], Stdio::piped(), full());
    assert_eq!(code, Some(0));
    assert!(told.contains("clairvoyant"), "{told}");
    // A picture that can't be drawn is told of before what takes long, and one that is cut short takes no table along.
    let nowhere = place.arg("nowhere/plan.svg");
    let (code, told, said) = plan(&["--svg", &nowhere], Stdio::piped(), Stdio::piped());
    assert_eq!((code, &*told), (Some(1), ""), "{told}");
    assert!(said.contains("can't write"), "{said}");
    let (code, told, said) = plan(&["--svg", "/dev/full"], Stdio::piped(), Stdio::piped());
    assert_eq!(code, Some(1), "{told}");
    assert!(
        told.contains("clairvoyant") && said.contains("can't write /dev/full"),
        "{told}{said}"
    );
}

#[test]
fn a_rate_has_to_know_of_whom_and_records_no_process() {
    let alone = run(&["rate"]);
    assert_eq!(alone.code, Some(2), "{alone:?}");
    assert!(alone.stderr.contains("or --pid PID"), "{alone:?}");
    let sampled = run(&["rate", "--pid", "1", "--record", "trace"]);
    assert_eq!(sampled.code, Some(2), "{sampled:?}");
    assert!(sampled.stderr.contains("--record"), "{sampled:?}");
}

#[test]
fn a_plan_that_is_interrupted_ends_with_a_line() {
    // A day of a busy guest: minutes of work.
    let mut asked = vec!["plan", "--generate", "oscillating", "--ram", "16G"];
    asked.extend(["--duration", "24h", "--bandwidth", "200M"]);
    for json in [&[][..], &["--json"]] {
        let plan = Process::start(&[&asked[..], json].concat());
        until("it knows what to do with Ctrl-C", || {
            plan.catches(Signal::INT).then_some(())
        });
        let ended = plan.interrupt();
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert_eq!(ended.stderr, "gleaner: cancelled\n");
        if !json.is_empty() {
            ended.failed("cancelled", "cancelled");
        }
    }
}

#[test]
fn whoever_asks_for_no_plan_is_told_of_every_way() {
    let missing = |given: &[&str]| {
        let ended = run(&[&["plan"], given].concat());
        assert_eq!(ended.code, Some(2), "{ended:?}");
        let told = ended.stderr.lines().next().unwrap();
        ["--trace FILE", "--generate KIND", "--bandwidth RATE"].map(|what| told.contains(what))
    };
    assert_eq!(missing(&[]), [true, true, true]);
    assert_eq!(missing(&["--bandwidth", "1G"]), [true, true, false]);
    assert_eq!(missing(&["--trace", "/nowhere"]), [false, false, true]);
    // It may be kept without a plan.
    assert_eq!(missing(&["--generate", "idle"]), [true, false, true]);
}

#[test]
fn what_a_migration_dirtied_can_be_planned_with() {
    let place = Place::new();
    let guest = Guest::start(&place, &["--backend", "model"]);
    let mut receive = Receive::start(&place, "there", &[]);
    let trace = place.arg("trace");
    let sent = guest.send(&receive.address, &["--trace", &trace]).end();
    let report = sent.status("completed", 0);
    receive.wait_end();
    let plan = run(&["plan", "--trace", &trace, "--bandwidth", "1G", "--json"]).json();
    assert_eq!(plan["status"], "planned", "{plan}");
    let pages = report["progress"][0]["total_pages"].as_u64().unwrap();
    // And blocks that were never dirty.
    let ram = plan["trace"]["ram_bytes"].as_u64().unwrap();
    assert!(
        (pages * 4096..pages * 4096 * 5 / 4).contains(&ram),
        "{plan}"
    );
    assert!(
        plan["trace"]["dirty_bytes_per_second"].as_f64().unwrap() > 0.0,
        "{plan}"
    );
}
