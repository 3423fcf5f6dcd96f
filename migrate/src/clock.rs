//! Time as a migration sees it: real, or virtual for tests and simulations.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Tells the time that deadlines, pacing, silence and reports are reckoned by. Clones share one time.
#[derive(Clone, Debug, Default)]
pub struct Clock(Option<Arc<Virtual>>);

#[derive(Debug)]
struct Virtual {
    start: Instant,
    nanos: AtomicU64,
}

impl Clock {
    /// The time of the system.
    #[must_use]
    pub const fn real() -> Self {
        Self(None)
    }

    /// A time that stands still unless somebody calls [`Clock::sleep`]. For a [`MemoryWire`](crate::MemoryWire): a
    /// stream moves in real time.
    #[must_use]
    pub fn stopped() -> Self {
        Self(Some(Arc::new(Virtual {
            start: Instant::now(),
            nanos: AtomicU64::new(0),
        })))
    }

    /// The time now.
    #[must_use]
    pub fn now(&self) -> Instant {
        self.0.as_ref().map_or_else(Instant::now, |time| {
            time.start + Duration::from_nanos(time.nanos.load(Ordering::Relaxed))
        })
    }

    /// The time that has passed since `moment`; none if that is still to come.
    #[must_use]
    pub fn since(&self, moment: Instant) -> Duration {
        self.now().saturating_duration_since(moment)
    }

    /// The time left until `moment`; none if that is over.
    #[must_use]
    pub fn until(&self, moment: Instant) -> Duration {
        moment.saturating_duration_since(self.now())
    }

    /// Lets time pass. Virtual time is that much later at once, by at most 584 years in all.
    pub fn sleep(&self, time: Duration) {
        let Some(shared) = &self.0 else {
            return std::thread::sleep(time);
        };
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let later = |now: u64| Some(now.saturating_add(nanos));
        let _ = shared
            .nanos
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, later);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtual_time_is_shared_and_passes_only_when_it_is_told_to() {
        let clock = Clock::stopped();
        let start = clock.now();
        let end = start + Duration::from_secs(90);
        assert_eq!(clock.since(start), Duration::ZERO);
        clock.clone().sleep(Duration::from_secs(60));
        assert_eq!(clock.since(start), Duration::from_secs(60));
        assert_eq!(clock.until(end), Duration::from_secs(30));
        clock.sleep(Duration::MAX);
        assert_eq!(clock.until(end), Duration::ZERO);
    }
}
