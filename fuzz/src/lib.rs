//! What a peer, a file or a guest may send to Gleaner, as functions of bytes.
//!
//! Each target takes any bytes. It panics when Gleaner does, when Gleaner allocates over a stated cap, or when Gleaner and
//! a naive copy of what it shall do come to different ends. `cargo fuzz` searches for such bytes; the tests replay what is
//! in `corpus/` and a little around it.

pub mod agent;
pub mod allocations;
mod bytes;
pub mod layouts;
pub mod migration_stream;
pub mod qemu_stream;
pub mod seeds;
pub mod service;
pub mod trace;
pub mod vcpu_state;

/// Longest input in bytes; what is longer is cut. Four times what libFuzzer makes by itself.
pub const MAX_INPUT: usize = 16 << 10;

/// A target: its name, which is that of its corpus too, and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: [Target; 7] = [
    ("migration_stream", migration_stream::run),
    ("service", service::run),
    ("agent", agent::run),
    ("layouts", layouts::run),
    ("vcpu_state", vcpu_state::run),
    ("qemu_stream", qemu_stream::run),
    ("trace", trace::run),
];
