//! The reaper: empties the dirty rings before they are full, and at once when one is.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use gleaner_ring::{RingHandle, with_signals_blocked};

use super::{KvmLog, Shared};
use crate::gate::RingFull;
use crate::{Error, Result};

/// Longest and shortest time between two looks at the rings.
const SLOWEST: Duration = Duration::from_millis(100);
const FASTEST: Duration = Duration::from_millis(1);
/// Tries of a harvest that somebody waits for, and the time between two.
const ATTEMPTS: u32 = 5;
const RETRY: Duration = Duration::from_millis(20);
/// Fill (in thousandths) of the fullest ring above which it looks sooner, and below which it looks later.
const HIGH: u32 = 250;
const LOW: u32 = 100;

/// How vCPU threads and the reaper meet.
///
/// A request is a number; it is served when a harvest that began after it has ended. A vCPU waits for its number outside of
/// `KVM_RUN` and without the VM-wide lock, so whoever holds that lock can close the gate.
#[derive(Debug, Default)]
pub(super) struct Reaper {
    desk: Mutex<Desk>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Desk {
    requested: u64,
    served: u64,
    /// Why the last harvest failed.
    failed: Option<String>,
    shutdown: bool,
}

impl Reaper {
    fn lock(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn shutdown(&self) {
        self.lock().shutdown = true;
        self.changed.notify_all();
    }

    /// Waits for a request, or for `patience`; `None` when it is over, else the newest request.
    fn next(&self, patience: Duration) -> Option<u64> {
        let mut desk = self.lock();
        if desk.requested == desk.served && !desk.shutdown {
            desk = self
                .changed
                .wait_timeout(desk, patience)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        (!desk.shutdown).then_some(desk.requested)
    }

    fn serve(&self, request: u64, outcome: Result<()>) {
        let mut desk = self.lock();
        // An idle look serves nobody: its outcome must not be taken for that of a request.
        if request != desk.served {
            desk.served = request;
            desk.failed = outcome.err().map(|e| e.to_string());
        }
        self.changed.notify_all();
    }
}

/// One vCPU's way to the reaper.
pub(super) struct RingRequest {
    reaper: Arc<Reaper>,
    handle: Arc<RingHandle>,
}

impl RingRequest {
    pub(super) const fn new(reaper: Arc<Reaper>, handle: Arc<RingHandle>) -> Self {
        Self { reaper, handle }
    }
}

impl RingFull for RingRequest {
    fn empty(&self) -> Result<()> {
        self.handle.set_full();
        let mut desk = self.reaper.lock();
        desk.requested += 1;
        let mine = desk.requested;
        self.reaper.changed.notify_all();
        while desk.served < mine && !desk.shutdown {
            desk = self
                .reaper
                .changed
                .wait(desk)
                .unwrap_or_else(PoisonError::into_inner);
        }
        match &desk.failed {
            Some(reason) => Err(Error::Reaper {
                reason: reason.clone(),
            }),
            None => Ok(()),
        }
    }
}

/// Starts the reaper's thread. It ends with the tracker, and takes no signal.
pub(super) fn start(shared: &Arc<Shared>) -> Result<()> {
    let reaper = Arc::clone(&shared.reaper);
    let tracker = Arc::downgrade(shared);
    std::thread::Builder::new()
        .name("gleaner-reaper".into())
        .spawn(move || {
            let outcome = with_signals_blocked(|| run(&reaper, &tracker));
            if let Err(error) = outcome {
                reaper.serve(u64::MAX, Err(error.into()));
            }
        })
        .map(|_| ())
        .map_err(|source| Error::Thread {
            name: "gleaner-reaper",
            source,
        })
}

fn run(reaper: &Reaper, tracker: &Weak<Shared>) {
    let mut patience = SLOWEST;
    while let Some(request) = reaper.next(patience) {
        let Some(shared) = tracker.upgrade() else {
            return;
        };
        let mut outcome = shared.reap(&mut shared.lock());
        for _ in 1..ATTEMPTS {
            let Err(error) = &outcome else { break };
            // Pages are held back, not lost, and what failed may pass: a vCPU must not end for it.
            tracing::warn!(%error, "dirty rings could not be emptied, trying again");
            std::thread::sleep(RETRY);
            outcome = shared.reap(&mut shared.lock());
        }
        if let Err(error) = &outcome {
            tracing::error!(%error, "dirty rings could not be emptied");
        }
        let state = shared.lock();
        let fill = match &state.log {
            KvmLog::Ring(ring) => ring.fill(),
            KvmLog::Bitmap(_) => 0,
        };
        drop(state);
        reaper.serve(request, outcome);
        patience = match fill {
            HIGH.. => (patience / 2).max(FASTEST),
            LOW.. => patience,
            _ => (patience * 2).min(SLOWEST),
        };
    }
}
