//! QMP: a guest's client stops it, measures it, limits it and migrates it as it would with a QEMU.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::JoinHandle;

use serde_json::{Value, json};

use crate::arrives::CHURN;
use crate::common::kvm;
use crate::harness::*;
use crate::peer::{Like, Qemu, Qmp, qemu};

pub const RAM: u64 = 64 << 20;

/// A guest with a QMP socket.
pub fn guest(place: &Place, more: &[&str]) -> (Guest, PathBuf) {
    let path = place.path("guest.qmp");
    let qmp = format!("unix:{}", path.display());
    let mut args = vec!["--qmp", &qmp, CHURN[0], CHURN[1], "--qemu-version", "7.2"];
    args.extend(more);
    let guest = Guest::in_memory_writing(place, &RAM.to_string(), "5000", &args);
    (guest, path)
}

/// A destination of such a guest.
pub fn there(place: &Place, address: &str, channels: u16) -> Qemu {
    let like = Like {
        block: "ram",
        ram: RAM,
        channels,
    };
    Qemu::listen(place, &like, address)
}

impl Qmp {
    fn with_events(path: &std::path::Path) -> Self {
        let mut qmp = Self::connect(path);
        qmp.can(&["events"]);
        qmp
    }

    /// Switches capabilities on.
    fn can(&mut self, names: &[&str]) {
        let on = |name: &&str| json!({"capability": name, "state": true});
        let all: Vec<Value> = names.iter().map(on).collect();
        self.execute("migrate-set-capabilities", &json!({"capabilities": all}));
    }

    fn migrate(&mut self, to: &str) {
        assert_eq!(self.execute("migrate", &json!({"uri": to})), json!({}));
    }

    /// Waits until a migration is at this.
    fn wait_status(&mut self, status: &str) -> Value {
        until(&format!("the migration is {status}"), || {
            let found = self.execute("query-migrate", &json!({}));
            (found["status"] == status).then_some(found)
        })
    }

    fn status(&mut self) -> Value {
        self.execute("query-status", &json!({}))["status"].take()
    }

    /// Events in their order, each with what it says.
    fn told(&self) -> Vec<String> {
        let told = |event: &Value| {
            assert!(event["timestamp"]["seconds"].as_u64() > Some(1_600_000_000));
            let data = &event["data"];
            let said = [&data["status"], &data["pass"]].map(ToString::to_string);
            let said = said.join("").replace("null", "").replace('"', "");
            format!("{} {said}", event["event"].as_str().unwrap())
        };
        self.events.iter().map(told).collect()
    }
}

/// Passes both ways what comes over one connection, and counts what comes from the first side.
fn counted(near: &str, far: &str) -> JoinHandle<u64> {
    let path = |address: &str| address.strip_prefix("unix:").unwrap().to_owned();
    let listener = UnixListener::bind(path(near)).unwrap();
    let far = path(far);
    std::thread::spawn(move || {
        let (near, _) = listener.accept().unwrap();
        let far = UnixStream::connect(far).unwrap();
        let back = (far.try_clone().unwrap(), near.try_clone().unwrap());
        std::thread::spawn(move || pass(back.0, back.1));
        pass(near, far)
    })
}

fn pass(mut from: UnixStream, mut to: UnixStream) -> u64 {
    let (mut bytes, mut count) = (vec![0; 1 << 16], 0);
    loop {
        let got = from.read(&mut bytes).unwrap();
        if got == 0 || to.write_all(&bytes[..got]).is_err() {
            let _ = to.shutdown(Shutdown::Write);
            return count;
        }
        count += got as u64;
    }
}

#[test]
fn a_client_migrates_the_guest_to_a_stock_qemu_and_is_told_of_it_in_order() {
    if !qemu() {
        return;
    }
    let place = Place::new();
    let address = place.unix("incoming");
    let there = there(&place, &address, 1);
    let between = place.unix("between");
    let passed = counted(&between, &address);
    let (mut guest, path) = guest(&place, &[]);
    let mut qmp = Qmp::with_events(&path);
    qmp.execute("migrate-set-parameters", &json!({"downtime-limit": 10_000}));
    qmp.migrate(&between);
    let report = qmp.wait_status("completed");
    guest.process.says("the guest has migrated away");
    assert_same(&guest.ram(), &there.completed());
    assert_eq!(report["ram"]["transferred"], passed.join().unwrap());
    assert_eq!(report["ram"]["remaining"], 0);
    assert_eq!(report["ram"]["total"], RAM);
    let passes = report["ram"]["dirty-sync-count"].as_u64().unwrap();
    // The last one is with the guest stopped.
    let mut expected = vec!["MIGRATION setup".to_owned(), "MIGRATION active".into()];
    expected.extend((1..passes).map(|pass| format!("MIGRATION_PASS {pass}")));
    expected.extend(["STOP ".into(), format!("MIGRATION_PASS {passes}")]);
    expected.push("MIGRATION completed".into());
    assert_eq!(qmp.told(), expected);
    assert_eq!(qmp.status(), "postmigrate");
    let (class, desc) = qmp.refused("cont", &json!({}));
    assert_eq!(class, "GenericError");
    assert!(desc.contains("has migrated away"), "{desc}");
    qmp.execute("quit", &json!({}));
    assert_eq!(guest.process.end().code, Some(0));
}

#[test]
fn a_client_migrates_the_guest_over_multifd() {
    if !qemu() {
        return;
    }
    let place = Place::new();
    let address = place.unix("incoming");
    let there = there(&place, &address, 4);
    let (guest, path) = guest(&place, &[]);
    let mut qmp = Qmp::connect(&path);
    qmp.can(&["multifd", "return-path"]);
    qmp.execute(
        "migrate-set-parameters",
        &json!({"multifd-channels": 4, "downtime-limit": 10_000}),
    );
    qmp.migrate(&address);
    qmp.wait_status("completed");
    assert_same(&guest.ram(), &there.completed());
}

/// Counted by who reads it.
#[test]
fn what_query_migrate_counts_is_what_was_sent() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let (guest, path) = guest(&place, &[]);
    let mut qmp = Qmp::connect(&path);
    qmp.execute("migrate-set-parameters", &json!({"downtime-limit": 10_000}));
    let file = format!("file:{}", place.arg("image"));
    qmp.migrate(&file);
    let sent = qmp.wait_status("completed")["ram"].take();
    let length = std::fs::metadata(place.path("image")).unwrap().len();
    assert_eq!(sent["transferred"], length);
    let dir = place.arg("there");
    let args = ["receive", "--json", "--format", "qemu", "--listen", &file];
    let received = run(&[&args[..], &["--ram-dir", &dir]].concat());
    let received = received.status("completed", 0);
    assert_eq!(sent["normal"], received["pages"]);
    assert_eq!(sent["duplicate"], received["zero_pages"]);
    let there = std::fs::read(place.path("there").join("ram.ram")).unwrap();
    assert_same(&guest.ram(), &there);
}

#[test]
fn a_guest_that_a_client_stopped_stays_stopped_when_its_migration_fails_and_moves_as_it_is() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let (mut guest, path) = guest(&place, &[]);
    let mut qmp = Qmp::with_events(&path);
    qmp.execute("stop", &json!({}));
    qmp.execute("stop", &json!({}));
    assert_eq!(qmp.status(), "paused");
    // A destination that hangs up when the guest is stopped and all is sent: nobody has answered.
    let hangs_up = UnixListener::bind(place.path("hangs-up")).unwrap();
    let reads = std::thread::spawn(move || {
        let (mut stream, _) = hangs_up.accept().unwrap();
        let _ = stream.read(&mut [0; 4096]);
    });
    qmp.migrate(&place.unix("hangs-up"));
    let failed = qmp.wait_status("failed");
    reads.join().unwrap();
    assert!(failed["error-desc"].is_string(), "{failed}");
    assert_eq!(qmp.status(), "paused");
    qmp.execute("cont", &json!({}));
    guest.assert_runs();
    qmp.execute("stop", &json!({}));
    let events = [
        "STOP ",
        "MIGRATION setup",
        "MIGRATION failed",
        "RESUME ",
        "STOP ",
    ];
    assert_eq!(qmp.told(), events);
    let moved = guest.ram();
    let file = format!("file:{}", place.arg("image"));
    qmp.migrate(&file);
    qmp.wait_status("completed");
    assert_eq!(qmp.status(), "postmigrate");
    assert_same(&moved, &guest.ram());
}

#[test]
fn a_stopped_guest_whose_migration_fails_behind_its_stop_is_the_clients_again() {
    if !qemu() {
        return;
    }
    let place = Place::new();
    let address = place.unix("incoming");
    // Its machine has another name: it refuses the stream, and says so late or early.
    let there = there(&place, &address, 1);
    let more = ["--machine", "pc-i440fx-7.2"];
    let (mut guest, path) = guest(&place, &more);
    let mut qmp = Qmp::connect(&path);
    qmp.execute("stop", &json!({}));
    qmp.migrate(&address);
    qmp.wait_status("failed");
    drop(there);
    assert_eq!(qmp.status(), "paused");
    qmp.execute("cont", &json!({}));
    guest.assert_runs();
    assert_eq!(qmp.status(), "running");
}

#[test]
fn a_dirty_rate_is_measured_beside_a_migration_and_limits_change_it_on_the_way() {
    if !qemu() {
        return;
    }
    let place = Place::new();
    let address = place.unix("incoming");
    let there = there(&place, &address, 1);
    let (guest, path) = guest(&place, &["--tracking", "ring"]);
    let mut qmp = Qmp::connect(&path);
    // It would last for ever.
    let slowly = json!({"max-bandwidth": 1 << 20, "downtime-limit": 0});
    qmp.execute("migrate-set-parameters", &slowly);
    qmp.migrate(&address);
    qmp.wait_status("active");
    for mode in ["dirty-ring", "dirty-bitmap", "page-sampling"] {
        let mut ask = json!({"calc-time": 100, "calc-time-unit": "millisecond", "mode": mode});
        if mode == "page-sampling" {
            ask["sample-pages"] = 16_384.into();
        }
        qmp.execute("calc-dirty-rate", &ask);
        let found = until("the rate is measured", || {
            let found = qmp.execute("query-dirty-rate", &json!({}));
            (found["status"] == "measured").then_some(found)
        });
        assert_eq!(found["mode"], mode);
        assert!(found["dirty-rate"].as_u64() > Some(0), "{found}");
        let vcpus = found["vcpu-dirty-rate"].as_array().map(Vec::len);
        assert_eq!(vcpus, (mode == "dirty-ring").then_some(2), "{found}");
    }
    assert_eq!(qmp.wait_status("active")["status"], "active");
    let at_last = json!({"max-bandwidth": 0, "downtime-limit": 10_000});
    qmp.execute("migrate-set-parameters", &at_last);
    qmp.wait_status("completed");
    assert_same(&guest.ram(), &there.completed());
}

#[test]
fn a_vcpu_is_held_to_its_dirty_limit_until_that_is_cancelled() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let (_guest, path) = guest(&place, &["--tracking", "ring"]);
    let mut qmp = Qmp::connect(&path);
    let limit = |vcpu: u64| json!({"cpu-index": vcpu, "dirty-rate": 1});
    let (_, desc) = qmp.refused("set-vcpu-dirty-limit", &limit(2));
    assert!(desc.contains("no vCPU 2"), "{desc}");
    assert_eq!(qmp.execute("query-vcpu-dirty-limit", &json!({})), json!([]));
    qmp.execute("set-vcpu-dirty-limit", &limit(1));
    // Each writes some 10 MB a second if it may.
    until("it is held to 1 MB a second", || {
        let found = qmp.execute("query-vcpu-dirty-limit", &json!({}));
        assert_eq!(found[0]["cpu-index"], 1, "{found}");
        assert_eq!(found[0]["limit-rate"], 1, "{found}");
        assert_eq!(found.as_array().unwrap().len(), 1);
        (found[0]["current-rate"] == 1).then_some(())
    });
    qmp.execute("cancel-vcpu-dirty-limit", &json!({}));
    assert_eq!(qmp.execute("query-vcpu-dirty-limit", &json!({})), json!([]));
}

#[test]
fn a_cancelled_migration_leaves_the_guest_running_and_the_next_one_arrives() {
    if !qemu() {
        return;
    }
    let place = Place::new();
    let address = place.unix("incoming");
    let (mut guest, path) = guest(&place, &[]);
    let mut qmp = Qmp::with_events(&path);
    let first = there(&place, &address, 1);
    let slowly = json!({"max-bandwidth": 1 << 20, "downtime-limit": 0});
    qmp.execute("migrate-set-parameters", &slowly);
    qmp.migrate(&address);
    qmp.wait_status("active");
    let (_, desc) = qmp.refused("migrate", &json!({"uri": address}));
    assert!(desc.contains("under way already"), "{desc}");
    qmp.execute("migrate_cancel", &json!({}));
    qmp.wait_status("cancelled");
    let told = qmp.told();
    let end = ["MIGRATION cancelling", "MIGRATION cancelled"];
    assert_eq!(told[told.len() - 2..], end);
    guest.assert_runs();
    first.kill();
    let again = place.unix("again");
    let second = there(&place, &again, 1);
    let at_last = json!({"max-bandwidth": 0, "downtime-limit": 10_000});
    qmp.execute("migrate-set-parameters", &at_last);
    qmp.migrate(&again);
    qmp.wait_status("completed");
    assert_same(&guest.ram(), &second.completed());
}

#[test]
fn a_limit_that_is_raised_holds_for_what_waits_by_the_old_one() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let (_guest, path) = guest(&place, &[]);
    let mut qmp = Qmp::connect(&path);
    let parameters = "migrate-set-parameters";
    // The first frame would take an hour.
    let slowly = json!({"max-bandwidth": 1, "downtime-limit": 10_000});
    qmp.execute(parameters, &slowly);
    qmp.migrate(&format!("file:{}", place.arg("image")));
    until("a page is in the file, and the next one waits", || {
        let image = std::fs::metadata(place.path("image")).ok();
        image.filter(|image| image.len() > 4096)
    });
    qmp.execute(parameters, &json!({"max-bandwidth": 0}));
    qmp.wait_status("completed");
}

#[test]
fn vcpus_are_throttled_by_a_migration_or_by_limits_but_not_by_both() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let (_guest, path) = guest(&place, &["--tracking", "ring"]);
    let mut qmp = Qmp::connect(&path);
    qmp.can(&["auto-converge"]);
    let slowly = json!({"max-bandwidth": 1 << 20, "downtime-limit": 0});
    qmp.execute("migrate-set-parameters", &slowly);
    let limit = json!({"dirty-rate": 1});
    qmp.execute("set-vcpu-dirty-limit", &limit);
    let file = format!("file:{}", place.arg("image"));
    let (_, desc) = qmp.refused("migrate", &json!({"uri": file}));
    assert!(desc.contains("dirty limits"), "{desc}");
    qmp.execute("cancel-vcpu-dirty-limit", &json!({}));
    qmp.migrate(&file);
    let (_, desc) = qmp.refused("set-vcpu-dirty-limit", &limit);
    assert!(desc.contains("auto-converge"), "{desc}");
    qmp.execute("cancel-vcpu-dirty-limit", &json!({}));
    qmp.execute("migrate_cancel", &json!({}));
    qmp.wait_status("cancelled");
    qmp.execute("set-vcpu-dirty-limit", &limit);
}

#[test]
fn a_client_may_ask_thousands_of_things_before_it_reads() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let (_guest, path) = guest(&place, &[]);
    let mut qmp = Qmp::connect(&path);
    let ask = |n: u32| json!({"execute": "query-status", "id": n}).to_string();
    let all: String = (0..4000).map(ask).collect();
    qmp.write(&all);
    for n in 0..4000 {
        let answer = qmp.answer();
        assert_eq!(answer["id"], n, "{answer}");
    }
}

#[test]
fn gleaners_own_stream_moves_the_guest_with_its_vcpus() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let there = Receive::start(&place, "there", &["--resume"]);
    let (guest, path) = guest(&place, &[]);
    let mut qmp = Qmp::connect(&path);
    qmp.migrate(&format!("gleaner:{}", there.address));
    qmp.wait_status("completed");
    let left = guest.ram();
    assert_changes(&there.ram_file());
    assert_same(&left, &guest.ram());
}

#[test]
fn what_is_asked_wrongly_is_refused_and_changes_nothing() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let (mut guest, path) = guest(&place, &["--tracking", "bitmap"]);
    let mut qmp = Qmp::connect(&path);
    for (command, arguments, class, word) in [
        ("qmp_capabilities", json!({}), "CommandNotFound", "already"),
        ("system_reset", json!({}), "CommandNotFound", "no command"),
        ("stop", json!({"now": true}), "GenericError", "now"),
        ("migrate", json!({}), "GenericError", "uri"),
        (
            "migrate",
            json!({"uri": "rdma:x"}),
            "GenericError",
            "rdma:x",
        ),
        // A descriptor of the VMM's own, maybe the guest's memory.
        ("migrate", json!({"uri": "fd:3"}), "GenericError", "fd:"),
        (
            "migrate",
            json!({"uri": "unix:/nowhere", "blk": true}),
            "GenericError",
            "blk",
        ),
        (
            "migrate-set-parameters",
            json!({"downtime-limit": 2_000_001}),
            "GenericError",
            "ms",
        ),
        (
            "migrate-set-parameters",
            json!({"multifd-channels": 0}),
            "GenericError",
            "1 to",
        ),
        (
            "migrate-set-parameters",
            json!({"tls-creds": "x"}),
            "GenericError",
            "tls-creds",
        ),
        (
            "calc-dirty-rate",
            json!({"calc-time": 61}),
            "GenericError",
            "60 s",
        ),
        (
            "calc-dirty-rate",
            json!({"calc-time": 1, "mode": "guess"}),
            "GenericError",
            "guess",
        ),
        (
            "calc-dirty-rate",
            json!({"calc-time": 1, "mode": "dirty-ring"}),
            "GenericError",
            "ring",
        ),
        (
            "set-vcpu-dirty-limit",
            json!({"dirty-rate": 1}),
            "GenericError",
            "--tracking ring",
        ),
        (
            "migrate-set-capabilities",
            json!({"capabilities": [{"capability": "xbzrle", "state": true}]}),
            "GenericError",
            "xbzrle",
        ),
    ] {
        let (found, desc) = qmp.refused(command, &arguments);
        assert_eq!(found, class, "{command} {arguments}: {desc}");
        assert!(desc.contains(word), "{command} {arguments}: {desc}");
    }
    // Two at once, with ids, and behind them what is no JSON.
    qmp.write(r#"{"execute":"query-status","id":[1]}{"execute":"nonsense","id":"two"}"#);
    assert_eq!(qmp.answer()["id"], json!([1]));
    let refused = qmp.answer();
    assert_eq!(refused["id"], "two");
    assert_eq!(refused["error"]["class"], "CommandNotFound");
    qmp.write("help\n");
    assert_eq!(qmp.answer()["error"]["class"], "GenericError");
    qmp.write("{\"exec-oob\": \"query-status\"}");
    assert_eq!(qmp.answer()["error"]["class"], "GenericError");
    let again = qmp.execute("query-migrate", &json!({}));
    assert_eq!(again, json!({}), "nothing was begun");
    // Who has not negotiated is told nothing else.
    let mut other = UnixStream::connect(&path).unwrap();
    other.write_all(b"{\"execute\":\"query-status\"}").unwrap();
    let mut said = serde_json::Deserializer::from_reader(other).into_iter::<Value>();
    assert!(said.next().unwrap().unwrap()["QMP"]["version"].is_object());
    let refused = said.next().unwrap().unwrap();
    assert_eq!(refused["error"]["class"], "CommandNotFound");
    guest.assert_runs();
}
