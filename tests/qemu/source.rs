//! A QEMU whose memory is migrated: a guest that runs its firmware, or none, whose memory is written from outside.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use crate::harness::{Place, until};
use crate::peer::{QEMU, Qmp};

pub const RAM: u64 = 64 << 20;

/// What runs there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Machine {
    /// No guest: pages are written by the test.
    None,
    /// A PC, whose firmware looks for something to start.
    Pc,
}

impl Machine {
    /// As a stream names it, from Debian 12's QEMU.
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Pc => "pc-i440fx-7.2",
        }
    }
}

/// One that runs; killed when it goes out of scope.
pub struct Source {
    child: Child,
    qmp: Qmp,
    ram: PathBuf,
    writes: Option<UnixStream>,
    pub machine: Machine,
    /// Bytes a second that it may send.
    pub bandwidth: u64,
    /// Bytes of its memory that are written while it migrates.
    pub hot: Range<u64>,
}

impl Source {
    pub fn start(place: &Place, machine: Machine) -> Self {
        let ram = place.path("here.ram");
        fill(&ram);
        let [socket, writes] = ["source.qmp", "writes"].map(|name| place.path(name));
        let mut command = Command::new(QEMU);
        match machine {
            Machine::None => command
                .args(["-machine", "none,memory-backend=ram", "-S"])
                .args(["-cpu", "qemu64,apic-id=0", "-qtest-log", "/dev/null"])
                .arg("-qtest")
                .arg(format!("unix:{},server=on,wait=off", writes.display())),
            Machine::Pc => command.args(["-machine", "pc,memory-backend=ram", "-m", "64M"]),
        };
        let accelerator = match machine {
            Machine::None => "tcg",
            Machine::Pc => "kvm",
        };
        let object = format!(
            "memory-backend-file,id=ram,size={RAM},mem-path={},share=on",
            ram.display()
        );
        let child = command
            .args(["-object", &object, "-accel", accelerator, "-nodefaults"])
            .args(["-display", "none", "-qmp"])
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let qmp = Qmp::connect(&socket);
        let writes = (machine == Machine::None)
            .then(|| until("it can be written to", || UnixStream::connect(&writes).ok()));
        Self {
            child,
            qmp,
            ram,
            writes,
            machine,
            bandwidth: 300 << 20,
            hot: 0..RAM,
        }
    }

    fn set(&mut self, capabilities: &[&str], channels: u16) {
        let each = capabilities.iter().chain(&["pause-before-switchover"]);
        let each: Vec<_> = each
            .map(|name| json!({ "capability": name, "state": true }))
            .collect();
        let all = json!({ "capabilities": each });
        self.qmp.execute("migrate-set-capabilities", &all);
        let mut parameters = json!({ "max-bandwidth": self.bandwidth, "downtime-limit": 1 });
        if channels > 0 {
            parameters["multifd-channels"] = channels.into();
        }
        self.qmp.execute("migrate-set-parameters", &parameters);
    }

    fn status(&mut self) -> Value {
        self.qmp.execute("query-migrate", &json!({}))
    }

    /// Migrates to `address` while its memory is written, and returns what it says of it in the end.
    pub fn migrate(&mut self, address: &str, capabilities: &[&str], channels: u16) -> Value {
        self.set(capabilities, channels);
        let enough = AtomicBool::new(false);
        let writes = self.writes.take();
        std::thread::scope(|scope| {
            let writer = writes.map(|writes| {
                let hot = self.hot.clone();
                let enough = &enough;
                scope.spawn(move || write(writes, &hot, enough))
            });
            let uri = json!({ "uri": address });
            self.qmp.execute("migrate", &uri);
            until("the guest is stopped", || {
                let status = self.status()["status"].take();
                let over = status == "pre-switchover" || status == "failed";
                over.then_some(())
            });
            enough.store(true, Ordering::Relaxed);
            if let Some(writer) = writer {
                assert!(writer.join().unwrap() > 0);
            }
        });
        if self.status()["status"] == "pre-switchover" {
            let state = json!({ "state": "pre-switchover" });
            self.qmp.execute("migrate-continue", &state);
        }
        until("the migration has ended", || {
            let status = self.status();
            let over = status["status"] == "completed" || status["status"] == "failed";
            over.then_some(status)
        })
    }

    /// What its memory holds.
    pub fn memory(&self) -> Vec<u8> {
        std::fs::read(&self.ram).unwrap()
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Writes here and there until it is enough: how often.
fn write(mut to: UnixStream, hot: &Range<u64>, enough: &AtomicBool) -> u64 {
    let mut answers = BufReader::new(to.try_clone().unwrap());
    let mut random = Random(7);
    let mut count = 0;
    while !enough.load(Ordering::Relaxed) || count == 0 {
        let at = hot.start + random.next() % (hot.end - hot.start - 200);
        let [length, byte] = [1 + random.next() % 200, random.next() % 256];
        to.write_all(format!("memset {at:#x} {length} {byte}\n").as_bytes())
            .unwrap();
        let mut answer = String::new();
        answers.read_line(&mut answer).unwrap();
        assert_eq!(answer, "OK\n");
        count += 1;
    }
    count
}

/// Each third MiB is zero, the rest is anything.
fn fill(path: &std::path::Path) {
    let mut file = File::create(path).unwrap();
    let mut random = Random(5);
    for number in 0..RAM >> 20 {
        let words = (0..1 << 17).map(|_| if number % 3 == 0 { 0 } else { random.next() });
        let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        file.write_all(&bytes).unwrap();
    }
}

/// Numbers that repeat from run to run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // Xorshift, by Marsaglia.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}
