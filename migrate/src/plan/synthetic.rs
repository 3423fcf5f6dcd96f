//! Traces of guests that nobody has.

use std::f64::consts::TAU;
use std::fmt;
use std::io::Write;
use std::str::FromStr;
use std::time::Duration;

use super::load::{Load, Memory};
use super::random::Random;
use crate::trace::{Followed, TraceWriter};
use crate::{Error, Result};

/// What a made-up guest does.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Workload {
    /// Next to nothing.
    Idle,
    /// A few pages often, many seldom, a log one after the other, and now and then a checkpoint.
    Database,
    /// It goes through much of its memory again and again, often faster than links carry.
    Stress,
    /// Busy for some seconds, then calm for some, and so on.
    Oscillating,
    /// Once in its life it begins to do something else.
    PhaseChange,
    /// It writes to ever more of its memory.
    Growing,
}

impl Workload {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Idle,
        Self::Database,
        Self::Stress,
        Self::Oscillating,
        Self::PhaseChange,
        Self::Growing,
    ];

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Database => "database",
            Self::Stress => "stress",
            Self::Oscillating => "oscillating",
            Self::PhaseChange => "phase-change",
            Self::Growing => "growing",
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Workload {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let found = Self::ALL
            .into_iter()
            .find(|workload| workload.name() == text);
        found.ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("\"{text}\" is no kind of trace: write one of {names}")
        })
    }
}

/// A trace to be made. The same one always becomes the same bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Synthetic {
    /// What the guest does.
    pub workload: Workload,
    /// Pages that it has, at least 1, in one block.
    pub pages: u64,
    /// How long the trace is.
    pub duration: Duration,
    /// Between two records.
    pub interval: Duration,
    /// Which pages it follows.
    pub followed: Followed,
    /// Which of many guests of this kind it is: how much it writes, where, and when.
    pub seed: u64,
}

impl Synthetic {
    /// With a record each 100 ms, and as many pages followed as is usual.
    #[must_use]
    pub fn new(workload: Workload, pages: u64, duration: Duration, seed: u64) -> Self {
        Self {
            workload,
            pages,
            duration,
            interval: Duration::from_millis(100),
            followed: Followed::usual(pages),
            seed,
        }
    }

    /// Writes the trace.
    ///
    /// # Errors
    /// [`Error::TooLong`] of a guest with more pages than can be followed, or with none, and of a trace without time;
    /// [`Error::Io`] when it can't be written.
    pub fn write(&self, out: impl Write) -> Result<()> {
        if self.pages == 0 || self.interval.is_zero() {
            return Err(Error::Unable {
                what: "make a trace of no memory or of no time",
            });
        }
        let mut writer = TraceWriter::new(out, self.followed)?;
        let block = writer.block("ram", self.pages)?;
        let mut random = Random::new(self.seed, self.workload as u64);
        let mut loads = self.loads(&mut random);
        let interval = self.interval.as_secs_f64();
        let mut now = Duration::ZERO;
        while now < self.duration {
            now += self.interval;
            let mut memory = Memory {
                writer: &mut writer,
                block,
                followed: self.followed,
                pages: self.pages,
            };
            for load in &mut loads {
                load.run(&mut memory, now.as_secs_f64(), interval, &mut random);
            }
            writer.record(now)?;
        }
        Ok(())
    }

    fn loads(&self, random: &mut Random) -> Vec<Load> {
        let long = self.duration.as_secs_f64();
        let mut loads = vec![daemons(random)];
        match self.workload {
            Workload::Idle => {}
            Workload::Database => loads.extend(database(random, |_| 1.0)),
            Workload::Stress => {
                let most = random.between(0.25, 0.9);
                let writes = random.around(50e3, 1e6);
                loads.push(Load::sweep(move |_| (0.05, 0.05 + most), move |_| writes));
            }
            Workload::Oscillating => {
                let (period, busy) = (random.around(4.0, 40.0), random.between(0.3, 0.7));
                let (phase, size) = (random.share(), random.between(0.1, 0.5));
                let (high, low) = (random.around(1e5, 6e5), random.around(500.0, 5000.0));
                let writes = move |now: f64| {
                    let at = (now / period + phase).fract();
                    if at < busy { high } else { low }
                };
                loads.push(Load::random(move |_| (0.1, 0.1 + size), writes));
            }
            Workload::PhaseChange => {
                let change = long * random.between(0.2, 0.8);
                loads.extend(database(random, move |now| {
                    f64::from(u8::from(now < change))
                }));
                loads.extend(database(random, move |now| {
                    f64::from(u8::from(now >= change))
                }));
            }
            Workload::Growing => {
                let (least, most) = (random.around(0.002, 0.02), random.between(0.2, 0.6));
                let writes = random.around(3e4, 3e5);
                let size = move |now: f64| least + (most - least) * (now / long).min(1.0);
                loads.push(Load::random(
                    move |now| (0.2, 0.2 + size(now)),
                    move |_| writes,
                ));
            }
        }
        loads
    }
}

/// What each guest has going on.
fn daemons(random: &mut Random) -> Load {
    let writes = random.around(20.0, 300.0);
    Load::random(|_| (0.0, 1.0), move |_| writes)
}

/// A database, as busy as `busy` says at a time, 0 to 1.
fn database(random: &mut Random, busy: impl Fn(f64) -> f64 + Copy + 'static) -> Vec<Load> {
    let hot = (random.between(0.0, 0.3), random.around(0.001, 0.01));
    let index = random.around(5e3, 1e5);
    let pool = random.around(1e3, 3e4);
    let log = random.around(500.0, 1e4);
    let swing = (random.around(20.0, 300.0), random.share());
    // More by day than by night, if days were that short.
    let load = move |now: f64| busy(now) * (0.75 + 0.25 * (TAU * (now / swing.0 + swing.1)).sin());
    let checkpoint = (
        random.between(20.0, 60.0),
        random.between(3.0, 8.0),
        random.around(1e4, 6e4),
    );
    let flushed = move |now: f64| {
        let at = now % checkpoint.0;
        if at < checkpoint.1 {
            busy(now) * checkpoint.2
        } else {
            0.0
        }
    };
    vec![
        Load::random(
            move |_| (hot.0, hot.0 + hot.1),
            move |now| load(now) * index,
        ),
        Load::random(|_| (0.3, 0.9), move |now| load(now) * pool),
        Load::sweep(|_| (0.9, 0.95), move |now| load(now) * log),
        Load::random(|_| (0.3, 0.9), flushed),
    ]
}
