//! Sizes, rates and durations, as they are written on the command line.

use std::path::PathBuf;
use std::time::Duration;

use gleaner_migrate::Address;

use crate::vmm::guest::MemoryMap;

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
    let number = digits
        .parse()
        .ok()
        .and_then(|n: u64| n.checked_mul(1 << shift));
    match number {
        Some(0) => Err(format!(
            "\"{text}\" is no size: it has to be more than nothing"
        )),
        Some(number) => Ok(number),
        None => Err(format!(
            "\"{text}\" is no size: at most 16777215T can be written"
        )),
    }
}

/// The path of a Unix socket, written as an address.
pub fn unix_path(text: &str) -> Result<PathBuf, String> {
    match text.parse() {
        Ok(Address::Unix(path)) => Ok(path),
        Ok(_) => Err(format!("\"{text}\" is no Unix socket: write unix:PATH")),
        Err(error) => Err(error.to_string()),
    }
}

/// A duration: a number and `ms`, `s`, `m` (minutes) or `h`.
pub fn duration(text: &str) -> Result<Duration, String> {
    const UNITS: [(&str, f64); 4] = [("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];
    let bad = || format!("\"{text}\" is no duration: write 300ms, 2s, 5m (minutes) or 1h");
    let found = UNITS
        .iter()
        .find_map(|(unit, seconds)| Some((text.strip_suffix(unit)?, seconds)));
    let (number, seconds) = found.ok_or_else(bad)?;
    if !number.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return Err(bad());
    }
    let number: f64 = number.parse().map_err(|_| bad())?;
    Duration::try_from_secs_f64(number * seconds)
        .map_err(|_| format!("\"{text}\" is no duration: it is too long"))
}

/// A duration that is not nothing.
pub fn time_limit(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err(format!("\"{text}\" leaves no time at all")),
        limit => Ok(limit),
    }
}

/// A part of a whole, above 0 and no more than all: a number and `%`.
pub fn part(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').and_then(|n| n.parse::<f64>().ok());
    let part = number.map(|percent| percent / 100.0);
    let good = part.filter(|part| *part >= 1e-5 && *part <= 1.0);
    good.ok_or_else(|| format!("\"{text}\" is no part of a whole: write 5% or 0.5%"))
}

/// The RAM of a reference guest.
pub fn ram(text: &str) -> Result<u64, String> {
    let bytes = size(text)?;
    MemoryMap::new(bytes, 1)
        .map(|_| bytes)
        .map_err(|error| error.to_string())
}

/// The vCPUs of a reference guest.
pub fn vcpus(text: &str) -> Result<usize, String> {
    let vcpus = text
        .parse()
        .map_err(|_| format!("\"{text}\" is no number of vCPUs"))?;
    let least = 4 << 20;
    MemoryMap::new(least, vcpus)
        .map(|_| vcpus)
        .map_err(|error| error.to_string())
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
    #![allow(clippy::unwrap_used)] // helpers are not known to be tests
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
        assert_eq!(duration("1m"), Ok(Duration::from_secs(60)));
        assert_eq!(duration("1.5h"), Ok(Duration::from_secs(5400)));
        for bad in ["", "s", "h", "300", "-1s", "1d", "infs", "nans", "1e400s"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        assert!(
            duration("99999999999999999999h")
                .unwrap_err()
                .contains("too long")
        );
        assert!(size("0K").unwrap_err().contains("more than nothing"));
        assert!(size("17179869184G").unwrap_err().contains("at most"));
        assert_eq!(size("16777215T"), Ok(16_777_215 << 40));
        assert_eq!(
            (part("5%"), part("0.5%"), part("100%")),
            (Ok(0.05), Ok(0.005), Ok(1.0))
        );
        for bad in ["", "%", "5", "0%", "-1%", "101%", "nan%", "inf%", "1e-9%"] {
            assert!(part(bad).is_err(), "{bad}");
        }
        assert!(time_limit("0ms").is_err() && time_limit("0.0s").is_err());
        assert!(churn("0").is_err() && churn("nan").is_err() && churn("inf").is_err());
    }
}
