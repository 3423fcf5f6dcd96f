//! A QEMU that awaits a migration: no firmware, no vCPU, one RAM block, which was filled with something else before.

use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Deserializer, Value, json};

use crate::common::kvm;
use crate::harness::{Place, say, until};

pub const QEMU: &str = "qemu-system-x86_64";
/// What its memory holds before.
const POISON: u8 = 0xEE;

/// Whether there are a QEMU and KVM; if not, one visible line says what is missing.
pub fn qemu() -> bool {
    if Command::new(QEMU).arg("--version").output().is_err() {
        say(&format!("skipped: no {QEMU}"));
        return false;
    }
    kvm()
}

/// One that runs; killed when it goes out of scope.
pub struct Qemu {
    child: Child,
    qmp: Qmp,
    ram: PathBuf,
}

/// What the destination is like.
pub struct Like<'a> {
    /// Name of its block.
    pub block: &'a str,
    /// Length of its block in bytes.
    pub ram: u64,
    /// Connections of multifd; 1: without.
    pub channels: u16,
}

impl Qemu {
    /// Starts one, with arguments about the migration.
    pub fn start(place: &Place, like: &Like<'_>, incoming: &str) -> Self {
        let ram = place.path("there.ram");
        poison(&ram, like.ram);
        let socket = place.path("qmp");
        let Like {
            block, ram: size, ..
        } = like;
        let object = format!(
            "memory-backend-file,id={block},size={size},mem-path={},share=on",
            ram.display()
        );
        let child = Command::new(QEMU)
            .args(["-machine", &format!("none,memory-backend={block}")])
            .args(["-object", &object, "-accel", "tcg", "-nodefaults"])
            .args(["-display", "none", "-S", "-incoming", incoming, "-qmp"])
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let qmp = Qmp::connect(&socket);
        Self { child, qmp, ram }
    }

    /// Starts one that listens at `address`.
    pub fn listen(place: &Place, like: &Like<'_>, address: &str) -> Self {
        let mut qemu = Self::start(place, like, "defer");
        if like.channels > 1 {
            let multifd = json!([{ "capability": "multifd", "state": true }]);
            let capabilities = json!({ "capabilities": multifd });
            qemu.qmp.execute("migrate-set-capabilities", &capabilities);
            let channels = json!({ "multifd-channels": like.channels });
            qemu.qmp.execute("migrate-set-parameters", &channels);
        }
        let uri = json!({ "uri": address });
        qemu.qmp.execute("migrate-incoming", &uri);
        qemu
    }

    /// Waits until it has loaded all, ends it, and returns its memory. It had nothing to say.
    pub fn completed(mut self) -> Vec<u8> {
        until("QEMU has completed", || {
            let said = self.qmp.execute("query-migrate", &json!({}));
            assert_ne!(said["status"], "failed");
            (said["status"] == "completed").then_some(())
        });
        self.qmp.execute("quit", &json!({}));
        assert_eq!(self.said(), "");
        self.memory()
    }

    /// What its memory holds.
    pub fn memory(&self) -> Vec<u8> {
        std::fs::read(&self.ram).unwrap()
    }

    /// Memory has begun to arrive.
    pub fn wait_begun(&self) {
        until("memory arrives", || {
            self.memory()
                .iter()
                .any(|byte| *byte != POISON)
                .then_some(())
        });
    }

    /// Ends it without any chance to clean up.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for its end, and returns what it said on standard error.
    pub fn said(&mut self) -> String {
        let mut said = String::new();
        let mut from = self.child.stderr.take().unwrap();
        from.read_to_string(&mut said).unwrap();
        self.child.wait().unwrap();
        said
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn poison(path: &Path, mut bytes: u64) {
    let mut file = File::create(path).unwrap();
    let piece = vec![POISON; 1 << 20];
    while bytes > 0 {
        let step = bytes.min(1 << 20);
        file.write_all(&piece[..usize::try_from(step).unwrap()])
            .unwrap();
        bytes -= step;
    }
}

/// A client of QMP.
pub struct Qmp {
    to: UnixStream,
    from: Box<dyn Iterator<Item = serde_json::Result<Value>> + Send>,
    /// What has happened meanwhile, as it was told.
    pub events: Vec<Value>,
}

impl Qmp {
    pub fn connect(path: &Path) -> Self {
        let to = until("QMP is there", || UnixStream::connect(path).ok());
        let from = BufReader::new(to.try_clone().unwrap());
        let from = Box::new(Deserializer::from_reader(from).into_iter());
        let mut qmp = Self {
            to,
            from,
            events: Vec::new(),
        };
        assert!(qmp.next()["QMP"].is_object());
        qmp.execute("qmp_capabilities", &json!({}));
        qmp
    }

    pub fn next(&mut self) -> Value {
        self.from.next().unwrap().unwrap()
    }

    /// Says anything.
    pub fn write(&mut self, text: &str) {
        self.to.write_all(text.as_bytes()).unwrap();
    }

    /// What a command returns.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Value {
        let mut answer = self.ask(command, arguments);
        assert!(answer.get("return").is_some(), "{command}: {answer}");
        answer["return"].take()
    }

    /// The class of the error that a command is refused with, and its words.
    pub fn refused(&mut self, command: &str, arguments: &Value) -> (String, String) {
        let answer = self.ask(command, arguments);
        let error = &answer["error"];
        assert!(error.is_object(), "{command}: {answer}");
        let text = |what: &str| error[what].as_str().unwrap().to_owned();
        (text("class"), text("desc"))
    }

    fn ask(&mut self, command: &str, arguments: &Value) -> Value {
        let request = json!({ "execute": command, "arguments": arguments });
        self.write(&request.to_string());
        self.answer()
    }

    /// What is no event.
    pub fn answer(&mut self) -> Value {
        loop {
            let said = self.next();
            if said.get("event").is_none() {
                return said;
            }
            self.events.push(said);
        }
    }
}
