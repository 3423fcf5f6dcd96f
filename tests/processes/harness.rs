//! Processes of the binary, and what can be seen of them from outside.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};
use serde_json::Value;

/// After this time a test does not wait any longer.
const DEADLINE: Duration = Duration::from_secs(60);

/// The RAM of the guests. Small: pages are compared, and CI has two cores.
pub const RAM: &str = "16M";

/// Polls until `look` finds something.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "waited too long until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A directory that goes with the test, and names in it.
pub struct Place(tempfile::TempDir);

impl Place {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// As an argument.
    pub fn arg(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// As a Unix socket's address.
    pub fn unix(&self, name: &str) -> String {
        format!("unix:{}", self.arg(name))
    }
}

/// A running process of the binary; killed when it goes out of scope.
pub struct Process {
    what: String,
    child: Child,
    stdout: Output,
    stderr: Output,
}

/// What a process says, as it says it.
struct Output {
    text: Arc<Mutex<String>>,
    thread: Option<JoinHandle<()>>,
}

impl Output {
    fn follow(mut from: impl Read + Send + 'static) -> Self {
        let text = Arc::new(Mutex::new(String::new()));
        let into = Arc::clone(&text);
        let thread = std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = from.read(&mut bytes) {
                into.lock()
                    .unwrap()
                    .push_str(&String::from_utf8_lossy(&bytes[..n]));
            }
        });
        Self {
            text,
            thread: Some(thread),
        }
    }

    fn text(&self) -> String {
        self.text.lock().unwrap().clone()
    }

    fn all(&mut self) -> String {
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
        self.text()
    }
}

/// What is left of a process.
#[derive(Debug)]
pub struct Ended {
    #[allow(dead_code)] // what Debug shows of it
    pub what: String,
    /// None: it was killed.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Process {
    pub fn start(args: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_gleaner"))
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            what: args.join(" "),
            stdout: Output::follow(child.stdout.take().unwrap()),
            stderr: Output::follow(child.stderr.take().unwrap()),
            child,
        }
    }

    /// Waits until it has said `text` on standard error, and returns all that it said there.
    pub fn says(&mut self, text: &str) -> String {
        self.wait_for(&format!("it says {text:?}"), |said| said.contains(text))
    }

    /// Waits until what it has said on standard error, in whole lines, is `good`, and returns it.
    pub fn wait_for(&mut self, what: &str, good: impl Fn(&str) -> bool) -> String {
        until(&format!("{}: {what}", self.what), || {
            // Asked first: what a process said before its end is here then.
            let over = self.child.try_wait().unwrap().is_some();
            let said = if over {
                self.stderr.all()
            } else {
                self.stderr.text()
            };
            // Whole lines only.
            let lines = said.rfind('\n').map_or("", |end| &said[..end]);
            if good(lines) {
                return Some(lines.to_owned());
            }
            assert!(!over, "{}: ended before {what}: {said}", self.what);
            None
        })
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).unwrap();
    }

    /// Whether it has an answer of its own to a signal.
    pub fn catches(&self, signal: Signal) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let mut lines = status.lines();
        let caught = lines.find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
        let caught = u64::from_str_radix(caught.trim(), 16).unwrap();
        caught & 1 << (signal.as_raw() - 1) != 0
    }

    /// From now on it gets no more of something than `most`.
    pub fn limit(&self, resource: Resource, most: u64) {
        let limit = Rlimit {
            current: Some(most),
            maximum: Some(most),
        };
        prlimit(Some(Pid::from_child(&self.child)), resource, limit).unwrap();
    }

    /// From now on it opens no descriptor from this number on, which can be undone: the number that it was.
    pub fn limit_files(&self, number: u64) -> u64 {
        let pid = Some(Pid::from_child(&self.child));
        let resource = Resource::Nofile;
        // What it is comes back with a change alone.
        let maximum = getrlimit(resource).maximum;
        let limit = Rlimit {
            current: Some(number),
            maximum,
        };
        let before = prlimit(pid, resource, limit).unwrap();
        before.current.unwrap()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for its end.
    pub fn end(mut self) -> Ended {
        let status = until(&format!("the end of {}", self.what), || {
            self.child.try_wait().unwrap()
        });
        Ended {
            what: self.what.clone(),
            code: status.code(),
            stdout: self.stdout.all(),
            stderr: self.stderr.all(),
        }
    }

    /// Ctrl-C, and its end.
    pub fn interrupt(self) -> Ended {
        self.signal(Signal::INT);
        self.end()
    }

    /// An end without any chance to clean up.
    pub fn kill(self) {
        self.signal(Signal::KILL);
        self.end();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// The one JSON object on standard output.
    pub fn json(&self) -> Value {
        assert_eq!(self.stdout.lines().count(), 1, "one line: {self:?}");
        let value: Value = serde_json::from_str(&self.stdout).unwrap();
        assert!(value.is_object(), "an object: {self:?}");
        value
    }

    /// The object, of a process that ended with `code` and this status.
    pub fn status(&self, status: &str, code: i32) -> Value {
        let value = self.json();
        assert_eq!(value["status"], status, "{self:?}");
        assert_eq!(self.code, Some(code), "{self:?}");
        value
    }

    /// The object of a failure whose reason, said at both places, contains `reason`.
    pub fn failed(&self, status: &str, reason: &str) -> Value {
        let value = self.status(status, 1);
        let said = value["reason"].as_str().unwrap();
        assert!(said.contains(reason), "{self:?}");
        assert!(!said.contains('\n'), "one line: {self:?}");
        assert!(
            self.stderr.contains(said),
            "on standard error too: {self:?}"
        );
        value
    }
}

pub fn run(args: &[&str]) -> Ended {
    Process::start(args).end()
}

/// A guest with its service, its RAM in the file `ram`.
pub struct Guest {
    pub process: Process,
    pub control: String,
    ram: PathBuf,
}

impl Guest {
    pub fn start(place: &Place, more: &[&str]) -> Self {
        Self::writing(place, "2000", more)
    }

    /// One that writes so many pages a second.
    pub fn writing(place: &Place, rate: &str, more: &[&str]) -> Self {
        let (control, ram) = (place.arg("control"), place.arg("ram"));
        let mut args = vec!["guest", "--control", &control, "--ram", RAM, "--ram-file"];
        args.extend([&*ram, "--write-rate", rate, "--churn", "100"]);
        args.extend(more);
        let mut process = Process::start(&args);
        process.says("guest runs");
        Self {
            process,
            ram: ram.into(),
            control,
        }
    }

    /// A guest with its service, its RAM in a memfd.
    pub fn in_memory(place: &Place, ram: &str, more: &[&str]) -> Self {
        Self::in_memory_writing(place, ram, "2000", more)
    }

    /// One that writes so many pages a second.
    pub fn in_memory_writing(place: &Place, ram: &str, rate: &str, more: &[&str]) -> Self {
        let control = place.arg("control");
        let mut args = vec!["guest", "--control", &control, "--ram", ram];
        args.extend(["--write-rate", rate, "--churn", "100"]);
        args.extend(more);
        let mut process = Process::start(&args);
        process.says("guest runs");
        Self {
            ram: ram_of(&process),
            process,
            control,
        }
    }

    pub fn ram(&self) -> Vec<u8> {
        fs::read(&self.ram).unwrap()
    }

    pub fn send(&self, to: &str, more: &[&str]) -> Process {
        let mut args = vec!["send", "--json", "--control", &self.control, "--to", to];
        args.extend(more);
        Process::start(&args)
    }

    /// Its memory changes: it runs.
    pub fn assert_runs(&mut self) {
        assert!(self.process.runs());
        assert_changes(&self.ram);
    }

    /// Whatever happened before, nothing is lost: it migrates, and arrives as it was.
    pub fn assert_migrates(&self, place: &Place) {
        let mut receive = Receive::start(place, "last", &[]);
        let sent = self.send(&receive.address, &[]).end();
        sent.status("completed", 0);
        receive.wait_end().status("completed", 0);
        assert_same(&self.ram(), &receive.ram());
    }
}

/// The memfd that a process has its guest's RAM in.
pub fn ram_of(process: &Process) -> PathBuf {
    let open = fs::read_dir(format!("/proc/{}/fd", process.pid())).unwrap();
    let is_ram = |path: &PathBuf| {
        fs::read_link(path).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:ram "))
    };
    let mut open = open.map(|entry| entry.unwrap().path());
    open.find(is_ram).unwrap()
}

/// Waits until a file changes.
pub fn assert_changes(path: &Path) {
    let before = fs::read(path).unwrap();
    until(&format!("{} changes", path.display()), || {
        (fs::read(path).unwrap() != before).then_some(())
    });
}

/// A destination, its blocks in a directory.
pub struct Receive {
    pub process: Option<Process>,
    pub address: String,
    pub dir: PathBuf,
}

impl Receive {
    /// Listens on a Unix socket.
    pub fn start(place: &Place, name: &str, more: &[&str]) -> Self {
        Self::listen(place, name, &place.unix(&format!("{name}.socket")), more)
    }

    pub fn listen(place: &Place, name: &str, address: &str, more: &[&str]) -> Self {
        let dir = place.arg(name);
        let mut args = vec!["receive", "--json", "--listen", address, "--ram-dir", &dir];
        args.extend(more);
        let mut process = Process::start(&args);
        let said = process.says("listening at ");
        let process = Some(process);
        let address = said.split("listening at ").nth(1).unwrap();
        let address = address.lines().next().unwrap().to_owned();
        Self {
            process,
            address,
            dir: dir.into(),
        }
    }

    pub fn process(&mut self) -> &mut Process {
        self.process.as_mut().unwrap()
    }

    pub fn ram_file(&self) -> PathBuf {
        self.dir.join("ram.ram")
    }

    pub fn ram(&self) -> Vec<u8> {
        fs::read(self.ram_file()).unwrap()
    }

    /// Memory is arriving.
    pub fn wait_begun(&self) {
        until("memory arrives", || {
            let arrived = fs::read(self.ram_file()).ok()?;
            arrived.iter().any(|byte| *byte != 0).then_some(())
        });
    }

    pub fn wait_end(&mut self) -> Ended {
        self.process.take().unwrap().end()
    }
}

pub fn assert_same(here: &[u8], there: &[u8]) {
    assert_eq!(here.len(), there.len(), "length");
    let differing: Vec<_> = here
        .chunks(4096)
        .zip(there.chunks(4096))
        .enumerate()
        .filter(|(_, (a, b))| a != b)
        .map(|(page, _)| page)
        .collect();
    assert!(differing.is_empty(), "pages differ: {differing:?}");
}

/// Said even when the test passes.
pub fn say(line: &str) {
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// That an object has keys.
pub fn assert_keys(object: &Value, keys: &[&str]) {
    for key in keys {
        assert!(object.get(key).is_some(), "no {key} in {object}");
    }
}

/// The least keys of `send`.
pub const SEND: [&str; 9] = [
    "status",
    "reason",
    "rounds",
    "pages_sent",
    "zero_pages",
    "bytes_on_wire",
    "total_ms",
    "downtime_ms",
    "transactions",
];

/// The least keys of `receive`.
pub const RECEIVE: [&str; 5] = ["status", "reason", "blocks", "pages", "zero_pages"];
