//! The kernels over bitmaps, each beside other ways to do the same, in one process and turn about.

mod bitmaps;
mod or;
mod others;
mod runs;

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::row::Row;
use crate::{Plan, Result};

pub use bitmaps::random;

/// A guest, by its name and the words of its bitmap.
#[derive(Clone, Copy)]
struct Guest {
    name: &'static str,
    words: usize,
}

const GUESTS: [Guest; 3] = [guest("1G", 1), guest("256G", 256), guest("1T", 1024)];

/// A guest of so many GiB.
const fn guest(name: &'static str, gib: usize) -> Guest {
    Guest {
        name,
        words: gib << 12,
    }
}

pub fn rows(plan: &Plan) -> Result<Vec<Row>> {
    let mut rows = runs::rows(plan)?;
    rows.extend(or::rows(plan)?);
    Ok(rows)
}

/// Something that is measured: one pass.
type Side<'a> = &'a mut dyn FnMut();

/// What a turn has to take at least, in as many passes as that needs.
fn least(plan: &Plan) -> Duration {
    Duration::from_millis(plan.pick(10, 0) as u64)
}

/// What a turn is measured by.
#[derive(Clone, Copy)]
enum Clock {
    /// CPU time of this process: of work on one core, which others on the machine may interrupt.
    Cpu,
    /// Time as it passes: of work on several cores.
    Wall,
}

impl Clock {
    /// Now, on this clock.
    fn now(self, start: Instant) -> Duration {
        match self {
            Self::Cpu => {
                let time = clock_gettime(ClockId::ProcessCPUTime);
                Duration::new(
                    time.tv_sec.cast_unsigned(),
                    time.tv_nsec.unsigned_abs() as u32,
                )
            }
            Self::Wall => start.elapsed(),
        }
    }
}

/// Seconds a pass of each side, turn about: `rounds` times after one of warm-up. A turn is as many passes as fit
/// into `least`, and one at least.
fn in_turn<const N: usize>(
    clock: Clock,
    rounds: usize,
    least: Duration,
    mut sides: [Side<'_>; N],
) -> Vec<[f64; N]> {
    let start = Instant::now();
    let mut turn = || {
        let mut seconds = [0.0; N];
        for (side, seconds) in sides.iter_mut().zip(&mut seconds) {
            let begun = clock.now(start);
            let mut took = Duration::ZERO;
            let mut passes = 0;
            while passes == 0 || took < least {
                side();
                passes += 1;
                took = clock.now(start) - begun;
            }
            *seconds = took.as_secs_f64() / f64::from(passes);
        }
        seconds
    };
    turn();
    (0..rounds).map(|_| turn()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_take_turns_and_the_first_turn_is_thrown_away() {
        let order = std::cell::RefCell::new(Vec::new());
        let mut one = || order.borrow_mut().push(1);
        let mut other = || order.borrow_mut().push(2);
        let rounds = in_turn(Clock::Wall, 2, Duration::ZERO, [&mut one, &mut other]);
        assert_eq!(rounds.len(), 2);
        assert_eq!(*order.borrow(), [1, 2, 1, 2, 1, 2]);
    }
}
