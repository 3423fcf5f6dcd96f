//! A vCPU's thread.

use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::backend::{Exit, MachineVcpu};
use super::guest::{GuestEvent, Mailbox, emulate_read, emulate_write};
use super::machine::{MachineError, Parts};
use crate::gate::{Seat, Turn};

/// How long an idle guest sleeps between two looks into its mailbox.
const IDLE: Duration = Duration::from_millis(10);
/// Longest pause for the write rate.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Starts the thread, and waits until it has its seat: a vCPU that can't run is found before the source lets go of the
/// guest. It runs when the guest is let go, and ends at the tracker's shutdown.
pub(super) fn spawn(
    parts: &Arc<Parts>,
    vcpu: MachineVcpu,
    index: usize,
) -> Result<JoinHandle<()>, MachineError> {
    let (seated, result) = mpsc::sync_channel(1);
    let parts = Arc::clone(parts);
    let thread = std::thread::Builder::new()
        .name(format!("vcpu{index}"))
        .spawn(move || {
            let _watch = parts.board.watch(format!("vCPU {index}"));
            match parts.tracker.register(&vcpu, index as u64) {
                Ok(seat) => {
                    // Whoever started this thread waits for it.
                    let _ = seated.send(Ok(()));
                    if let Err(error) = run(&parts, seat, vcpu, index) {
                        tracing::error!(%error, "vCPU failed");
                        parts.board.fail(error.to_string());
                    }
                }
                Err(error) => drop(seated.send(Err(error))),
            }
        })
        .map_err(MachineError::Thread)?;
    match result.recv() {
        Ok(Ok(())) => Ok(thread),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(MachineError::Vcpu {
            vcpu: index,
            reason: "its thread ended at once".into(),
        }),
    }
}

/// What an exit leaves to do once the exit itself, which borrows the vCPU, is over.
enum After {
    Nothing,
    Batch,
}

fn run(
    parts: &Parts,
    mut seat: Seat,
    mut vcpu: MachineVcpu,
    index: usize,
) -> Result<(), MachineError> {
    let mut pace = Pace::new();
    loop {
        let after = match seat.run(&mut vcpu)? {
            Turn::Exit(exit) => handle(parts, index, exit)?,
            Turn::Stopped(parked) => {
                // A batch that ends here needs no pacing.
                let drained = parked.complete_io(|exit| handle(parts, index, exit).map(|_| ()))?;
                drained.serve(|vcpu| vcpu.save().map_err(|e| e.to_string()));
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

fn handle(parts: &Parts, index: usize, exit: Exit<'_>) -> Result<After, MachineError> {
    // The write and its mark are one to whoever waits for quiet.
    let _writing = parts.tracker.writers().enter();
    match exit {
        Exit::Out { port, data } => match GuestEvent::decode(port, data)? {
            GuestEvent::BatchDone => Ok(After::Batch),
            GuestEvent::Check(result) => {
                parts.board.checked(index, result);
                Ok(After::Nothing)
            }
        },
        // No slot is there now, or a read-only one: the access is carried out on the block itself.
        Exit::Load { gpa, data } => {
            emulate_read(&parts.memory(), &parts.map, gpa, data)?;
            Ok(After::Nothing)
        }
        Exit::Store { gpa, data } => {
            emulate_write(&parts.memory(), &parts.map, gpa, data)?;
            Ok(After::Nothing)
        }
        Exit::Unknown(exit) => Err(MachineError::Vcpu {
            vcpu: index,
            reason: format!("unexpected exit {exit:?}"),
        }),
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
    fn batch(&mut self, parts: &Parts, seat: &Seat, index: usize) -> Result<(), MachineError> {
        if parts.idle {
            seat.gate().pause(IDLE);
            return Ok(());
        }
        let Some(rate) = parts.write_rate else {
            return Ok(());
        };
        let share = (rate / parts.map.vcpus() as u64).max(1);
        let written = Mailbox::new(&parts.memory(), &parts.map, index)?.count()?;
        let before = *self.written_before.get_or_insert(written);
        // The count is the guest's: whatever it says, the pause is one that ends.
        let seconds = written.saturating_sub(before) as f64 / share as f64;
        let due = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        if let Some(left) = due.checked_sub(self.start.elapsed()) {
            seat.gate().pause(left.min(LONGEST_PAUSE));
        }
        Ok(())
    }
}
