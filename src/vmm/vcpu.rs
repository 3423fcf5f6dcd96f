//! A vCPU's thread.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuExit, VcpuFd};

use super::guest::{GuestEvent, VcpuState, emulate_read, emulate_write};
use super::machine::Parts;
use crate::gate::{Seat, Turn};

/// How long an idle guest sleeps between two looks into its mailbox.
const IDLE: Duration = Duration::from_millis(10);

/// Starts the thread. It runs when the guest is let go, and ends at the tracker's shutdown.
pub(super) fn spawn(parts: Arc<Parts>, vcpu: VcpuFd, index: usize) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(format!("vcpu{index}"))
        .spawn(move || {
            if let Err(reason) = run(&parts, vcpu, index) {
                tracing::error!(vcpu = index, reason, "vCPU failed");
                parts.board.fail(format!("vCPU {index}: {reason}"));
            }
        })
}

/// What an exit leaves to do once the exit itself, which borrows the vCPU, is over.
enum After {
    Nothing,
    Batch,
}

fn run(parts: &Parts, mut vcpu: VcpuFd, index: usize) -> Result<(), String> {
    let text = |e: &dyn std::error::Error| e.to_string();
    let mut seat = parts
        .tracker
        .register(&vcpu, index as u64)
        .map_err(|e| text(&e))?;
    let mut pace = Pace::new();
    loop {
        let after = match seat.run(&mut vcpu).map_err(|e| text(&e))? {
            Turn::Exit(exit) => handle(parts, index, exit)?,
            Turn::Stopped(mut parked) => {
                while let Some(exit) = parked.complete_io().map_err(|e| text(&e))? {
                    handle(parts, index, exit)?;
                }
                parked.serve(|vcpu| {
                    VcpuState::save(&parts.kvm, vcpu)
                        .and_then(|state| state.to_bytes())
                        .map_err(|e| e.to_string())
                });
                pace = Pace::new();
                After::Nothing
            }
            Turn::Shutdown => return Ok(()),
        };
        if let After::Batch = after {
            pace.batch(parts, &seat, index)?;
        }
    }
}

fn handle(parts: &Parts, index: usize, exit: VcpuExit<'_>) -> Result<After, String> {
    // The write and its mark are one to whoever waits for quiet.
    let _writing = parts.tracker.writers().enter();
    match exit {
        VcpuExit::IoOut(port, data) => {
            match GuestEvent::decode(port, data).map_err(|e| e.to_string())? {
                GuestEvent::BatchDone => Ok(After::Batch),
                GuestEvent::Check(result) => {
                    parts.board.checked(index, result);
                    Ok(After::Nothing)
                }
            }
        }
        // No slot is there now, or a read-only one: the access is carried out on the block itself.
        VcpuExit::MmioRead(gpa, data) => {
            emulate_read(&parts.memory(), &parts.map, gpa, data).map_err(|e| e.to_string())?;
            Ok(After::Nothing)
        }
        VcpuExit::MmioWrite(gpa, data) => {
            emulate_write(&parts.memory(), &parts.map, gpa, data).map_err(|e| e.to_string())?;
            Ok(After::Nothing)
        }
        other => Err(format!("unexpected exit {other:?}")),
    }
}

/// Keeps a vCPU at its share of the write rate.
struct Pace {
    start: Instant,
    written_before: Option<u64>,
}

impl Pace {
    fn new() -> Self {
        Self {
            start: Instant::now(),
            written_before: None,
        }
    }

    /// After a batch: waits until the rate allows the next one.
    fn batch(&mut self, parts: &Parts, seat: &Seat, index: usize) -> Result<(), String> {
        if parts.idle {
            seat.gate().pause(IDLE);
            return Ok(());
        }
        let Some(rate) = parts.write_rate else {
            return Ok(());
        };
        let share = (rate / parts.map.vcpus() as u64).max(1);
        let mailbox = super::guest::Mailbox::new(&parts.memory(), &parts.map, index)
            .map_err(|e| e.to_string())?;
        let written = mailbox.count().map_err(|e| e.to_string())?;
        let before = *self.written_before.get_or_insert(written);
        let due = self.start + Duration::from_secs_f64((written - before) as f64 / share as f64);
        if let Some(left) = due.checked_duration_since(Instant::now()) {
            seat.gate().pause(left);
        }
        Ok(())
    }
}
