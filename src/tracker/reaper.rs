//! The reaper: empties the dirty rings before they are full, and at once when one is.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use gleaner_ring::{RingHandle, with_signals_blocked};

use super::pace::{Look, Pace, SLOWEST};
use super::{KvmLog, Shared, State};
use crate::gate::RingFull;
use crate::{Error, Result};

/// Tries of a harvest that somebody waits for, and the time between two.
const ATTEMPTS: u32 = 5;
const RETRY: Duration = Duration::from_millis(20);

/// How vCPU threads and the reaper meet.
///
/// A request is a number; it is served when a harvest that began after it has ended. A vCPU waits for its number outside of
/// `KVM_RUN` and without the VM-wide lock, so whoever holds that lock can close the gate.
#[derive(Debug, Default)]
pub(super) struct Reaper {
    desk: Mutex<Desk>,
    changed: Condvar,
    /// Times that a vCPU came with a full ring.
    full: AtomicU64,
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

    pub(super) fn full_exits(&self) -> u64 {
        self.full.load(Ordering::Relaxed)
    }

    /// Waits for a request, or for `patience`; `None` when it is over, else the newest request and whether it waits.
    fn next(&self, patience: Duration) -> Option<(u64, bool)> {
        let mut desk = self.lock();
        if desk.requested == desk.served && !desk.shutdown {
            desk = self
                .changed
                .wait_timeout(desk, patience)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        let asked = desk.requested != desk.served;
        (!desk.shutdown).then_some((desk.requested, asked))
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
        self.reaper.full.fetch_add(1, Ordering::Relaxed);
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
    let mut pace = Pace::default();
    let mut patience = SLOWEST;
    let mut last = Instant::now();
    while let Some((request, asked)) = reaper.next(patience) {
        let Some(shared) = tracker.upgrade() else {
            return;
        };
        let mut state = shared.lock();
        let since = last.elapsed();
        last = Instant::now();
        // Who may dirty only so much is counted by what its ring says, and a page that is not armed again says nothing.
        let asked = asked || shared.throttled.load(Ordering::SeqCst);
        let look = look(&mut pace, &state, since, asked);
        patience = look.patience;
        if !look.empty {
            continue;
        }
        let mut outcome = shared.reap(&mut state);
        drop(state);
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
        reaper.serve(request, outcome);
    }
}

fn look(pace: &mut Pace, state: &State, since: Duration, asked: bool) -> Look {
    match &state.log {
        KvmLog::Ring(ring) => pace.look(since, asked, ring.levels()),
        KvmLog::Bitmap(_) => pace.look(since, asked, std::iter::empty()),
    }
}
