//! What is printed.

use std::fmt;

use serde::Serialize;

use crate::sample::Spread;

/// Whether an aim was reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It was.
    Ok,
    /// It was not.
    Short,
    /// There is none.
    Told,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Short => "short",
            Self::Told => "told",
        })
    }
}

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    name: String,
    /// As text, with its unit.
    aim: String,
    /// The median, with its unit.
    reached: String,
    verdict: Verdict,
    /// First and third quartile, with the unit.
    spread: String,
    /// What was measured, and beside what.
    compared: String,
}

/// How an aim is stated.
#[derive(Clone, Copy, Debug)]
pub enum Aim {
    /// Less is better: at most this.
    AtMost(f64),
    /// More is better: at least this.
    AtLeast(f64),
    /// There is none: the figure is told.
    None,
}

impl Row {
    /// A row: `value` in `unit` against `aim`.
    pub fn new(
        name: impl Into<String>,
        aim: Aim,
        value: Spread,
        unit: &str,
        compared: impl Into<String>,
    ) -> Self {
        let reached = |good| if good { Verdict::Ok } else { Verdict::Short };
        let (text, verdict) = match aim {
            Aim::AtMost(most) => (
                format!("<= {}", told(most, unit)),
                reached(value.median <= most),
            ),
            Aim::AtLeast(least) => (
                format!(">= {}", told(least, unit)),
                reached(value.median >= least),
            ),
            Aim::None => ("none".into(), Verdict::Told),
        };
        Self {
            name: name.into(),
            aim: text,
            reached: told(value.median, unit),
            verdict,
            spread: format!("{}..{}", told(value.low, unit), told(value.high, unit)),
            compared: compared.into(),
        }
    }

    /// The head of a table of rows, in Markdown.
    pub const HEAD: &str =
        "| row | aim | reached (quartiles) | | beside what |\n|---|---|---|---|---|";

    /// A line of that table.
    #[must_use]
    pub fn markdown(&self) -> String {
        let Self {
            name,
            aim,
            reached,
            spread,
            compared,
            verdict,
        } = self;
        format!("| `{name}` | {aim} | {reached} ({spread}) | {verdict} | {compared} |")
    }

    /// A row with a second aim, which is as good as its own.
    #[must_use]
    pub fn or(mut self, other: &Self) -> Self {
        for (mine, others) in [
            (&mut self.aim, &other.aim),
            (&mut self.reached, &other.reached),
            (&mut self.spread, &other.spread),
        ] {
            *mine += " or ";
            *mine += others;
        }
        if other.verdict == Verdict::Ok {
            self.verdict = Verdict::Ok;
        }
        self
    }
}

/// A number as people read it: as many digits as it is worth.
fn told(value: f64, unit: &str) -> String {
    let digits = match value.abs() {
        0.0..9.995 => 2,
        9.995..99.95 => 1,
        _ => 0,
    };
    format!("{value:.digits$} {unit}")
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:<34} aim {:<14} reached {:<14} {:<6} [{}] {}",
            self.name, self.aim, self.reached, self.verdict, self.spread, self.compared
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(aim: Aim, median: f64) -> Row {
        let value = Spread {
            low: 0.0,
            median,
            high: 9.0,
        };
        Row::new("x", aim, value, "ns", "")
    }

    fn verdict(aim: Aim, median: f64) -> Verdict {
        row(aim, median).verdict
    }

    #[test]
    fn aims_have_a_direction() {
        assert_eq!(verdict(Aim::AtMost(5.0), 5.0), Verdict::Ok);
        assert_eq!(verdict(Aim::AtMost(5.0), 5.1), Verdict::Short);
        assert_eq!(verdict(Aim::AtLeast(5.0), 5.0), Verdict::Ok);
        assert_eq!(verdict(Aim::AtLeast(5.0), 4.9), Verdict::Short);
    }
    #[test]
    fn either_of_two_aims_is_enough() {
        let aims = [(4.9, 4.9), (5.0, 4.9), (4.9, 5.0), (5.0, 5.0)];
        let verdicts = aims.map(|(one, other)| {
            let [one, other] = [one, other].map(|value| row(Aim::AtLeast(5.0), value));
            one.or(&other).verdict
        });
        assert_eq!(
            verdicts,
            [Verdict::Short, Verdict::Ok, Verdict::Ok, Verdict::Ok]
        );
        let both = row(Aim::AtLeast(5.0), 4.0).or(&row(Aim::AtLeast(5.0), 6.0));
        assert_eq!(both.reached, "4.00 ns or 6.00 ns");
    }
}
