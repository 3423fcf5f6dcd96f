//! Throttling: the guest slowed by somebody who holds on to it.
//!
//! A thread orders rests, which the gate enforces. It lives as long as the [`Throttling`] does, and nobody waits for it: it
//! orders nothing after its [`Throttling`] has changed its mind or gone.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use gleaner_migrate::{Throttle, Throttles};
use gleaner_ring::Mode;

use super::allowance::Allowances;
use super::{KvmLog, Shared, Tracker};
use crate::gate::Gate;
use crate::{Error, Result};

/// How long a vCPU runs between two rests at least, and between two looks at what it has dirtied.
pub(super) const SLICE: Duration = Duration::from_millis(10);

/// The guest runs at less than full speed, until this is dropped. A vCPU sleeps outside of `KVM_RUN`: neither a slot
/// transaction nor a stop waits for it. A stop also wakes it.
#[must_use = "dropping it brings full speed back"]
pub struct Throttling {
    desk: Arc<Desk>,
    tracker: Tracker,
}

impl std::fmt::Debug for Throttling {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.desk.lock().fmt(f)
    }
}

/// How a [`Throttling`] and its thread meet.
#[derive(Debug)]
struct Desk {
    order: Mutex<Order>,
    changed: Condvar,
}

#[derive(Clone, Debug)]
struct Order {
    throttle: Slowing,
    /// Grows with each change.
    number: u64,
    ended: bool,
}

/// What slows the guest.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Slowing {
    Off,
    /// All vCPUs rest so much of their time.
    All {
        percent: u8,
    },
    /// Each vCPU may dirty so many pages a second.
    Each(NonZeroU64),
    /// These vCPUs may, the others what they like.
    These(BTreeMap<u64, NonZeroU64>),
}

impl From<Throttle> for Slowing {
    fn from(throttle: Throttle) -> Self {
        match throttle {
            Throttle::Off => Self::Off,
            Throttle::All { percent } => Self::All { percent },
            Throttle::Writers { pages_per_second } => Self::Each(pages_per_second),
        }
    }
}

impl Desk {
    const fn new(order: Order) -> Self {
        Self {
            order: Mutex::new(order),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the order, and wakes all who rest by the one before.
    fn change(&self, gate: &Gate, change: impl FnOnce(&mut Order)) {
        let mut order = self.lock();
        change(&mut order);
        order.number += 1;
        gate.wake();
        drop(order);
        self.changed.notify_all();
    }

    /// Changes what slows the guest. The same again changes nothing: were a rest to begin anew each time, who repeats
    /// himself would stop the guest.
    fn set(&self, gate: &Gate, throttle: Slowing) {
        if self.lock().throttle != throttle {
            self.change(gate, |order| order.throttle = throttle);
        }
    }

    /// Does what the order of this number led to, unless it has changed since.
    fn act(&self, number: u64, act: impl FnOnce()) {
        // Under the lock: no rest begins after whoever changes the order has woken all.
        let order = self.lock();
        if order.number == number {
            act();
        }
    }

    /// Waits for the next order, for `patience` at most if there is one.
    fn next(&self, number: u64, patience: Option<Duration>) -> Order {
        let same = |order: &mut Order| order.number == number;
        let order = self.lock();
        let order = match patience {
            None => self
                .changed
                .wait_while(order, same)
                .unwrap_or_else(PoisonError::into_inner),
            Some(patience) => {
                self.changed
                    .wait_timeout_while(order, patience, same)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0
            }
        };
        order.clone()
    }
}

impl Tracker {
    /// What can be slowed: only with dirty rings is it known who writes.
    #[must_use]
    pub fn throttles(&self) -> Throttles {
        match self.mode() {
            Mode::Ring { .. } => Throttles::Writers,
            Mode::Bitmap | Mode::BitmapClear => Throttles::All,
        }
    }

    /// How many pages each vCPU has dirtied so far, by its id; empty unless it is known who writes. A page counts again
    /// when it is written after a harvest.
    #[must_use]
    pub fn dirtied_by_vcpus(&self) -> Vec<(u64, u64)> {
        self.0.dirtied()
    }

    /// Slows the guest until what is returned is dropped.
    ///
    /// # Errors
    /// [`Error::AlreadyThrottled`]; [`Error::BadThrottle`] for a share out of range, or for more than
    /// [`Tracker::throttles`]; [`Error::Thread`].
    pub fn throttle(&self, throttle: Throttle) -> Result<Throttling> {
        self.check(throttle)?;
        self.slow(throttle.into())
    }

    /// Lets each of these vCPUs, by id, dirty so many pages a second at most, until what is returned is dropped. Pages
    /// count as in [`Throttle::Writers`]: somebody has to harvest, and a consumer to be there.
    ///
    /// # Errors
    /// [`Error::NoWriters`] unless dirty rings tell who writes; [`Error::AlreadyThrottled`]; [`Error::Thread`].
    pub fn limit(&self, limits: BTreeMap<u64, NonZeroU64>) -> Result<Throttling> {
        if self.throttles() != Throttles::Writers {
            return Err(Error::NoWriters);
        }
        self.slow(Slowing::These(limits))
    }

    fn slow(&self, throttle: Slowing) -> Result<Throttling> {
        if self.0.throttled.swap(true, Ordering::SeqCst) {
            return Err(Error::AlreadyThrottled);
        }
        let order = Order {
            throttle,
            number: 0,
            ended: false,
        };
        // Dropped on the error's path, it takes everything back.
        let throttling = Throttling {
            desk: Arc::new(Desk::new(order)),
            tracker: self.clone(),
        };
        let (desk, gate) = (Arc::clone(&throttling.desk), Arc::clone(&self.0.gate));
        let shared = Arc::downgrade(&self.0);
        std::thread::Builder::new()
            .name("gleaner-throttle".into())
            .spawn(move || run(&desk, &gate, &shared))
            .map_err(|source| Error::Thread {
                name: "gleaner-throttle",
                source,
            })?;
        Ok(throttling)
    }

    fn check(&self, throttle: Throttle) -> Result<()> {
        let possible = match throttle {
            Throttle::Off => true,
            Throttle::All { percent } => (1..=99).contains(&percent),
            Throttle::Writers { .. } => self.throttles() == Throttles::Writers,
        };
        if possible {
            Ok(())
        } else {
            Err(Error::BadThrottle { throttle })
        }
    }
}

impl Throttling {
    /// Slows the guest by something else from now on.
    ///
    /// # Errors
    /// Those of [`Tracker::throttle`]; what slowed it before still does.
    pub fn set(&self, throttle: Throttle) -> Result<()> {
        self.tracker.check(throttle)?;
        self.desk.set(&self.tracker.0.gate, throttle.into());
        Ok(())
    }

    /// Slows these vCPUs from now on, and nothing else.
    ///
    /// # Errors
    /// Those of [`Tracker::limit`]; what slowed the guest before still does.
    pub fn set_limits(&self, limits: BTreeMap<u64, NonZeroU64>) -> Result<()> {
        if self.tracker.throttles() != Throttles::Writers {
            return Err(Error::NoWriters);
        }
        self.desk.set(&self.tracker.0.gate, Slowing::These(limits));
        Ok(())
    }
}

impl Drop for Throttling {
    fn drop(&mut self) {
        self.desk
            .change(&self.tracker.0.gate, |order| order.ended = true);
        self.tracker.0.throttled.store(false, Ordering::SeqCst);
    }
}

/// How long all rest between two slices, to rest `percent` of their time.
fn rest(percent: u8) -> Duration {
    SLICE * percent.into() / (100 - u32::from(percent.min(99)))
}

fn run(desk: &Desk, gate: &Gate, shared: &Weak<Shared>) {
    let mut allowances = Allowances::default();
    let mut order = desk.lock().clone();
    while !order.ended {
        let mut limit = |rate: &dyn Fn(u64) -> Option<NonZeroU64>| {
            let shared = shared.upgrade()?;
            let (dirtied, now) = (shared.dirtied(), Instant::now());
            for (vcpu, until) in allowances.look(order.number, &dirtied, now, rate) {
                desk.act(order.number, || gate.rest(until, |other| other == vcpu));
            }
            Some(SLICE)
        };
        let patience = match &order.throttle {
            Slowing::Off => None,
            Slowing::All { percent } => {
                let rest = rest(*percent);
                let until = Instant::now() + rest;
                desk.act(order.number, || gate.rest(until, |_| true));
                Some(rest + SLICE)
            }
            Slowing::Each(rate) => limit(&|_| Some(*rate)),
            Slowing::These(rates) => limit(&|vcpu| rates.get(&vcpu).copied()),
        };
        // A tracker that is gone has nobody to slow, and ends this with its throttling.
        order = desk.next(order.number, patience);
    }
}

impl Shared {
    /// How many pages each vCPU has dirtied so far, if that is known.
    fn dirtied(&self) -> Vec<(u64, u64)> {
        match &self.lock().log {
            KvmLog::Ring(rings) => rings.dirtied().collect(),
            KvmLog::Bitmap(_) => Vec::new(),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_share_of_rest_is_the_one_asked_for() {
        for percent in 1..=99 {
            let rest = rest(percent).as_secs_f64();
            let share = 100.0 * rest / (rest + SLICE.as_secs_f64());
            assert!(
                (share - f64::from(percent)).abs() < 0.01,
                "{percent}: {share}"
            );
        }
    }

    #[test]
    fn the_same_again_begins_no_rest_anew() {
        let gate = Gate::new(libc::SIGRTMIN()).unwrap();
        let desk = Desk::new(Order {
            throttle: Slowing::Off,
            number: 0,
            ended: false,
        });
        let orders = [10, 10, 20, 10].map(|percent| {
            desk.set(&gate, Slowing::All { percent });
            desk.lock().number
        });
        assert_eq!(orders, [1, 1, 2, 3]);
    }
}
