//! What a switchover costs beside sending what is left.

use super::{Bounds, History};

/// Parts of a downtime that do not depend on what is left to send, in seconds.
///
/// The harvest and round trips are measured in every round. The rest no round can measure: until the guest is stopped these are
/// guesses, from a small guest of a few devices to one with many vCPUs and slow devices.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Costs {
    /// The last harvest.
    pub harvest: Bounds,
    /// The last acknowledgement, READY and RUNNING, each a round trip after what it answers.
    pub round_trips: Bounds,
    /// Stopping the vCPUs: [`STOP`].
    pub stop: Bounds,
    /// Saving the state of vCPUs and devices: [`STATE`].
    pub state: Bounds,
    /// Sending it and building it at the destination: [`BUILD`].
    pub build: Bounds,
    /// From GO until the guest runs: [`GO`].
    pub go: Bounds,
}

/// Stopping the vCPUs, drains of writers and pauses of devices included: seconds.
pub const STOP: Bounds = Bounds::new(0.000_2, 0.001, 0.020);
/// Saving the state of vCPUs and devices: seconds.
pub const STATE: Bounds = Bounds::new(0.000_1, 0.001, 0.030);
/// Sending the state and building it at the destination, until it is READY: seconds.
pub const BUILD: Bounds = Bounds::new(0.000_2, 0.002, 0.100);
/// From GO until the guest runs, without the round trip: seconds.
pub const GO: Bounds = Bounds::new(0.000_1, 0.001, 0.020);

/// Round trips in a switchover: last acknowledgement, READY, RUNNING.
const ROUND_TRIPS: f64 = 3.0;

impl Costs {
    /// As they are known after the latest rounds.
    #[must_use]
    pub fn of(history: &History) -> Self {
        Self {
            harvest: history.harvest(),
            round_trips: history.round_trip().times(ROUND_TRIPS),
            stop: STOP,
            state: STATE,
            build: BUILD,
            go: GO,
        }
    }

    /// What rounds have measured.
    #[must_use]
    pub fn measured(&self) -> Bounds {
        self.harvest.plus(self.round_trips)
    }

    /// What only a switchover can measure.
    #[must_use]
    pub fn guessed(&self) -> Bounds {
        let stopped = self.stop.plus(self.state);
        stopped.plus(self.build).plus(self.go)
    }

    /// All of it.
    #[must_use]
    pub fn all(&self) -> Bounds {
        self.measured().plus(self.guessed())
    }
}
