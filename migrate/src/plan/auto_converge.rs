//! QEMU's auto-converge.

use std::time::Duration;

use crate::Throttle;
use crate::policy::History;

/// A period of at least a second is bad when more than half as much was dirtied in it as was sent. After two bad ones in a
/// row all vCPUs are slowed, by 20 % of their time at first and by 10 % more at each further step, up to 99 %.
#[derive(Default)]
pub(super) struct AutoConverge {
    /// When the period began, since the migration did.
    began: Duration,
    /// Pages, in the period.
    sent: u64,
    dirtied: u64,
    /// Bad periods, the last one of which has just been.
    bad: u32,
}

const PERIOD: Duration = Duration::from_secs(1);
const FIRST: u8 = 20;
const STEP: u8 = 10;
const MOST: u8 = 99;

impl AutoConverge {
    /// The next step, if it is time for one after a round that sent so many pages.
    pub(super) fn after(&mut self, history: &History, sent: u64) -> Option<Throttle> {
        self.sent += sent;
        self.dirtied += history.remaining_pages;
        if history.elapsed.saturating_sub(self.began) < PERIOD {
            return None;
        }
        self.began = history.elapsed;
        let (sent, dirtied) = (
            std::mem::take(&mut self.sent),
            std::mem::take(&mut self.dirtied),
        );
        self.bad = if dirtied > sent / 2 { self.bad + 1 } else { 0 };
        if self.bad < 2 {
            return None;
        }
        self.bad = 0;
        let percent = match history.throttle {
            Throttle::All { percent } => percent.saturating_add(STEP).min(MOST),
            _ => FIRST,
        };
        let next = Throttle::All { percent };
        (next != history.throttle).then_some(next)
    }
}
