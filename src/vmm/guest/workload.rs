//! What the guest writes.

use std::fmt;
use std::str::FromStr;

use super::error::quotable;
use super::{GuestError, Result};

/// The rule by which each vCPU picks the page that it writes next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Workload {
    /// It writes nothing.
    Idle,
    /// One page after the other.
    Sweep,
    /// Any page.
    Random,
    /// Any page of a hot set of so many bytes: of the whole guest, shared equally by its vCPUs.
    Hot(u64),
}

impl FromStr for Workload {
    type Err = GuestError;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "idle" => Ok(Self::Idle),
            "sweep" => Ok(Self::Sweep),
            "random" => Ok(Self::Random),
            _ => match text.strip_prefix("hot:") {
                Some(size) => parse_size(size).map(Self::Hot),
                None => Err(GuestError::UnknownWorkload {
                    text: quotable(text),
                }),
            },
        }
    }
}

/// As it is parsed.
impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Idle => f.pad("idle"),
            Self::Sweep => f.pad("sweep"),
            Self::Random => f.pad("random"),
            Self::Hot(bytes) => {
                let suffix = SUFFIXES
                    .iter()
                    .find(|(_, shift)| bytes != 0 && bytes.trailing_zeros() >= *shift);
                match suffix {
                    Some((letter, shift)) => f.pad(&format!("hot:{}{letter}", bytes >> shift)),
                    None => f.pad(&format!("hot:{bytes}")),
                }
            }
        }
    }
}

/// The largest first, so that a size is printed in the shortest way.
const SUFFIXES: [(char, u32); 3] = [('G', 30), ('M', 20), ('K', 10)];

/// A positive number of bytes, with the suffix K, M or G (in either case, powers of 1024) or without one.
///
/// # Errors
/// [`GuestError::BadSize`], also for zero and for what exceeds 64 bits.
pub fn parse_size(text: &str) -> Result<u64> {
    let last = text.chars().last().unwrap_or_default();
    let suffix = SUFFIXES
        .iter()
        .find(|(letter, _)| last.eq_ignore_ascii_case(letter));
    let (digits, shift) = match suffix {
        Some((_, shift)) => (&text[..text.len() - 1], *shift),
        None => (text, 0),
    };
    // `parse` would take a sign.
    let plain = digits.bytes().all(|b| b.is_ascii_digit());
    plain
        .then(|| digits.parse::<u64>().ok())
        .flatten()
        .and_then(|number| number.checked_mul(1 << shift))
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| GuestError::BadSize {
            text: quotable(text),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_workload_agree() {
        for (text, workload) in [
            ("idle", Workload::Idle),
            ("sweep", Workload::Sweep),
            ("random", Workload::Random),
            ("hot:4K", Workload::Hot(4096)),
            ("hot:3M", Workload::Hot(3 << 20)),
            ("hot:2G", Workload::Hot(2 << 30)),
            ("hot:5000", Workload::Hot(5000)),
        ] {
            assert_eq!(text.parse::<Workload>().unwrap(), workload);
            assert_eq!(workload.to_string(), text);
        }
        assert_eq!(
            "hot:2048k".parse::<Workload>().unwrap().to_string(),
            "hot:2M"
        );
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for text in ["", "Idle", "hot", "sweep ", "random:1M"] {
            let error = text.parse::<Workload>().unwrap_err();
            assert!(
                matches!(error, GuestError::UnknownWorkload { .. }),
                "{text}"
            );
        }
        for size in [
            "",
            "K",
            "0",
            "0M",
            "-1K",
            "+1K",
            "1T",
            "1.5M",
            "1 M",
            "é",
            "99999999999999999999",
            "18446744073709551615K",
        ] {
            let error = format!("hot:{size}").parse::<Workload>().unwrap_err();
            assert!(matches!(error, GuestError::BadSize { .. }), "{size}");
        }
        let long = "x\n"
            .repeat(1000)
            .parse::<Workload>()
            .unwrap_err()
            .to_string();
        assert!(long.len() < 200 && !long.contains('\n'));
    }
}
