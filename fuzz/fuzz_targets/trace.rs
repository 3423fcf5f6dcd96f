//! `cargo fuzz run trace --features libfuzzer`
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| gleaner_fuzz::trace::run(input));
