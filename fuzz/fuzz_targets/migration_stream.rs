//! `cargo fuzz run migration_stream --features libfuzzer`
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| gleaner_fuzz::migration_stream::run(input));
