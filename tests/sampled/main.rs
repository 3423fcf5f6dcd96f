//! The rate meter at processes that don't know of it. A program of its own: it loads the machine, and what `rate` tests does
//! something every 50 ms.

#![allow(clippy::unwrap_used)] // a test that can't go on fails

#[path = "../common/mod.rs"]
mod common;
#[path = "../processes/harness.rs"]
#[allow(dead_code)] // used by several test binaries, each of which uses its own part
mod harness;
mod looks;
#[path = "../rate/metrics.rs"]
mod metrics;
mod scattered;
