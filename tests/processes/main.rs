//! The command line as its users have it: real processes, real sockets, real signals.

#![allow(clippy::unwrap_used)] // a test that can't go on fails

mod backends;
mod bad_streams;
#[path = "../../migrate/tests/common/certificates.rs"]
mod certificates;
#[path = "../common/mod.rs"]
mod common;
mod contract;
mod convergence;
mod cuts;
mod demo;
mod disk;
mod ends;
mod failures;
mod harness;
mod hops;
mod kills;
mod local;
mod plan;
mod proxy;
mod slowed;
mod soak;
mod steps;
mod storms;
#[cfg(feature = "tls")]
mod tls;
mod verify;
mod way;
mod ways;
