//! The progress of a migration, on standard error: redrawn in place on a terminal, else a line for each round.

use std::io::{IsTerminal, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use gleaner_migrate::units::{Bytes, Seconds};
use gleaner_migrate::{Progress, SenderOptions, Throttle, Tick};

use super::trace::Trace;
use crate::PAGE_SIZE;

/// Between two lines about the same round, where each stays to be read.
const PERIOD: Duration = Duration::from_secs(10);

/// Lets a sender tell of its rounds, here and in the trace.
pub fn follow(options: &mut SenderOptions, trace: Option<Trace>) {
    let line = Arc::new(Mutex::new(Line::new()));
    let ticking = Arc::clone(&line);
    options.on_progress = Some(Box::new(move |progress| {
        if let Some(trace) = &trace {
            trace.round(progress);
        }
        let mut line = line.lock().unwrap_or_else(PoisonError::into_inner);
        line.show(&round(progress));
    }));
    options.on_tick = Some(Box::new(move |under_way| {
        let mut line = ticking.lock().unwrap_or_else(PoisonError::into_inner);
        line.update(&tick(under_way));
    }));
}

/// Where the line is.
pub struct Line {
    in_place: bool,
    shown: Instant,
    drawn: bool,
}

impl Line {
    pub fn new() -> Self {
        Self {
            in_place: std::io::stderr().is_terminal(),
            shown: Instant::now(),
            drawn: false,
        }
    }

    /// Whether it is redrawn in place.
    pub const fn in_place(&self) -> bool {
        self.in_place
    }

    pub fn show(&mut self, text: &str) {
        self.shown = Instant::now();
        self.drawn = true;
        let mut stderr = std::io::stderr().lock();
        // Whoever watched may be gone. On a terminal: back to the start, cut at the edge, and clear what was longer.
        let _ = if self.in_place {
            write!(stderr, "\r\x1b[?7l{text}\x1b[K\x1b[?7h")
        } else {
            writeln!(stderr, "{text}")
        };
        let _ = stderr.flush();
    }

    /// Takes it off the terminal.
    pub fn erase(&mut self) {
        if self.in_place && self.drawn {
            // Whoever watched may be gone.
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
        self.drawn = false;
    }

    /// Shows what will soon be out of date.
    fn update(&mut self, text: &str) {
        if self.in_place || self.shown.elapsed() >= PERIOD {
            self.show(text);
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if self.in_place && self.drawn {
            note!();
        }
    }
}

fn bytes(pages: f64) -> Bytes {
    Bytes(pages * PAGE_SIZE as f64)
}

/// A round that is over.
fn round(p: &Progress) -> String {
    let total = p.forecast_total_ms.map(|ms| ms.likely / 1e3);
    let total = match total {
        Some(seconds) if seconds.is_finite() => {
            format!(", expected to be done {} after the start", Seconds(seconds))
        }
        _ => String::new(),
    };
    let throttle = match p.throttle {
        Throttle::Off => "",
        _ => ", throttled",
    };
    format!(
        "round {}: {} left, {}/s sent, {}/s dirtied{throttle}{total}: {}",
        p.round,
        bytes(p.remaining_pages as f64),
        Bytes(p.rate_bytes_per_second),
        bytes(p.dirty_pages_per_second),
        p.reason
    )
}

/// A round under way.
fn tick(t: &Tick) -> String {
    format!(
        "round {}: {} of it left, {}/s sent",
        t.round,
        bytes(t.left_pages as f64),
        bytes(t.pages_per_second)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_under_way_tells_what_is_left_of_it() {
        let under_way = Tick {
            round: 2,
            left_pages: 512,
            pages_per_second: 25_600.0,
            pages_sent: 0,
            zero_pages: 0,
            bytes_on_wire: 0,
        };
        assert_eq!(
            tick(&under_way),
            "round 2: 2.0 MiB of it left, 100 MiB/s sent"
        );
    }
}
