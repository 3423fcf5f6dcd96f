//! Rules that say when a guest is stopped.

use std::fmt;

use gleaner_bitmap::PAGE_SIZE;
use serde::{Serialize, Serializer};

use super::auto_converge::AutoConverge;
use crate::Throttles;
use crate::policy::{Decision, Goal, History, OnTimeout, Verdict, decide};
use crate::units::{Bytes, Seconds};

/// When to stop the guest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Rule {
    /// What [`Sender`](crate::Sender) does: [`decide`], without a throttle.
    Gleaner,
    /// The same, when it may throttle all vCPUs.
    GleanerThrottling,
    /// After so many rounds, whatever is left.
    Rounds(u32),
    /// As Cloud Hypervisor: when what is left goes over within the limit of downtime, or after five rounds.
    CloudHypervisor,
    /// As QEMU: when what is left goes over within the limit of downtime; with auto-converge.
    Qemu,
    /// After the first round that leaves no less than the one before.
    LocalMinimum,
    /// It knows the downtime that each end of a round would have, and stops the guest at the first one within the limit. Its
    /// rounds are those of [`Rule::Gleaner`]; nobody who sends in them and does not throttle sends less: each further one
    /// has only more to send again.
    Clairvoyant,
}

/// Rounds of [`Rule::CloudHypervisor`].
const ROUNDS: u32 = 5;

impl Rule {
    /// All that a plan compares.
    pub const ALL: [Self; 9] = [
        Self::Gleaner,
        Self::GleanerThrottling,
        Self::Rounds(3),
        Self::Rounds(10),
        Self::Rounds(30),
        Self::CloudHypervisor,
        Self::Qemu,
        Self::LocalMinimum,
        Self::Clairvoyant,
    ];
}

impl Rule {
    /// Whether its rounds are harvested while they go on, as those of [`Sender`](crate::Sender). The others stand for VMMs
    /// that ask for what is dirty between two rounds.
    pub(super) const fn harvests_early(self) -> bool {
        matches!(
            self,
            Self::Gleaner | Self::GleanerThrottling | Self::Clairvoyant
        )
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Gleaner => "gleaner",
            Self::GleanerThrottling => "gleaner, throttling",
            Self::Rounds(1) => "1 round",
            Self::Rounds(rounds) => return f.pad(&format!("{rounds} rounds")),
            Self::CloudHypervisor => "Cloud Hypervisor's",
            Self::Qemu => "QEMU's, auto-converge",
            Self::LocalMinimum => "local minimum",
            Self::Clairvoyant => "clairvoyant",
        })
    }
}

impl Serialize for Rule {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

/// A rule at work.
pub(super) struct Chooser {
    rule: Rule,
    goal: Goal,
    rounds: u32,
    /// Pages that the latest round began with.
    before: u64,
    auto_converge: AutoConverge,
}

impl Chooser {
    /// For a guest of so many pages.
    pub(super) fn new(rule: Rule, goal: Goal, pages: u64) -> Self {
        let throttle = match rule {
            Rule::GleanerThrottling => Throttles::All,
            _ => Throttles::Nothing,
        };
        Self {
            rule,
            goal: Goal { throttle, ..goal },
            rounds: 0,
            before: pages,
            auto_converge: AutoConverge::default(),
        }
    }

    /// What comes after a round. `downtime` tells the seconds that a switchover now takes; only a clairvoyant knows.
    pub(super) fn choose(&mut self, history: &History, downtime: impl FnOnce() -> f64) -> Decision {
        self.rounds += 1;
        let before = std::mem::replace(&mut self.before, history.remaining_pages);
        let limit = self.goal.downtime_limit.as_secs_f64();
        let (rounds, left) = (self.rounds, history.remaining_pages);
        let carried = history
            .pages_per_second()
            .map_or(f64::INFINITY, |rate| rate.likely);
        let fits = left as f64 <= carried * limit;
        let stop = match self.rule {
            Rule::Gleaner | Rule::GleanerThrottling => return self.decide(history),
            Rule::Rounds(most) => rounds >= most,
            Rule::CloudHypervisor => fits || rounds >= ROUNDS,
            Rule::Qemu => fits,
            Rule::LocalMinimum => left >= before,
            Rule::Clairvoyant => downtime() <= limit,
        };
        let left = Bytes(left as f64 * PAGE_SIZE as f64);
        let over = self
            .goal
            .timeout
            .filter(|timeout| history.elapsed >= *timeout);
        let (verdict, reason) = match over {
            _ if stop => (
                Verdict::SwitchOver,
                format!("{left} are left after {rounds} rounds"),
            ),
            Some(timeout) => {
                let timeout = Seconds(timeout.as_secs_f64());
                let verdict = match self.goal.on_timeout {
                    OnTimeout::Switchover => Verdict::SwitchOver,
                    OnTimeout::Cancel => Verdict::GiveUp,
                };
                (
                    verdict,
                    format!("the time limit of {timeout} is over, and {left} are left"),
                )
            }
            None => {
                let step = match self.rule {
                    Rule::Qemu => self.auto_converge.after(history, before),
                    _ => None,
                };
                let verdict = step.map_or(Verdict::Continue, Verdict::Throttle);
                (verdict, format!("{left} are left"))
            }
        };
        Decision {
            verdict,
            forecast: None,
            reason,
        }
    }

    /// The policy's word. Of a guest that did not get there, what would help is told in place of the time that is over.
    fn decide(&self, history: &History) -> Decision {
        let decision = decide(history, &self.goal);
        if decision.verdict != Verdict::GiveUp {
            return decision;
        }
        let endless = Goal {
            timeout: None,
            ..self.goal
        };
        Decision {
            verdict: Verdict::GiveUp,
            ..decide(history, &endless)
        }
    }
}
