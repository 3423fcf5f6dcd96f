//! What is found while it is found, on standard error: redrawn in place on a terminal, else a line for each window.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use gleaner_migrate::units::{Bytes, Seconds};

use super::grid::Grid;
use super::text::{cost, ms, pages, way};
use crate::rate::{Findings, Metered, Report};

/// Between two pictures.
const PERIOD: Duration = Duration::from_millis(200);
/// Between two verdicts, each of which is some milliseconds of work.
const JUDGED: Duration = Duration::from_secs(1);
/// Rows of the heat map.
const ROWS: usize = 8;
/// Bars at most, of a kind.
const BARS: usize = 12;
/// From cold to hot.
const SHADES: [char; 5] = [' ', '░', '▒', '▓', '█'];

/// Where it is shown.
pub struct Live {
    terminal: bool,
    /// When the last one was shown: on a terminal any, else of a window.
    shown: Duration,
    /// Lines of the last picture.
    drawn: usize,
    /// The last verdict, and when it was asked for.
    verdict: Option<String>,
    judged: Option<Duration>,
}

impl Live {
    pub fn new() -> Self {
        Self {
            terminal: std::io::stderr().is_terminal(),
            shown: Duration::ZERO,
            drawn: 0,
            verdict: None,
            judged: None,
        }
    }

    /// Whether there is something new to show.
    pub fn is_due(&self, measured: &dyn Findings) -> bool {
        if self.terminal {
            return measured.duration().saturating_sub(self.shown) >= PERIOD;
        }
        measured.latest().is_some_and(|w| w.end > self.shown)
    }

    /// Shows it. Whoever watched may be gone. `judge` tells the verdict in a line.
    pub fn show(
        &mut self,
        measured: &dyn Findings,
        metered: &Metered,
        last: bool,
        judge: impl FnOnce() -> Option<String>,
    ) {
        if self.terminal {
            self.judge(measured.duration(), last, judge);
        }
        let mut stderr = std::io::stderr().lock();
        if self.terminal {
            self.shown = measured.duration();
            let (width, height) = size();
            let mut lines = picture(measured, metered, self.verdict.as_deref(), width);
            // What scrolls out of sight can't be drawn over.
            lines.truncate(height.saturating_sub(1));
            let up = match self.drawn {
                0 => String::new(),
                lines => format!("\x1b[{lines}A"),
            };
            let all = lines.join("\x1b[K\n");
            let _ = write!(stderr, "\r{up}\x1b[?7l{all}\x1b[K\n\x1b[J\x1b[?7h");
            self.drawn = if last { 0 } else { lines.len() };
        } else if let Some(window) = measured.latest().filter(|w| w.end > self.shown) {
            self.shown = window.end;
            let _ = writeln!(
                stderr,
                "{}: {}/s dirtied, {} unique so far",
                Seconds(window.end.as_secs_f64()),
                Bytes(window.bytes_per_second),
                pages(measured.unique_pages() as f64)
            );
        }
        let _ = stderr.flush();
    }
}

impl Live {
    /// Asks for the verdict where the one that is shown is out of date.
    fn judge(&mut self, now: Duration, last: bool, judge: impl FnOnce() -> Option<String>) {
        let fresh = |then| now.saturating_sub(then) < JUDGED;
        if last || !self.judged.is_some_and(fresh) {
            self.verdict = judge();
            self.judged = Some(now);
        }
    }
}

/// Columns and lines of the terminal.
fn size() -> (usize, usize) {
    rustix::termios::tcgetwinsize(std::io::stderr())
        .ok()
        .filter(|size| size.ws_col > 0 && size.ws_row > 0)
        .map_or((80, 24), |size| (size.ws_col.into(), size.ws_row.into()))
}

/// The lines of a picture so wide.
fn picture(
    measured: &dyn Findings,
    metered: &Metered,
    verdict: Option<&str>,
    width: usize,
) -> Vec<String> {
    let report = measured.report();
    let rate = measured
        .latest()
        .map_or(report.dirty_bytes_per_second, |w| w.bytes_per_second);
    let mut lines = vec![
        format!(
            "{} of a guest of {}, {}",
            ms(report.duration_ms),
            pages(report.guest_pages as f64),
            way(&report, metered)
        ),
        format!(
            "{}/s dirtied, {} unique so far",
            Bytes(rate),
            pages(report.unique_pages as f64)
        ),
    ];
    lines.extend(verdict.map(str::to_owned));
    lines.push(cost(&report));
    lines.push("D(t), different pages written in a time:".into());
    let points = report.curve.iter();
    let bars = points.map(|p| (ms(p.ms).to_string(), p.pages, pages(p.pages).to_string()));
    lines.extend(bars_of(bars.collect(), width));
    heat(&mut lines, measured, width);
    writers(&mut lines, measured, &report, width);
    lines
}

fn heat(lines: &mut Vec<String>, measured: &dyn Findings, width: usize) {
    let grid = Grid::of(measured, ROWS, width.saturating_sub(10).clamp(10, 160));
    lines.push("memory from its start to its end, the latest below:".into());
    let each = grid.seconds / grid.cells.len().max(1) as f64;
    for (at, column) in grid.shades().iter().enumerate() {
        let cells: String = column.iter().map(|heat| shade(*heat)).collect();
        let end = Seconds(each * (at + 1) as f64).to_string();
        lines.push(format!("{end:>8} |{cells}|"));
    }
}

fn writers(lines: &mut Vec<String>, measured: &dyn Findings, report: &Report, width: usize) {
    let Some(window) = measured.latest() else {
        return;
    };
    let told = |name: String, rate: f64| (name, rate, format!("{}/s", Bytes(rate)));
    if !report.vcpus.is_empty() {
        lines.push("vCPUs, pages again after each harvest:".into());
        let vcpus = window.vcpus.iter().take(BARS);
        let bars = vcpus.map(|(vcpu, rate)| told(vcpu.to_string(), *rate));
        lines.extend(bars_of(bars.collect(), width));
    }
    lines.push("blocks:".into());
    let blocks = window.blocks.iter().take(BARS);
    let bars = blocks.map(|(name, rate)| told(name.clone(), *rate));
    lines.extend(bars_of(bars.collect(), width));
}

/// A bar each: what it is, how long, and in words.
fn bars_of(bars: Vec<(String, f64, String)>, width: usize) -> Vec<String> {
    let most = bars.iter().map(|bar| bar.1).fold(0.0, f64::max);
    let name = bars
        .iter()
        .map(|bar| bar.0.len())
        .max()
        .unwrap_or(0)
        .clamp(8, 20);
    let room = width.saturating_sub(name + 14).clamp(10, 60);
    let line = |(what, long, words): (String, f64, String)| {
        let bar = bar(long / most, room);
        format!("{what:>name$} {bar} {words}")
    };
    bars.into_iter().map(line).collect()
}

/// A part of so many cells, to an eighth of one.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // 0 to 8 times the cells
fn bar(part: f64, cells: usize) -> String {
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let part = if part.is_finite() { part } else { 0.0 };
    let eighths = (part.clamp(0.0, 1.0) * cells as f64 * 8.0).round() as usize;
    let bar = "█".repeat(eighths / 8) + EIGHTHS[eighths % 8];
    format!("{bar:<cells$}")
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // 0 to 4
fn shade(heat: f64) -> char {
    let last = (SHADES.len() - 1) as f64;
    SHADES[(heat.clamp(0.0, 1.0) * last).ceil() as usize]
}

#[cfg(test)]
mod tests {
    use super::*;
    use gleaner_migrate::Throttles;

    use crate::rate::Measurement;

    #[test]
    fn the_verdict_is_a_line_near_the_top_and_kept_up_to_date() {
        let mut live = Live::new();
        let second = Duration::from_secs(1);
        let mut asked = 0;
        // Each 200 ms for 3 s; as good as the last one within a second.
        for tick in 0..=15 {
            let now = Duration::from_millis(200) * tick;
            live.judge(now, false, || {
                asked += 1;
                Some(format!("verdict {asked}"))
            });
        }
        assert_eq!(live.verdict.as_deref(), Some("verdict 4"));
        live.judge(second * 3, true, || Some("the last".into()));
        let metered = Metered {
            tracking: "ring".into(),
            data_pages: 1,
            throttles: Throttles::Nothing,
        };
        let measured = Measurement::new(second);
        let lines = picture(&measured, &metered, live.verdict.as_deref(), 80);
        assert_eq!(lines[2], "the last", "{lines:?}");
    }

    #[test]
    fn a_bar_is_as_long_as_its_part() {
        assert_eq!(bar(1.0, 4), "████");
        assert_eq!(bar(0.5, 4), "██  ");
        assert_eq!(bar(0.28125, 4), "█▏  ");
        for part in [0.0, -1.0, f64::NAN] {
            assert_eq!(bar(part, 4), "    ");
        }
    }

    #[test]
    fn what_is_written_at_all_is_seen() {
        assert_eq!(
            [0.0, 0.05, 0.5, 0.9, 1.0].map(shade),
            [' ', '░', '▒', '█', '█']
        );
    }
}
