//! `cargo fuzz run vcpu_state --features libfuzzer`
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| gleaner_fuzz::vcpu_state::run(input));
