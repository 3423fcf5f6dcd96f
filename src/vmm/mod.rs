//! The tiny VMM that the tests, the demonstrations and the benchmarks run.

#[cfg(target_arch = "x86_64")]
pub mod guest;
