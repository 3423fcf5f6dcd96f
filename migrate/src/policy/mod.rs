//! When to stop the guest, and why. A pure function of what was measured: no clock, no chance.
//!
//! ```text
//! History, a Round each --> rate of the link --+
//!                       --> Curve of the guest +--> Model --> Forecast --+
//!                       --> Costs of a switchover                        +--> decide --> Decision: verdict, reason
//!                                                              Goal -----+
//! ```
//!
//! * [`History`]: what each round sent, how long it took, and what it left dirty.
//! * [`Curve`]: how many different pages the guest dirties in a given time.
//! * [`Costs`]: what a switchover takes beside sending what is left.
//! * [`Forecast`]: the downtime of a switchover now, the time until one is within the limit, and the floor that rounds never
//!   get below, each with its bounds.
//! * [`decide`]: what comes next.

mod bounds;
mod costs;
mod curve;
mod decide;
mod forecast;
mod history;
pub(crate) mod rehearsal;
#[cfg(test)]
mod simulated;
mod steps;
#[cfg(test)]
mod tests;

use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::{Throttle, Throttles};

pub use bounds::Bounds;
pub(crate) use bounds::{milliseconds, some_milliseconds};
pub use costs::{BUILD, Costs, GO, STATE, STOP};
pub use curve::Curve;
pub(crate) use decide::obstacle;
pub use decide::{EXTRA_ROUNDS, decide};
pub use forecast::{Forecast, Model, Needs};
pub use history::{History, Round};
pub use steps::ThrottleGoal;

/// What to do when the time allowed is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnTimeout {
    /// End the migration; the guest runs on at the source.
    #[default]
    Cancel,
    /// Switch over, whatever downtime it costs.
    Switchover,
}

/// What was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Goal {
    /// The most downtime.
    pub downtime_limit: Duration,
    /// The most time in total.
    pub timeout: Option<Duration>,
    /// What happens then.
    pub on_timeout: OnTimeout,
    /// What of a guest that does not converge may be slowed down, step by step: all vCPUs by 20 % of their time at first
    /// and by 10 % more at each step; writers to half of what the link carries at first and to less at each step.
    pub throttle: Throttles,
    /// Somebody asks not to switch over yet: by what, or until when.
    pub held: Option<&'static str>,
}

/// What comes next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Another round with the guest running.
    Continue,
    /// Another round, with the guest slowed down so much.
    Throttle(Throttle),
    /// Stop the guest and switch over.
    SwitchOver,
    /// End the migration.
    GiveUp,
    /// The switchover has taken place.
    Done,
}

impl Serialize for Verdict {
    /// Its name alone: the throttle is told beside it.
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(match self {
            Self::Continue => "continue",
            Self::Throttle(_) => "throttle",
            Self::SwitchOver => "switch-over",
            Self::GiveUp => "give-up",
            Self::Done => "done",
        })
    }
}

/// A verdict and its grounds.
#[derive(Clone, PartialEq, Debug)]
pub struct Decision {
    /// What comes next.
    pub verdict: Verdict,
    /// What is to be expected, once a rate is known.
    pub forecast: Option<Forecast>,
    /// Why, for people.
    pub reason: String,
}
