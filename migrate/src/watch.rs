//! What is looked at while a round is under way.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::Clock;

/// How far a round is.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Tick {
    /// Its number, from 1.
    pub round: u32,
    /// Pages of it that are still to be sent.
    pub left_pages: u64,
    /// Pages sent a second, those of zeros included, since it began.
    pub pages_per_second: f64,
    /// Pages sent with their contents since the migration began.
    pub pages_sent: u64,
    /// Pages of zeros since then.
    pub zero_pages: u64,
    /// Bytes written to the stream since then.
    pub bytes_on_wire: u64,
}

/// What a migration has sent so far, over all connections. Clones share it.
#[derive(Clone, Default)]
pub(crate) struct Totals(Arc<Sums>);

#[derive(Default)]
struct Sums {
    pages: AtomicU64,
    zeros: AtomicU64,
    bytes: AtomicU64,
}

impl Totals {
    /// So much more was sent.
    pub(crate) fn add(&self, pages: u64, zeros: u64, bytes: u64) {
        self.0.pages.fetch_add(pages, Ordering::Relaxed);
        self.0.zeros.fetch_add(zeros, Ordering::Relaxed);
        self.0.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Told how far a round is.
pub type OnTick = Box<dyn FnMut(&Tick) + Send>;

/// Between two ticks, at least.
const PERIOD: Duration = Duration::from_millis(100);

/// Watches the rounds with the guest running.
pub(crate) struct Watch {
    clock: Clock,
    /// When the guest is to be stopped, whatever is left.
    end: Option<Instant>,
    totals: Totals,
    on_tick: Option<OnTick>,
    round: u32,
    began: Instant,
    told: Instant,
}

impl Watch {
    pub(crate) fn new(
        clock: Clock,
        end: Option<Instant>,
        totals: Totals,
        on_tick: Option<OnTick>,
    ) -> Self {
        let now = clock.now();
        Self {
            clock,
            end,
            totals,
            on_tick,
            round: 0,
            began: now,
            told: now,
        }
    }

    /// What it looks at.
    pub(crate) fn clock(&self) -> Clock {
        self.clock.clone()
    }

    /// A round begins.
    pub(crate) fn begin(&mut self) {
        self.round += 1;
        self.began = self.clock.now();
        self.told = self.began;
    }

    /// Whether no page is to be sent any more with the guest running.
    pub(crate) fn is_over(&self) -> bool {
        self.end.is_some_and(|end| self.clock.now() >= end)
    }

    /// So many pages have been taken for this round, and so many are left of it.
    pub(crate) fn tick(&mut self, taken: u64, left: u64) {
        let Some(on_tick) = &mut self.on_tick else {
            return;
        };
        if self.clock.since(self.told) < PERIOD {
            return;
        }
        self.told = self.clock.now();
        let seconds = self.clock.since(self.began).as_secs_f64();
        let sums = &self.totals.0;
        on_tick(&Tick {
            round: self.round,
            left_pages: left,
            pages_per_second: taken as f64 / seconds.max(1e-6),
            pages_sent: sums.pages.load(Ordering::Relaxed),
            zero_pages: sums.zeros.load(Ordering::Relaxed),
            bytes_on_wire: sums.bytes.load(Ordering::Relaxed),
        });
    }
}
