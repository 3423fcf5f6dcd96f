//! Limits that may change while a migration runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What a migration may take, of downtime and of the link. Clones share it: who keeps one can change it while the migration
/// runs. A decision that was made stays; the next frame and the next round go by what holds then.
///
/// ```
/// use gleaner_migrate::{MigrationId, SenderOptions};
/// use std::time::Duration;
/// let options = SenderOptions::new(MigrationId::random()?);
/// let tuning = options.tuning.clone();
/// assert_eq!(tuning.downtime_limit(), Duration::from_millis(300));
/// tuning.limit_bandwidth(Some(100 << 20));
/// assert_eq!(options.tuning.bandwidth_limit(), Some(100 << 20));
/// # Ok::<(), gleaner_migrate::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Tuning(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Nanoseconds.
    downtime: AtomicU64,
    /// Bytes a second; 0 is no limit.
    bandwidth: AtomicU64,
}

impl Default for Tuning {
    /// 300 ms of downtime, all of the link.
    fn default() -> Self {
        let tuning = Self(Arc::new(Shared {
            downtime: AtomicU64::new(0),
            bandwidth: AtomicU64::new(0),
        }));
        tuning.limit_downtime(Duration::from_millis(300));
        tuning
    }
}

impl Tuning {
    /// The most downtime that a switchover is begun with. 300 ms.
    #[must_use]
    pub fn downtime_limit(&self) -> Duration {
        Duration::from_nanos(self.0.downtime.load(Ordering::Relaxed))
    }

    /// Changes it. More than 584 years are as many.
    pub fn limit_downtime(&self, limit: Duration) {
        let nanos = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        self.0.downtime.store(nanos, Ordering::Relaxed);
    }

    /// The most bytes of page contents a second, all connections together. No limit.
    #[must_use]
    pub fn bandwidth_limit(&self) -> Option<u64> {
        Some(self.0.bandwidth.load(Ordering::Relaxed)).filter(|limit| *limit > 0)
    }

    /// Changes it. 0 is no limit either.
    pub fn limit_bandwidth(&self, limit: Option<u64>) {
        self.0
            .bandwidth
            .store(limit.unwrap_or(0), Ordering::Relaxed);
    }
}
