//! `cargo fuzz run qemu_stream --features libfuzzer`
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| gleaner_fuzz::qemu_stream::run(input));
