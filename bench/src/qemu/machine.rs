//! A stock QEMU with one RAM block and nothing else, and what it says by QMP.

use std::fs::File;
use std::io::{BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use gleaner_bitmap::PAGE_SIZE;
use gleaner_migrate::{Address, MappedMemory, MultifdSync, PageMemory};
use serde_json::de::{IoRead, StreamDeserializer};
use serde_json::{Value, json};

use crate::Result;
use crate::wire::line::{Kind, Line};

pub const QEMU: &str = "qemu-system-x86_64";
/// One that has said nothing for so long is stuck.
const SILENT: Duration = Duration::from_secs(120);

/// Whether there is one.
pub fn is_there() -> bool {
    Command::new(QEMU).arg("--version").output().is_ok()
}

/// Memory in a memfd, every page of which exists, so that a QEMU can have it for its RAM.
pub struct Ram {
    file: File,
    pub memory: Arc<MappedMemory>,
}

impl Ram {
    pub fn new(pages: u64) -> Result<Self> {
        let fd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC)?;
        let file = File::from(fd);
        file.set_len(pages * PAGE_SIZE)?;
        let memory = MappedMemory::of_file(file.try_clone()?, pages)?;
        crate::wire::memory::clear(&memory)?;
        Ok(Self {
            file,
            memory: Arc::new(memory),
        })
    }
}

/// One that runs; killed when it goes out of scope.
pub struct Qemu {
    child: Child,
    to: UnixStream,
    from: StreamDeserializer<'static, IoRead<BufReader<UnixStream>>, Value>,
    /// Which full sync of multifd it knows.
    pub sync: MultifdSync,
    /// How its migration stands, as it said last.
    status: String,
}

impl Qemu {
    /// Starts one whose RAM is `ram`, all of it mapped, with arguments about the migration, and lets it migrate over as
    /// many channels as `line` has.
    pub fn start(ram: &Ram, line: Line, more: &[&str]) -> Result<Self> {
        let size = ram.memory.pages() * PAGE_SIZE;
        let (pid, fd) = (std::process::id(), ram.file.as_raw_fd());
        let object = format!(
            "memory-backend-file,id=ram,size={size},mem-path=/proc/{pid}/fd/{fd},share=on,prealloc=on"
        );
        let (to, far) = UnixStream::pair()?;
        to.set_read_timeout(Some(SILENT))?;
        let from = BufReader::new(to.try_clone()?);
        let child = Command::new(QEMU)
            .args(["-machine", "none,memory-backend=ram", "-object", &object])
            .args(["-accel", "tcg", "-nodefaults", "-display", "none", "-S"])
            .args(["-qmp", "stdio"])
            .args(more)
            .stdin(Stdio::from(OwnedFd::from(far.try_clone()?)))
            .stdout(Stdio::from(OwnedFd::from(far)))
            .spawn()?;
        let mut qemu = Self {
            child,
            to,
            from: serde_json::Deserializer::from_reader(from).into_iter(),
            sync: MultifdSync::Section,
            status: String::new(),
        };
        let version = &qemu.next()?["QMP"]["version"]["qemu"];
        if (version["major"].as_u64(), version["minor"].as_u64()) >= (Some(8), Some(1)) {
            qemu.sync = MultifdSync::Flush;
        }
        qemu.execute("qmp_capabilities", json!({}))?;
        let capabilities = json!([
            { "capability": "events", "state": true },
            { "capability": "multifd", "state": line.channels > 1 },
        ]);
        let capabilities = json!({ "capabilities": capabilities });
        qemu.execute("migrate-set-capabilities", capabilities)?;
        let channels = json!({ "multifd-channels": line.channels });
        qemu.execute("migrate-set-parameters", channels)?;
        Ok(qemu)
    }

    fn next(&mut self) -> Result<Value> {
        let said = self.from.next();
        let said = said.ok_or("a QEMU ended early: its standard error says why")??;
        if said["event"] == "MIGRATION" {
            let status = said["data"]["status"].as_str();
            status.unwrap_or_default().clone_into(&mut self.status);
        }
        Ok(said)
    }

    /// What a command returns.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.to.write_all(request.to_string().as_bytes())?;
        loop {
            let mut said = self.next()?;
            if said.get("return").is_some() {
                return Ok(said["return"].take());
            }
            if said.get("error").is_some() {
                return Err(format!("{command}: {said}").into());
            }
        }
    }

    /// Lets it listen for a migration; the address.
    pub fn listen(&mut self, kind: Kind, dir: &std::path::Path) -> Result<Address> {
        let address = match kind {
            Kind::Unix => Address::Unix(dir.join("incoming")),
            Kind::Tcp => "tcp:127.0.0.1:0".parse()?,
        };
        let uri = json!({ "uri": address.to_string() });
        self.execute("migrate-incoming", uri)?;
        if kind == Kind::Unix {
            return Ok(address);
        }
        let said = self.execute("query-migrate", json!({}))?;
        let port = said["socket-address"][0]["port"].as_str();
        let port = port.ok_or("a QEMU does not tell where it listens")?;
        Ok(format!("tcp:127.0.0.1:{port}").parse()?)
    }

    /// Waits until its migration is over.
    pub fn completed(&mut self) -> Result<()> {
        loop {
            match self.status.as_str() {
                "completed" => return Ok(()),
                "failed" => return Err("a QEMU's migration failed".into()),
                _ => drop(self.next()?),
            }
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
