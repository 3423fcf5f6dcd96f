//! Where the guest is, told to whoever watches, and the hooks that tell.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Hooks;
use crate::gate::StoppedVcpus;

/// Where the guest is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum GuestState {
    /// It runs here.
    #[default]
    Running,
    /// It stands still here.
    Stopped,
    /// It runs elsewhere.
    Away,
}

type Told = Box<dyn Fn(GuestState) + Send>;

/// Watches the guest of a service. Clones watch the same.
#[derive(Clone, Default)]
pub struct GuestWatch(Arc<Mutex<Watched>>);

#[derive(Default)]
struct Watched {
    state: GuestState,
    told: Vec<Told>,
}

impl fmt::Debug for GuestWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("GuestWatch").field(&self.state()).finish()
    }
}

impl GuestWatch {
    fn lock(&self) -> MutexGuard<'_, Watched> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the guest is.
    #[must_use]
    pub fn state(&self) -> GuestState {
        self.lock().state
    }

    /// Tells of each change from now on. `told` must not come back here.
    pub fn tell(&self, told: impl Fn(GuestState) + Send + 'static) {
        self.lock().told.push(Box::new(told));
    }

    /// Under the lock, so that all hear changes in their order.
    fn becomes(&self, state: GuestState) {
        let mut watched = self.lock();
        if std::mem::replace(&mut watched.state, state) != state {
            for told in &watched.told {
                told(state);
            }
        }
    }
}

/// Makes the VMM's hooks for each who stops the guest, so that all who watch hear of it.
#[derive(Clone)]
pub(crate) struct HooksMaker {
    make: Arc<Mutex<dyn FnMut() -> Box<dyn Hooks> + Send>>,
    watch: GuestWatch,
}

impl fmt::Debug for HooksMaker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HooksMaker")
    }
}

impl HooksMaker {
    pub(crate) fn new(
        make: impl FnMut() -> Box<dyn Hooks> + Send + 'static,
        watch: &GuestWatch,
    ) -> Self {
        Self {
            make: Arc::new(Mutex::new(make)),
            watch: watch.clone(),
        }
    }

    pub(crate) fn make(&self) -> Box<dyn Hooks> {
        let mut make = self.make.lock().unwrap_or_else(PoisonError::into_inner);
        Box::new(Telling {
            hooks: make(),
            watch: self.watch.clone(),
        })
    }
}

/// The VMM's hooks, and what they mean for who watches.
struct Telling {
    hooks: Box<dyn Hooks>,
    watch: GuestWatch,
}

impl Hooks for Telling {
    fn pause_devices(&mut self) -> Result<(), String> {
        self.hooks.pause_devices()?;
        self.watch.becomes(GuestState::Stopped);
        Ok(())
    }

    fn save(&mut self, stopped: &StoppedVcpus) -> Result<Vec<u8>, String> {
        self.hooks.save(stopped)
    }

    fn resume(&mut self) {
        self.hooks.resume();
        self.watch.becomes(GuestState::Running);
    }

    fn migrated_away(&mut self) {
        self.hooks.migrated_away();
        self.watch.becomes(GuestState::Away);
    }
}
