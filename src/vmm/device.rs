//! A device of the VMM's own: it writes guest memory, which no log of KVM's has.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use gleaner_bitmap::PAGE_SIZE;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, VolatileMemory};

use super::machine::Parts;
use crate::Block;

/// Time between two bursts.
const PAUSE: Duration = Duration::from_millis(1);
/// Pages written in a burst.
const BURST: u64 = 8;

/// What the device would lose if it did not travel.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct DeviceState {
    random: u64,
    written: u64,
}

impl DeviceState {
    /// A device that has written nothing.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self {
            random: seed | 1,
            written: 0,
        }
    }

    fn next(&mut self, below: u64) -> u64 {
        // xorshift64: any non-zero state will do.
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below.max(1)
    }
}

/// The device's thread. Dropping it ends the thread.
pub(super) struct Device {
    state: Arc<Mutex<DeviceState>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Device {
    pub(super) fn spawn(parts: &Arc<Parts>, state: DeviceState) -> io::Result<Self> {
        let state = Arc::new(Mutex::new(state));
        let stop = Arc::new(AtomicBool::new(false));
        let (parts, shared, ended) = (Arc::clone(parts), Arc::clone(&state), Arc::clone(&stop));
        let thread = std::thread::Builder::new()
            .name("device".into())
            .spawn(move || {
                let _watch = parts.board.watch("device".into());
                while !ended.load(Ordering::Relaxed) {
                    if let Err(reason) = burst(&parts, &shared) {
                        parts.board.fail(format!("device: {reason}"));
                        return;
                    }
                    std::thread::park_timeout(PAUSE);
                }
            })?;
        Ok(Self {
            state,
            stop,
            thread: Some(thread),
        })
    }

    pub(super) fn shared(&self) -> Arc<Mutex<DeviceState>> {
        Arc::clone(&self.state)
    }
}

/// Writes some pages: in the RAM's device area, and in every block that was plugged in.
fn burst(parts: &Parts, state: &Mutex<DeviceState>) -> Result<(), String> {
    let Some(_writing) = parts.tracker.writers().try_enter() else {
        return Ok(());
    };
    let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
    let area = parts.map.device_area();
    for _ in 0..BURST {
        let page = area.first + state.next(area.pages);
        write(&parts.ram, page, &mut state)?;
    }
    let layout = parts.tracker.layout();
    for info in layout.blocks().filter(|b| b.id != parts.ram.id()) {
        if let Some(block) = parts.tracker.block(info.id) {
            let page = state.next(info.pages);
            write(&block, page, &mut state)?;
        }
    }
    Ok(())
}

fn write(block: &Block, page: u64, state: &mut DeviceState) -> Result<(), String> {
    state.written = state.written.wrapping_add(1);
    let at = page * PAGE_SIZE + state.next(PAGE_SIZE / 8) * 8;
    let at = usize::try_from(at).map_err(|e| e.to_string())?;
    let memory = block.memory().as_volatile_slice();
    memory
        .write_obj(state.written, at)
        .map_err(|e| e.to_string())
}

impl Drop for Device {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}
