//! A plan, drawn.

use std::fmt::Write;

use gleaner_migrate::plan::{Outcome, Rule, Terms};
use gleaner_migrate::trace::Trace;
use gleaner_migrate::units::{Bytes, Seconds};

use crate::PAGE_SIZE;

/// Where things are, in pixels.
const WIDTH: f64 = 1000.0;
const LEFT: f64 = 170.0;
const STRIP: (f64, f64) = (60.0, 120.0);
const ROW: f64 = 22.0;
const ROWS: f64 = 244.0;
/// Of a panel, and of the bars in it: the rest is for numbers.
const PANEL: f64 = (WIDTH - LEFT) / 4.0;
const BAR: f64 = PANEL - 76.0;
/// Right of the strip: room for the link's label.
const MARGIN: f64 = 76.0;
/// Numbers, and what is left white around them, drawn before: not everything that shows pictures knows `paint-order`.
const LABEL: &str = "fill=\"#444444\"";
const AROUND: &str = "fill=\"#ffffff\" stroke=\"#ffffff\" stroke-width=\"3\"";
/// Moments of the strip.
const MOMENTS: usize = 400;

/// Its name, the number that its bars show, and how that is written.
type Panel<'a> = (&'a str, fn(&Outcome) -> f64, &'a dyn Fn(f64) -> String);

/// The dirty rate over time, and below it a row of bars for each rule.
pub fn draw(trace: &Trace, terms: &Terms, outcomes: &[Outcome]) -> String {
    let height = ROWS + ROW * outcomes.len() as f64 + 40.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    let memory = Bytes((trace.total_pages() * PAGE_SIZE) as f64);
    let limit = Seconds(terms.downtime_limit.as_secs_f64());
    let link = Bytes(terms.bandwidth as f64);
    let title = format!("A guest of {memory} over {link}/s, downtime limit {limit}");
    text(
        &mut svg,
        (16.0, 26.0),
        "font-size=\"16\" font-weight=\"bold\"",
        &title,
    );
    strip(&mut svg, trace, terms);
    for (row, outcome) in outcomes.iter().enumerate() {
        let y = ROWS + ROW * row as f64;
        let weight = if outcome.rule == Rule::Gleaner {
            " font-weight=\"bold\""
        } else {
            ""
        };
        let at = (LEFT - 10.0, y + 14.0);
        text(
            &mut svg,
            at,
            &format!("text-anchor=\"end\"{weight}"),
            &outcome.rule.to_string(),
        );
    }
    let time = |ms: f64| match ms {
        0.0 => "-".to_owned(),
        ms => Seconds(ms / 1e3).to_string(),
    };
    let panels: [Panel<'_>; 4] = [
        ("total time", |o| o.total_ms, &time),
        ("bytes sent", |o| o.bytes, &|bytes| Bytes(bytes).to_string()),
        ("downtime", |o| o.downtime_ms, &time),
        ("overshoot", |o| o.overshoot_ms, &time),
    ];
    for (n, (name, of, told)) in panels.into_iter().enumerate() {
        let x = LEFT + PANEL * n as f64;
        text(&mut svg, (x, ROWS - 10.0), "font-weight=\"bold\"", name);
        let limit_ms = terms.downtime_limit.as_secs_f64() * 1e3;
        let least = if n == 2 { limit_ms } else { 1e-9 };
        let most = outcomes.iter().map(of).fold(least.max(1e-9), f64::max);
        if n == 2 {
            let (at, end) = (
                x + BAR * limit_ms / most,
                ROWS + ROW * outcomes.len() as f64,
            );
            line(&mut svg, (at, ROWS - 2.0), (at, end), "#c0392b");
            let name = format!("limit {limit}");
            text(&mut svg, (x + 74.0, ROWS - 10.0), "fill=\"#c0392b\"", &name);
        }
        for (row, outcome) in outcomes.iter().enumerate() {
            let y = ROWS + ROW * row as f64;
            let (value, label) = match (outcome.moved, n) {
                (false, 0) => (of(outcome), "never".to_owned()),
                _ => (of(outcome), told(of(outcome))),
            };
            let bar = BAR * value / most;
            rect(&mut svg, (x, y + 3.0), (bar, ROW - 7.0), colour(outcome, n));
            for how in [AROUND, LABEL] {
                text(&mut svg, (x + bar + 5.0, y + 14.0), how, &label);
            }
        }
    }
    let horizon = Seconds(terms.horizon(trace).as_secs_f64());
    let key = format!("red: over the limit; pale, never: not moved within {horizon}");
    text(&mut svg, (LEFT, height - 14.0), "fill=\"#666666\"", &key);
    svg.push_str("</svg>\n");
    svg
}

/// What is over the limit is red, and what never ended is pale.
fn colour(outcome: &Outcome, panel: usize) -> &'static str {
    match outcome.rule {
        _ if panel == 3 || (panel == 2 && outcome.overshoot_ms > 0.0) => "#c0392b",
        _ if !outcome.moved => "#dddddd",
        Rule::Gleaner | Rule::GleanerThrottling => "#2471a3",
        Rule::Clairvoyant => "#1e8449",
        _ => "#909497",
    }
}

/// What the guest dirties over time, beside what the link carries.
fn strip(svg: &mut String, trace: &Trace, terms: &Terms) {
    let (top, height) = STRIP;
    let (width, bottom) = (WIDTH - LEFT - MARGIN, top + height);
    let rates = rates(trace);
    let link = terms.bandwidth as f64;
    let most = rates.iter().copied().fold(link, f64::max) * 1.05;
    let y = |rate: f64| bottom - height * rate / most;
    let mut path = format!("M{LEFT:.1},{bottom:.1}");
    for (n, rate) in rates.iter().enumerate() {
        let step = width / rates.len() as f64;
        let (from, to) = (LEFT + step * n as f64, LEFT + step * (n + 1) as f64);
        // Nothing fails in a string.
        let _ = write!(path, " L{from:.1},{y:.1} L{to:.1},{y:.1}", y = y(*rate));
    }
    let _ = writeln!(
        svg,
        "<path d=\"{path} L{:.1},{bottom:.1} Z\" fill=\"#aed6f1\"/>",
        LEFT + width
    );
    line(svg, (LEFT, y(link)), (LEFT + width, y(link)), "#1e8449");
    line(svg, (LEFT, bottom), (LEFT + width, bottom), "#444444");
    let end = "text-anchor=\"end\"";
    text(svg, (LEFT - 10.0, top + 12.0), end, "dirtied");
    let highest = rates.iter().copied().fold(0.0, f64::max);
    text(
        svg,
        (LEFT - 10.0, top + 28.0),
        end,
        &format!("up to {}/s", Bytes(highest)),
    );
    for (line, label) in [
        (0.0, "link".to_owned()),
        (14.0, format!("{}/s", Bytes(link))),
    ] {
        let at = (LEFT + width + 5.0, y(link) + 4.0 + line);
        text(svg, at, "fill=\"#1e8449\"", &label);
    }
    text(svg, (LEFT, bottom + 15.0), "fill=\"#444444\"", "0");
    let length = Seconds(trace.microseconds() as f64 / 1e6).to_string();
    text(
        svg,
        (LEFT + width, bottom + 15.0),
        &format!("{end} fill=\"#444444\""),
        &length,
    );
}

/// Bytes dirtied a second, from moment to moment: what is dirtied in a record, spread over its time.
fn rates(trace: &Trace) -> Vec<f64> {
    let long = trace.microseconds() as f64;
    let mut bytes = vec![0.0; MOMENTS];
    let width = long / MOMENTS as f64;
    let mut start = 0.0;
    for record in trace.records() {
        let until = record.until as f64;
        let dirtied = (record.pages * trace.followed().weight() * PAGE_SIZE) as f64;
        for (n, bytes) in (0u32..).zip(&mut bytes) {
            let (from, to) = (width * f64::from(n), width * f64::from(n + 1));
            let both = to.min(until) - from.max(start);
            if both > 0.0 {
                *bytes += dirtied * both / (until - start);
            }
        }
        start = until;
    }
    bytes
        .iter()
        .map(|bytes| bytes / (width / 1e6).max(1e-9))
        .collect()
}

fn text(svg: &mut String, (x, y): (f64, f64), how: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" {how}>{text}</text>");
}

fn rect(svg: &mut String, (x, y): (f64, f64), (width, height): (f64, f64), fill: &str) {
    let _ = writeln!(
        svg,
        "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{fill}\"/>"
    );
}

fn line(svg: &mut String, from: (f64, f64), to: (f64, f64), colour: &str) {
    let _ = writeln!(
        svg,
        "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{colour}\"/>",
        from.0, from.1, to.0, to.1
    );
}
