//! A guest that is looked at from outside.

use std::os::linux::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;
use serde_json::Value;

use crate::common::kvm;
use crate::harness::*;
use crate::scattered::{FIRST, QEMU, arguments, firmware};

fn pid_of(guest: &Guest) -> String {
    guest.process.pid().to_string()
}

fn interval(report: &Value) -> (f64, f64) {
    let ends = report["unique_pages_interval95"].as_array().unwrap();
    (ends[0].as_f64().unwrap(), ends[1].as_f64().unwrap())
}

fn pages_apart(a: &[u8], b: &[u8]) -> f64 {
    let pages = a.chunks(4096).zip(b.chunks(4096));
    pages.filter(|(a, b)| a != b).count() as f64
}

#[test]
fn what_a_guest_writes_is_in_the_interval() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let guest = Guest::in_memory(&place, "64M", &[]);
    let before = guest.ram();
    let mut meter = Process::start(&[
        "rate",
        "--pid",
        &pid_of(&guest),
        "--json",
        "--duration",
        "60s",
        "--interval",
        "200ms",
        "--cpu",
        "50%",
    ]);
    meter.says("dirtied");
    let inside = guest.ram();
    meter.wait_for("five windows are over", |said| {
        said.matches("dirtied").count() >= 5
    });
    let last = guest.ram();
    let report = meter.interrupt().status("completed", 0);
    let after = guest.ram();
    let (low, high) = interval(&report);
    let (least, most) = (pages_apart(&inside, &last), pages_apart(&before, &after));
    assert!(least > 200.0, "{least} pages changed");
    // All pages but some are looked at: there is little doubt.
    assert!(high - low < 0.1 * high, "{low} to {high}");
    assert!(
        low <= most && high >= least,
        "{low} to {high}, of {least} to {most}: {report}"
    );
    assert_eq!(report["tracking"], "sampled");
    assert_eq!(report["guest_pages"], 64 << 8);
    assert_keys(
        &report,
        &["curve", "verdict", "blocks", "windows", "sampling"],
    );
    assert_keys(&report, &["dirty_bytes_per_second_interval95"]);
}

#[test]
fn a_hole_stays_one() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let control = place.arg("control");
    let args = [
        "guest",
        "--control",
        &control,
        "--ram",
        "64M",
        "--workload",
        "idle",
    ];
    let mut guest = Process::start(&args);
    guest.says("guest runs");
    let ram = ram_of(&guest);
    let kept = || std::fs::metadata(&ram).unwrap().st_blocks();
    // A device writes all of its own.
    let before = until("the device has been everywhere", || {
        Some(kept()).filter(|kept| *kept > 8 * 1000)
    });
    let pid = guest.pid().to_string();
    let whole = ["--duration", "500ms", "--cpu", "100%", "--precision", "1%"];
    let report = run(&[&["rate", "--json", "--pid", &pid][..], &whole].concat());
    let report = report.status("completed", 0);
    // What it may write beside that is little: no page of the sample is there now.
    assert!(kept() < before + 8 * 1000, "{before}, {}", kept());
    let looks = report["sampling"]["looks"].as_u64().unwrap();
    assert!(looks > 10_000, "{report}");
    // What is there is known.
    let there = report["data_pages"].as_f64().unwrap();
    assert!(
        (there / (before as f64 / 8.0) - 1.0).abs() < 0.2,
        "{there} of {before} blocks"
    );
}

#[test]
fn it_says_so_in_every_way() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let guest = Guest::in_memory(&place, "64M", &[]);
    let (pid, svg) = (pid_of(&guest), place.arg("rate.svg"));
    let rate = [
        "rate",
        "--pid",
        &pid,
        "--duration",
        "400ms",
        "--interval",
        "100ms",
    ];
    let text = run(&[
        &rate[..],
        &[
            "--svg",
            &svg,
            "--bandwidth",
            "1M",
            "--downtime-limit",
            "1ms",
        ],
    ]
    .concat());
    assert_eq!(text.code, Some(0), "{text:?}");
    for what in [
        "sample: ",
        "standard error",
        " to ",
        "verdict: it does not converge",
        "held are not seen",
    ] {
        assert!(text.stdout.contains(what), "{what}: {text:?}");
    }
    let svg = std::fs::read_to_string(&svg).unwrap();
    assert!(
        svg.contains("<polygon ") && svg.contains("sampled") && !svg.contains("NaN"),
        "{svg}"
    );
    let page = run(&[&rate[..], &["--prometheus"]].concat());
    assert_eq!(page.code, Some(0), "{page:?}");
    let found = crate::metrics::samples(&page.stdout);
    let bound =
        |end: &str| found[&format!("gleaner_mean_dirty_bytes_per_second{{bound=\"{end}\"}}")];
    assert!(
        bound("low") < bound("likely") && bound("likely") < bound("high"),
        "{page:?}"
    );
    assert!(found["gleaner_sample_looks_total"] > 500.0);
    assert!(!found.contains_key("gleaner_harvests_total"));
}

/// Killed when it goes out of scope.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn of_a_stock_qemu_it_finds_the_pages_that_are_written() {
    if Command::new(QEMU).arg("--version").output().is_err() {
        say(&format!("skipped: no {QEMU}"));
        return;
    }
    if !kvm() {
        return;
    }
    let place = Place::new();
    let image = place.arg("firmware");
    // A page of 50, of the 65,280 behind the first MiB.
    let (pages, stride) = (1305, 50);
    std::fs::write(&image, firmware(pages, stride)).unwrap();
    let mut qemu = Command::new(QEMU);
    qemu.args(arguments(&image, 256)).stdin(Stdio::null());
    let qemu = Killed(qemu.spawn().unwrap());
    let pid = qemu.0.id().to_string();
    let written = until("its memory is there", || {
        let ended = run(&["rate", "--pid", &pid, "--duration", "50ms", "--json"]);
        let report = (ended.code == Some(0)).then(|| ended.json())?;
        (report["unique_pages"].as_u64() > Some(0)).then_some(report)
    });
    assert_eq!(written["guest_pages"], 256 << 8, "{FIRST}: {written}");
    let args = [
        "rate",
        "--pid",
        &pid,
        "--duration",
        "2s",
        "--interval",
        "200ms",
        "--cpu",
        "100%",
        "--json",
    ];
    let report = run(&args).status("completed", 0);
    let (low, high) = interval(&report);
    // Five standard errors; that 95 % are within two is for many trials to say.
    let (off, pages) = ((high - low) / 4.0, f64::from(pages));
    let found = report["unique_pages"].as_f64().unwrap();
    assert!(
        (found - pages).abs() < 5.0 * off && off < 0.1 * pages,
        "{found}, {low} to {high}"
    );
    let error = report["sampling"]["precision_reached"].as_f64().unwrap();
    assert!(error < 0.1, "{error}");
}

/// One line on standard error, the reason in the object, exit 1.
fn fails(args: &[&str], reason: &str) {
    let ended = run(&[&["rate", "--json"][..], args].concat());
    ended.failed("failed", reason);
    let lines = ended
        .stderr
        .lines()
        .filter(|line| line.starts_with("gleaner:"));
    assert_eq!(lines.count(), 1, "{ended:?}");
}

#[test]
fn what_can_not_be_looked_at_is_said() {
    let mut small = Command::new("cat");
    let small = small
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut small = Killed(small);
    let pid = small.0.id().to_string();
    fails(&["--pid", &pid], "is no guest");
    let range = "0x1000+16M";
    fails(
        &["--pid", &pid, "--range", range],
        "has no memory at 0x1000+0x1000000",
    );
    small.0.kill().unwrap();
    small.0.wait().unwrap();
    fails(&["--pid", &pid], "there is no process");
    fails(&["--pid", "4294967295"], "there is no process");
    for bad in [
        &["rate"][..],
        &["rate", "--pid", "1", "--control", "x"],
        &["rate", "--control", "x", "--range", "0x1000+4K"],
        &["rate", "--control", "x", "--cpu", "2%"],
        &["rate", "--pid", "1", "--precision", "0%"],
        &["rate", "--pid", "1", "--range", "0x1000"],
        &["rate", "--pid", "0x1"],
    ] {
        assert_eq!(run(bad).code, Some(2), "{bad:?}");
    }
}

#[test]
fn a_process_that_ends_in_the_middle_is_said() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let guest = Guest::in_memory(&place, "64M", &[]);
    let args = [
        "rate",
        "--json",
        "--pid",
        &pid_of(&guest),
        "--interval",
        "100ms",
        "--duration",
        "60s",
    ];
    let mut meter = Process::start(&args);
    meter.says("dirtied");
    guest.process.signal(Signal::KILL);
    guest.process.end();
    meter.end().failed("failed", "has ended");
}

#[test]
fn what_permission_is_missing_is_said() {
    if !rustix::process::geteuid().is_root() {
        fails(&["--pid", "1"], "CAP_SYS_PTRACE");
        return;
    }
    let own = std::process::id().to_string();
    let mut nobody = Command::new(env!("CARGO_BIN_EXE_gleaner"));
    nobody.args(["rate", "--pid", &own]).uid(65534).gid(65534);
    let Ok(output) = nobody.output() else {
        say("skipped: nobody may not run the binary where it is");
        return;
    };
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("may not be read") && said.contains("CAP_SYS_PTRACE"),
        "{said}"
    );
}
