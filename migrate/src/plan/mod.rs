//! What a migration would be like: a trace, replayed in virtual time through the policy of the [`Sender`](crate::Sender),
//! and through other rules beside it.
//!
//! ```text
//! Trace --> guest: what is dirty after which time --+
//! Terms --> road: bandwidth, round trip, harvest ---+--> rounds, until the rule stops the guest --> Outcome
//!                    Rule: decide(), or another ----+
//! ```
//!
//! * Rounds of the sender, and the clairvoyant's, are harvested while they go on: up to 16 times. Those of other rules are
//!   harvested when they are over.
//! * All memory has contents, and nothing is compressed: a trace does not tell of that.
//! * A page that was dirtied in an interval of the trace was dirtied at one moment of it, any; one that was dirtied in the
//!   two intervals before as well, and in the two after, is taken to be written all the time.
//! * A guest of which all vCPUs are throttled goes through its trace more slowly. Where writers are throttled, it goes so
//!   slowly that it dirties as many pages as one vCPU may.
//! * A trace that is over begins again.
//!
//! [`Synthetic`] makes traces of guests that nobody has.

mod auto_converge;
mod guest;
mod load;
mod outcome;
mod random;
mod rule;
mod synthetic;

#[cfg(test)]
mod tests;

pub use outcome::{Outcome, Terms, replay};
pub use rule::Rule;
pub use synthetic::{Synthetic, Workload};
