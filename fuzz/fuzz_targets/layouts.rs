//! `cargo fuzz run layouts --features libfuzzer`
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| gleaner_fuzz::layouts::run(input));
