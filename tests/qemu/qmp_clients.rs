//! QMP with the clients that others use.

use std::os::unix::net::UnixStream;
use std::process::Command;

use qapi::{Qmp, qmp};

use crate::common::kvm;
use crate::harness::*;
use crate::peer::qemu;
use crate::qmp::{guest, there};

/// A Python that has `qemu.qmp`, if there is one.
fn python() -> Option<String> {
    let named = std::env::var("GLEANER_QMP_PYTHON").unwrap_or_else(|_| "python3".into());
    let found = Command::new(&named)
        .args(["-c", "import qemu.qmp"])
        .output();
    let is_there = found.is_ok_and(|found| found.status.success());
    if !is_there {
        say(&format!(
            "skipped: {named} has no qemu.qmp: pip install qemu.qmp, and name it by GLEANER_QMP_PYTHON"
        ));
    }
    is_there.then_some(named)
}

#[test]
fn the_python_client_of_qemu_measures_and_migrates() {
    let Some(python) = python().filter(|_| qemu()) else {
        return;
    };
    let place = Place::new();
    let address = place.unix("incoming");
    let there = there(&place, &address, 1);
    let (guest, path) = guest(&place, &["--tracking", "ring"]);
    let said = Command::new(python)
        .args(["tests/qemu/client.py", path.to_str().unwrap(), &address])
        .output()
        .unwrap();
    assert!(
        said.status.success(),
        "{}",
        String::from_utf8_lossy(&said.stderr)
    );
    assert_same(&guest.ram(), &there.completed());
}

#[test]
fn the_rust_client_of_qemu_measures_and_migrates() {
    if !kvm() {
        return;
    }
    let place = Place::new();
    let (guest, path) = guest(&place, &["--tracking", "ring"]);
    let stream = UnixStream::connect(path).unwrap();
    let mut client = Qmp::from_stream(&stream);
    let greeting = client.handshake().unwrap();
    assert_eq!(greeting.version.qemu.major, 7);
    let commands = client.execute(&qmp::query_commands {}).unwrap();
    assert!(commands.iter().any(|command| command.name == "migrate"));
    let status = client.execute(&qmp::query_status {}).unwrap();
    assert!(status.running);
    let calc = qmp::calc_dirty_rate {
        calc_time: 1,
        calc_time_unit: None,
        sample_pages: None,
        mode: Some(qmp::DirtyRateMeasureMode::dirty_ring),
    };
    client.execute(&calc).unwrap();
    let query = qmp::query_dirty_rate {
        calc_time_unit: None,
    };
    let rate = until("the rate is measured", || {
        let found = client.execute(&query).unwrap();
        (found.status == qmp::DirtyRateStatus::measured).then_some(found)
    });
    assert!(rate.dirty_rate > Some(0));
    assert_eq!(rate.vcpu_dirty_rate.unwrap().len(), 2);
    client.execute(&qmp::query_migrate_parameters {}).unwrap();
    client.execute(&qmp::query_migrate_capabilities {}).unwrap();
    let file = format!("file:{}", place.arg("image"));
    let migrate: qmp::migrate = serde_json::from_value(serde_json::json!({"uri": file})).unwrap();
    client.execute(&migrate).unwrap();
    let sent = until("it has migrated", || {
        let found = client.execute(&qmp::query_migrate {}).unwrap();
        (found.status == Some(qmp::MigrationStatus::completed)).then_some(found)
    });
    assert!(sent.ram.unwrap().normal > 0);
    let status = client.execute(&qmp::query_status {}).unwrap();
    assert_eq!(status.status, qmp::RunState::postmigrate);
    let events: Vec<_> = client.events().collect();
    let stopped = |event: &qmp::Event| matches!(event, qmp::Event::STOP { .. });
    assert_eq!(events.iter().filter(|e| stopped(e)).count(), 1);
    client.execute(&qmp::quit {}).unwrap();
    assert_eq!(guest.process.end().code, Some(0));
}
