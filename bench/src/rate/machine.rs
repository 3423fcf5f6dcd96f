//! A stock QEMU that runs a guest, what it says by QMP, and the CPU time it takes beside its vCPU.
#![allow(unsafe_code)] // no crate here reads another process's CPU clock

use std::io::{BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::de::{IoRead, StreamDeserializer};
use serde_json::{Value, json};

use super::scattered::QEMU;
use crate::Result;

/// One that runs; killed when it goes out of scope.
pub struct Qemu {
    child: Child,
    to: UnixStream,
    from: StreamDeserializer<'static, IoRead<BufReader<UnixStream>>, Value>,
}

impl Qemu {
    pub fn is_there() -> bool {
        Command::new(QEMU).arg("--version").output().is_ok()
    }

    pub fn start(arguments: &[String]) -> Result<Self> {
        let (to, far) = UnixStream::pair()?;
        to.set_read_timeout(Some(Duration::from_secs(60)))?;
        let from = BufReader::new(to.try_clone()?);
        let child = Command::new(QEMU)
            .args(arguments)
            .args(["-qmp", "stdio"])
            .stdin(Stdio::from(OwnedFd::from(far.try_clone()?)))
            .stdout(Stdio::from(OwnedFd::from(far)))
            .stderr(Stdio::null())
            .spawn()?;
        let mut qemu = Self {
            child,
            to,
            from: serde_json::Deserializer::from_reader(from).into_iter(),
        };
        qemu.from.next().ok_or("a QEMU ended early")??;
        qemu.execute("qmp_capabilities", &json!({}))?;
        Ok(qemu)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What a command returns.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.to.write_all(request.to_string().as_bytes())?;
        loop {
            let mut said = self.from.next().ok_or("a QEMU ended early")??;
            if said.get("return").is_some() {
                return Ok(said["return"].take());
            }
            if said.get("error").is_some() {
                return Err(format!("{command}: {said}").into());
            }
        }
    }

    /// CPU time of threads that have ended: what samples is one of its own, each time.
    pub fn ended_threads(&self) -> Result<Duration> {
        let mut clock = 0;
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let pid = libc::pid_t::try_from(self.pid())?;
        // SAFETY: both write to what they are given, which outlives the calls.
        let failed = unsafe {
            libc::clock_getcpuclockid(pid, &raw mut clock) != 0
                || libc::clock_gettime(clock, &raw mut time) != 0
        };
        if failed {
            return Err("a QEMU's CPU clock can't be read".into());
        }
        let seconds = Duration::from_secs(time.tv_sec.unsigned_abs());
        let all = seconds + Duration::from_nanos(time.tv_nsec.unsigned_abs());
        let mut alive = Duration::ZERO;
        for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
            // One may have ended meanwhile.
            if let Ok(told) = std::fs::read_to_string(entry?.path().join("schedstat")) {
                let spent = told.split(' ').next().unwrap_or_default().parse()?;
                alive += Duration::from_nanos(spent);
            }
        }
        // The vCPU has run on between the two.
        Ok(all.saturating_sub(alive))
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
