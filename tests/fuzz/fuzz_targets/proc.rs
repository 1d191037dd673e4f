#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| pageferry_tests::fuzz::proc(input));
