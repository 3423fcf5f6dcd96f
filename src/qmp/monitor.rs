//! What the commands of all clients share.

use std::fmt;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

use gleaner_migrate::CancelToken;

use super::QmpOptions;
use super::clients::Clients;
use super::limit::Limits;
use super::migration::Migration;
use super::rate::Rate;
use super::run::Pause;
use super::settings::Settings;
use crate::service::{GuestState, GuestWatch, HooksMaker, Service};
use crate::{Error, Result, Tracker};

/// Invariants: who holds several of these locks takes them in this order; `clients` comes last of all, for events are told
/// under any.
pub(super) struct Monitor {
    pub(super) tracker: Tracker,
    pub(super) hooks: HooksMaker,
    pub(super) watch: GuestWatch,
    pub(super) options: QmpOptions,
    /// A guest that a client has stopped.
    pub(super) paused: Mutex<Option<Pause>>,
    pub(super) settings: Mutex<Settings>,
    pub(super) migration: Mutex<Migration>,
    pub(super) rate: Mutex<Rate>,
    pub(super) limits: Mutex<Limits>,
    pub(super) clients: Clients,
    /// A client has said quit.
    pub(super) quitting: AtomicBool,
    pub(super) ended: CancelToken,
    /// Wakes who sleeps here.
    ending: (Mutex<bool>, Condvar),
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl fmt::Debug for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Monitor").finish_non_exhaustive()
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Monitor {
    pub(super) fn new(service: &Service, options: QmpOptions) -> Arc<Self> {
        let monitor = Arc::new(Self {
            tracker: service.tracker().clone(),
            hooks: service.hooks().clone(),
            watch: service.watch().clone(),
            options,
            paused: Mutex::default(),
            settings: Mutex::default(),
            migration: Mutex::default(),
            rate: Mutex::default(),
            limits: Mutex::default(),
            clients: Clients::default(),
            quitting: AtomicBool::new(false),
            ended: CancelToken::new(),
            ending: (Mutex::default(), Condvar::new()),
            threads: Mutex::default(),
        });
        let told = Arc::downgrade(&monitor);
        monitor.watch.tell(move |state| told_of(&told, state));
        monitor
    }

    /// Does something on a thread of its own, which [`Monitor::end`] waits for.
    pub(super) fn spawn(
        self: &Arc<Self>,
        name: &'static str,
        run: impl FnOnce(&Arc<Self>) + Send + 'static,
    ) -> Result<()> {
        let monitor = Arc::clone(self);
        let thread = std::thread::Builder::new()
            .name(name.into())
            .spawn(move || run(&monitor))
            .map_err(|source| Error::Thread { name, source })?;
        let mut threads = lock(&self.threads);
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
        Ok(())
    }

    /// Sleeps until then, or until everything ends: whether it does.
    pub(super) fn sleep_until(&self, until: Instant) -> bool {
        let (over, changed) = &self.ending;
        let left = until.saturating_duration_since(Instant::now());
        let waited = changed.wait_timeout_while(lock(over), left, |over| !*over);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Ends everything that clients have begun. They are gone by now.
    pub(super) fn end(&self) {
        *lock(&self.ending.0) = true;
        self.ending.1.notify_all();
        lock(&self.migration).cancel();
        let threads = std::mem::take(&mut *lock(&self.threads));
        for thread in threads {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
        // The guest goes on, at full speed.
        lock(&self.limits).lift();
        if let Some(pause) = lock(&self.paused).take() {
            pause.resume();
        }
    }
}

/// Whoever stopped the guest, or let it go on.
fn told_of(monitor: &Weak<Monitor>, state: GuestState) {
    let Some(monitor) = monitor.upgrade() else {
        return;
    };
    match state {
        GuestState::Running => monitor.clients.event("RESUME", None),
        GuestState::Stopped => monitor.clients.event("STOP", None),
        GuestState::Away => {}
    }
}
