//! `--svg`: all of it in one picture, to be put into a ticket.

use std::fmt::Write;

use gleaner_migrate::units::{Bytes, Seconds};

use super::Found;
use super::grid::Grid;
use super::text::{cost, course, ms, pages, spread, way};
use crate::PAGE_SIZE;
use crate::rate::CurvePoint;

const WIDTH: f64 = 960.0;
const INK: &str = "#1c2330";
const FAINT: &str = "#6b7484";
const RULE: &str = "#d9dee6";
const BLUE: &str = "#2563a8";
const ORANGE: &str = "#c2410c";
const GREEN: &str = "#15803d";
/// From cold to hot.
const HEAT: [(f64, [f64; 3]); 5] = [
    (0.0, [246.0, 247.0, 249.0]),
    (0.25, [253.0, 224.0, 171.0]),
    (0.5, [250.0, 160.0, 80.0]),
    (0.75, [209.0, 62.0, 45.0]),
    (1.0, [90.0, 8.0, 40.0]),
];

/// The picture.
pub fn picture(found: &Found<'_>) -> String {
    let mut svg = Svg(String::new());
    let mut y = svg.head(found);
    svg.curve(found, 70.0, y + 40.0, 380.0, 230.0);
    svg.heat(found, 540.0, y + 40.0, 380.0, 230.0);
    y += 352.0;
    y = svg.writers(found, y);
    let height = y + 20.0;
    let font = "font-family=\"Helvetica, Arial, sans-serif\"";
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height:.0}\" viewBox=\"0 0 {WIDTH} {height:.0}\" {font}>\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n{}</svg>\n",
        svg.0
    )
}

struct Svg(String);

impl Svg {
    fn put(&mut self, element: &str) {
        // Writing to a string does not fail.
        let _ = writeln!(self.0, "{element}");
    }

    fn text(&mut self, (x, y): (f64, f64), size: f64, colour: &str, more: &str, text: &str) {
        let text = escaped(text);
        self.put(&format!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" fill=\"{colour}\" {more}>{text}</text>"
        ));
    }

    fn line(&mut self, (x1, y1): (f64, f64), (x2, y2): (f64, f64), colour: &str, more: &str) {
        self.put(&format!(
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\" {more}/>"
        ));
    }

    fn rect(&mut self, (x, y): (f64, f64), (width, height): (f64, f64), fill: &str) {
        self.put(&format!(
            "<rect x=\"{x:.2}\" y=\"{y:.2}\" width=\"{width:.2}\" height=\"{height:.2}\" fill=\"{fill}\"/>"
        ));
    }

    /// What was found, in words; returns where it ends.
    fn head(&mut self, found: &Found<'_>) -> f64 {
        let report = &found.report;
        let title = format!("{}/s dirtied", Bytes(report.dirty_bytes_per_second));
        self.text((40.0, 46.0), 26.0, INK, "font-weight=\"bold\"", &title);
        let what = format!(
            "{} different of {}, in {}; {}",
            pages(report.unique_pages as f64),
            pages(report.guest_pages as f64),
            ms(report.duration_ms),
            way(report, found.metered)
        );
        self.text((40.0, 68.0), 13.0, FAINT, "", &what);
        let mut y = 68.0;
        if let Some(verdict) = &found.verdict {
            let colour = if verdict.converges { GREEN } else { ORANGE };
            y += 32.0;
            let word = format!("A migration {}", verdict.word());
            self.text((40.0, y), 17.0, colour, "font-weight=\"bold\"", &word);
            let assumed = if found.assumed { " (assumed)" } else { "" };
            let mut lines = vec![
                format!(
                    "at {}/s{assumed} within a downtime of {}: {}",
                    Bytes(verdict.bandwidth as f64),
                    ms(verdict.downtime_limit_ms),
                    course(verdict)
                ),
                verdict.reason.clone(),
            ];
            if let Some(needs) = &verdict.needs {
                let what = if verdict.converges {
                    "To be sure"
                } else {
                    "It would with"
                };
                lines.push(format!("{what}: {}", needs.told()));
            }
            for line in lines.iter().flat_map(|line| wrapped(line, 116)) {
                y += 18.0;
                self.text((40.0, y), 13.0, INK, "", &line);
            }
        }
        y + 12.0
    }

    /// D(t) with its band, and what the link carries in the time.
    fn curve(&mut self, found: &Found<'_>, x: f64, y: f64, width: f64, height: f64) {
        self.text(
            (x - 30.0, y - 14.0),
            14.0,
            INK,
            "font-weight=\"bold\"",
            "Different pages written in a time, D(t)",
        );
        let points = &found.report.curve;
        let (Some(first), Some(last)) = (points.first(), points.last()) else {
            return;
        };
        let top = points.iter().map(|p| edge(p, 1.0)).fold(1.0, f64::max) * 1.08;
        let (from, to) = (
            first.ms.ln(),
            (last.ms * 1.0001).ln().max(first.ms.ln() + 0.7),
        );
        let at = |ms: f64| x + (ms.ln() - from) / (to - from) * width;
        let up = |pages: f64| y + height - (pages / top).clamp(0.0, 1.0) * height;
        for part in 0..=4 {
            let value = top * f64::from(part) / 4.0;
            let level = up(value);
            self.line((x, level), (x + width, level), RULE, "");
            let label = pages(value).to_string();
            self.text(
                (x - 6.0, level + 4.0),
                10.0,
                FAINT,
                "text-anchor=\"end\"",
                &label,
            );
        }
        let mut free = f64::NEG_INFINITY;
        for point in points {
            let across = at(point.ms);
            if across - free > 44.0 {
                let label = ms(point.ms).to_string();
                self.text(
                    (across, y + height + 16.0),
                    10.0,
                    FAINT,
                    "text-anchor=\"middle\"",
                    &label,
                );
                free = across;
            }
        }
        let along = |sign: f64| points.iter().map(move |p| (at(p.ms), up(edge(p, sign))));
        let band = along(1.0).chain(along(-1.0).rev());
        self.put(&format!(
            "<polygon points=\"{}\" fill=\"{BLUE}\" fill-opacity=\"0.18\"/>",
            joined(band)
        ));
        if let Some(verdict) = &found.verdict {
            let carried = verdict.bandwidth as f64 / PAGE_SIZE as f64;
            let steps = (0..=60).map(|n| (from + (to - from) * f64::from(n) / 60.0).exp());
            let below = steps.filter(|ms| carried * ms / 1e3 <= top);
            let line: Vec<_> = below.map(|ms| (at(ms), up(carried * ms / 1e3))).collect();
            let key = y + height + 52.0;
            let what = if line.len() < 2 {
                // All of it is above the picture.
                format!(
                    "{}/s, which the link carries, is more",
                    Bytes(verdict.bandwidth as f64)
                )
            } else {
                let dashed = "stroke-width=\"1.5\" stroke-dasharray=\"5 4\"";
                self.put(&format!(
                    "<polyline points=\"{}\" fill=\"none\" stroke=\"{ORANGE}\" {dashed}/>",
                    joined(line.into_iter())
                ));
                self.line((x, key - 4.0), (x + 22.0, key - 4.0), ORANGE, dashed);
                "what the link carries in the time".into()
            };
            self.text((x + 28.0, key), 11.0, FAINT, "", &what);
        }
        let key = y + height + 36.0;
        self.put(&format!(
            "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"22\" height=\"10\" fill=\"{BLUE}\" fill-opacity=\"0.18\"/>",
            key - 9.0
        ));
        self.line(
            (x, key - 4.0),
            (x + 22.0, key - 4.0),
            BLUE,
            "stroke-width=\"2\"",
        );
        let what = match found.report.sampling {
            Some(_) => "mean, and where 95 % lie, with the error of the sample",
            None => "mean, and where 95 % lie",
        };
        self.text((x + 28.0, key), 11.0, FAINT, "", what);
        let line = joined(points.iter().map(|p| (at(p.ms), up(p.pages))));
        self.put(&format!(
            "<polyline points=\"{line}\" fill=\"none\" stroke=\"{BLUE}\" stroke-width=\"2\"/>"
        ));
        for point in points {
            let (across, level) = (at(point.ms), up(point.pages));
            self.put(&format!(
                "<circle cx=\"{across:.1}\" cy=\"{level:.1}\" r=\"2.5\" fill=\"{BLUE}\"/>"
            ));
        }
    }

    /// Where and when.
    fn heat(&mut self, found: &Found<'_>, x: f64, y: f64, width: f64, height: f64) {
        self.text(
            (x - 30.0, y - 14.0),
            14.0,
            INK,
            "font-weight=\"bold\"",
            "Memory (down) written over time (across)",
        );
        let grid = Grid::of(found.measured, 100, 96);
        self.rect((x, y), (width, height), &colour(0.0));
        let across = width / grid.cells.len().max(1) as f64;
        for (column, shades) in grid.shades().iter().enumerate() {
            let down = height / shades.len() as f64;
            // Cells of one shade that follow each other are one.
            let mut row = 0;
            while row < shades.len() {
                let same = shades[row..]
                    .iter()
                    .take_while(|s| **s == shades[row])
                    .count();
                if shades[row] > 0.0 {
                    let corner = (x + column as f64 * across, y + row as f64 * down);
                    // A little over the edge, so that no seam shows.
                    let size = (across + 0.3, same as f64 * down + 0.3);
                    self.rect(corner, size, &colour(shades[row]));
                }
                row += same;
            }
        }
        let mut free = f64::NEG_INFINITY;
        for (name, part) in &grid.blocks {
            let level = y + part * height;
            self.line((x - 4.0, level), (x, level), FAINT, "");
            if level - free > 12.0 {
                self.text(
                    (x - 7.0, (level + 10.0).min(y + height)),
                    10.0,
                    FAINT,
                    "text-anchor=\"end\"",
                    &shortened(name, 14),
                );
                free = level;
            }
        }
        for (at, label) in [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)] {
            let label = Seconds(grid.seconds * label).to_string();
            self.text(
                (x + at * width, y + height + 16.0),
                10.0,
                FAINT,
                "text-anchor=\"middle\"",
                &label,
            );
        }
        let key = y + height + 27.0;
        for step in 0..60 {
            let at = x + f64::from(step) * 2.0;
            self.rect((at, key), (2.2, 9.0), &colour(f64::from(step) / 59.0));
        }
        let most = grid.cells.iter().flatten().copied().fold(0.0, f64::max);
        let label = format!("up to {most:.1} writes seen a page and second (log)");
        self.text((x + 128.0, key + 9.0), 11.0, FAINT, "", &label);
    }

    /// Bars of vCPUs and blocks, and what metering cost; returns where it ends.
    fn writers(&mut self, found: &Found<'_>, y: f64) -> f64 {
        let report = &found.report;
        let vcpus: Vec<_> = report
            .vcpus
            .iter()
            .map(|v| (format!("vCPU {}", v.vcpu), v.bytes_per_second))
            .collect();
        let blocks: Vec<_> = report
            .blocks
            .iter()
            .map(|b| (b.name.clone(), b.dirty_bytes_per_second))
            .collect();
        let left = self.bars("vCPUs, a page again after each harvest", &vcpus, 40.0, y);
        let right = self.bars("Blocks, different pages", &blocks, 510.0, y);
        let mut y = left.max(right) + 8.0;
        for line in wrapped(&cost(report), 150) {
            y += 16.0;
            self.text((40.0, y), 11.0, FAINT, "", &line);
        }
        y
    }

    fn bars(&mut self, title: &str, bars: &[(String, f64)], x: f64, mut y: f64) -> f64 {
        self.text((x, y), 14.0, INK, "font-weight=\"bold\"", title);
        if bars.is_empty() {
            self.text(
                (x, y + 22.0),
                12.0,
                FAINT,
                "",
                "known with dirty rings alone",
            );
            return y + 22.0;
        }
        let most = bars.iter().map(|bar| bar.1).fold(1.0, f64::max);
        for (name, rate) in bars.iter().take(16) {
            y += 20.0;
            let name = shortened(name, 20);
            self.text((x + 72.0, y), 11.0, INK, "text-anchor=\"end\"", &name);
            self.rect((x + 80.0, y - 10.0), (rate / most * 220.0, 12.0), BLUE);
            let words = format!("{}/s", Bytes(*rate));
            self.text((x + 86.0 + rate / most * 220.0, y), 11.0, FAINT, "", &words);
        }
        if let Some(more) = bars.len().checked_sub(17) {
            y += 20.0;
            self.text(
                (x + 80.0, y),
                11.0,
                FAINT,
                "",
                &format!("and {} more", more + 1),
            );
        }
        y
    }
}

/// Above the mean, or below, so far that 95 % lie within; what a sample does not know is beside that.
fn edge(point: &CurvePoint, sign: f64) -> f64 {
    let [low, high] = point.interval95;
    let unknown = if sign > 0.0 { high } else { low } - point.pages;
    point.pages + sign * unknown.hypot(spread(point.deviation))
}

fn joined(points: impl Iterator<Item = (f64, f64)>) -> String {
    let points: Vec<String> = points.map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    points.join(" ")
}

fn colour(heat: f64) -> String {
    let next = HEAT
        .iter()
        .position(|stop| stop.0 >= heat)
        .unwrap_or(HEAT.len() - 1)
        .max(1);
    let (from, to) = (HEAT[next - 1], HEAT[next]);
    let part = ((heat - from.0) / (to.0 - from.0)).clamp(0.0, 1.0);
    let [r, g, b] = [0, 1, 2].map(|at| from.1[at] + part * (to.1[at] - from.1[at]));
    format!("rgb({r:.0},{g:.0},{b:.0})")
}

/// Lines of so many letters at most, broken between words, but not before a unit.
fn wrapped(text: &str, most: usize) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    for word in text.split(' ') {
        let unit = word.starts_with(|c: char| c.is_ascii_alphabetic() || c == '%');
        match words.last_mut() {
            Some(before) if unit && before.ends_with(|c: char| c.is_ascii_digit()) => {
                before.push(' ');
                before.push_str(word);
            }
            _ => words.push(word.into()),
        }
    }
    let mut lines = vec![String::new()];
    for word in words {
        let line = lines.len() - 1;
        if lines[line].is_empty() {
            lines[line] = word;
        } else if lines[line].len() + word.len() < most {
            lines[line].push(' ');
            lines[line].push_str(&word);
        } else {
            lines.push(word);
        }
    }
    lines
}

/// A name for which there is room for so many letters.
fn shortened(name: &str, most: usize) -> String {
    if name.chars().count() <= most {
        return name.into();
    }
    name.chars().take(most - 1).chain(['…']).collect()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_broken_between_words_and_loses_none() {
        let text = "one two three four five six seven";
        let lines = wrapped(text, 10);
        assert!(lines.iter().all(|line| line.len() <= 10), "{lines:?}");
        assert_eq!(lines.join(" "), text);
        assert_eq!(wrapped("in 86 ms (54 ms", 8), ["in 86 ms", "(54 ms"]);
        assert_eq!(wrapped("up to 86 ms", 8), ["up to", "86 ms"]);
    }

    #[test]
    fn a_name_without_room_shows_that_it_goes_on() {
        assert_eq!(shortened("ram", 3), "ram");
        assert_eq!(shortened("größer", 4), "grö…");
    }

    #[test]
    fn colours_go_from_the_first_to_the_last() {
        assert_eq!(colour(0.0), "rgb(246,247,249)");
        assert_eq!(colour(0.5), "rgb(250,160,80)");
        assert_eq!(colour(1.0), "rgb(90,8,40)");
    }
}
