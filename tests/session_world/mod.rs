//! A service in memory: a toy guest, and the host that stands between its session and agents.
#![allow(dead_code, clippy::unwrap_used)] // helpers of tests, each of which uses its own part

pub mod actors;
pub mod guest;
pub mod host;
pub mod line;
pub mod steps;
pub mod world;

/// What does not hold, in words.
pub type Verdict = Result<(), String>;

pub fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Verdict {
    if holds { Ok(()) } else { Err(otherwise()) }
}
