//! Sizes, rates and durations, as they are written on the command line.

use std::time::Duration;

/// A number of bytes: digits and K, M, G or T, which are powers of 1024.
pub fn size(text: &str) -> Result<u64, String> {
    let bad = || format!("\"{text}\" is no size: write digits and K, M, G or T, as in 256M");
    let (digits, shift) = match text.bytes().last().map(|b| b.to_ascii_uppercase()) {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        Some(b'T') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(bad());
    }
    let number: u64 = digits.parse().map_err(|_| bad())?;
    number
        .checked_mul(1 << shift)
        .filter(|&n| n > 0)
        .ok_or_else(bad)
}

/// A duration: a number and `ms` or `s`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("\"{text}\" is no duration: write 300ms or 2s");
    let (number, unit) = match text.strip_suffix("ms") {
        Some(number) => (number, 1e-3),
        None => (text.strip_suffix('s').ok_or_else(bad)?, 1.0),
    };
    if !number.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return Err(bad());
    }
    let number: f64 = number.parse().map_err(|_| bad())?;
    Duration::try_from_secs_f64(number * unit).map_err(|_| bad())
}

/// Transactions a second: a positive number, or `max`.
pub fn churn(text: &str) -> Result<Churn, String> {
    if text == "max" {
        return Ok(Churn(None));
    }
    match text.parse::<f64>() {
        Ok(rate) if rate.is_finite() && rate > 0.0 => Ok(Churn(Some(rate))),
        _ => Err(format!(
            "\"{text}\" is no rate: write a number above 0 (transactions a second), or max"
        )),
    }
}

/// How many transactions a second; `None` means as many as possible.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Churn(pub Option<f64>);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_durations_are_read_or_refused() {
        assert_eq!(size("64"), Ok(64));
        assert_eq!(size("3k"), Ok(3072));
        assert_eq!(size("2T"), Ok(2 << 40));
        for bad in [
            "",
            "K",
            "-1",
            "+1",
            "1.5G",
            "0",
            "99999999999999999999",
            "17179869184G",
            "1µ",
        ] {
            assert!(size(bad).is_err(), "{bad}");
        }
        assert_eq!(duration("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        for bad in ["", "s", "300", "-1s", "1m", "infs", "nans", "1e400s"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        assert!(churn("0").is_err() && churn("nan").is_err() && churn("inf").is_err());
    }
}
