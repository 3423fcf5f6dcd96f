//! Numbers of bytes and seconds, as people read them.

use std::fmt;

/// Seconds of a year, which is as long as a time is told in numbers.
pub const YEAR: f64 = 365.0 * 86_400.0;

/// Milliseconds for scripts; `None`, which JSON writes as null, where they are over a year or have no end.
#[must_use]
pub fn within_a_year(ms: f64) -> Option<f64> {
    (ms <= YEAR * 1e3).then_some(ms)
}

/// A number of bytes: `512 B`, `3.4 MiB`, `64 GiB`, or `without end` where it is infinite.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Bytes(pub f64);

/// A time in seconds: `0.31 ms`, `250 ms`, `12 s`, `140 min`, `17 h`, `12 days`. One that nobody waits for is told in words:
/// `over a year`, or `without end` where it is infinite.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Seconds(pub f64);

const ENDLESS: &str = "without end";

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
        if self.0 == f64::INFINITY {
            return f.write_str(ENDLESS);
        }
        let (mut number, mut unit) = (self.0, 0);
        // 1023.6 of a unit would be written as 1024 of it.
        while number >= 1023.5 && unit + 1 < UNITS.len() {
            number /= 1024.0;
            unit += 1;
        }
        digits(f, number)?;
        write!(f, " {}", UNITS[unit])
    }
}

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (number, unit) = match self.0 {
            s if s < 0.9995 => (s * 1e3, "ms"),
            s if s < 599.5 => (s, "s"),
            s if s < 35_970.0 => (s / 60.0, "min"),
            s if s < 4.0 * 86_400.0 => (s / 3600.0, "h"),
            s if s <= YEAR => (s / 86_400.0, "days"),
            f64::INFINITY => return f.write_str(ENDLESS),
            _ => return f.write_str("over a year"),
        };
        digits(f, number)?;
        write!(f, " {unit}")
    }
}

/// Two significant digits, but never less than whole numbers.
fn digits(f: &mut fmt::Formatter<'_>, number: f64) -> fmt::Result {
    match number {
        n if n >= 9.95 => write!(f, "{n:.0}"),
        n if n >= 0.995 => write!(f, "{n:.1}"),
        0.0 => write!(f, "0"),
        n => write!(f, "{n:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_two_digits_and_the_unit_that_suits_them() {
        let bytes = |n: f64| Bytes(n).to_string();
        assert_eq!(bytes(0.0), "0 B");
        assert_eq!(bytes(512.0), "512 B");
        assert_eq!(bytes(1023.6), "1.0 KiB");
        assert_eq!(bytes(3.44 * 1048576.0), "3.4 MiB");
        assert_eq!(bytes(64.0 * 1073741824.0), "64 GiB");
        let time = |s: f64| Seconds(s).to_string();
        assert_eq!(time(0.000_31), "0.31 ms");
        assert_eq!(time(0.25), "250 ms");
        assert_eq!(time(1.25), "1.2 s");
        assert_eq!(time(12.4), "12 s");
        assert_eq!(time(8400.0), "140 min");
        assert_eq!(time(62_000.0), "17 h");
        assert_eq!(time(12.1 * 86_400.0), "12 days");
    }

    #[test]
    fn what_nobody_waits_for_is_told_in_words() {
        let time = |s: f64| Seconds(s).to_string();
        assert_eq!(time(YEAR), "365 days");
        assert_eq!(time(YEAR * 1.001), "over a year");
        assert_eq!(time(1e30), "over a year");
        assert_eq!(time(f64::INFINITY), "without end");
        assert_eq!(Bytes(f64::INFINITY).to_string(), "without end");
        assert_eq!(within_a_year(YEAR * 1e3), Some(YEAR * 1e3));
        for ms in [YEAR * 1001.0, f64::INFINITY, f64::NAN] {
            assert_eq!(within_a_year(ms), None, "{ms}");
        }
    }
}
