//! `cargo fuzz run agent --features libfuzzer`
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| gleaner_fuzz::agent::run(input));
