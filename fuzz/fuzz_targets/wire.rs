//! See [`redirect_fuzz::wire`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| redirect_fuzz::wire(data));
