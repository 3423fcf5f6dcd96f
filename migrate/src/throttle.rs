//! How a guest that writes faster than the link carries is slowed.

use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

/// What is taken from a guest's vCPUs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Throttle {
    /// Nothing: full speed.
    #[default]
    Off,
    /// Time, from every vCPU alike, whatever it does.
    All {
        /// Per cent of its time that every vCPU sleeps, 1 to 99.
        percent: u8,
    },
    /// Time, from each vCPU that dirties more pages than it may. One that stays below is not slowed.
    Writers {
        /// Most pages that each vCPU may dirty in a second, on average. A page counts again when it is written after a
        /// harvest. No vCPU is made to sleep more than 99 % of its time, so a lower limit than 1 % of its speed is not
        /// reached.
        pages_per_second: NonZeroU64,
    },
}

/// What a source can slow; each can do what those before it can.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum Throttles {
    /// Nothing: it takes [`Throttle::Off`] alone.
    Nothing,
    /// All vCPUs alike: [`Throttle::All`].
    All,
    /// Those that write: [`Throttle::Writers`]. It knows which vCPU dirtied a page.
    Writers,
}
