//! The rate meter: in the process that runs the guest, and through its service.

#![allow(clippy::unwrap_used)] // a test that can't go on fails

mod beside;
#[path = "../common/mod.rs"]
mod common;
mod exact;
mod failures;
#[path = "../processes/harness.rs"]
#[allow(dead_code)] // used by several test binaries, each of which uses its own part
mod harness;
mod metrics;
mod outputs;
