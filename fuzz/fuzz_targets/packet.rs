//! See [`redirect_fuzz::packet`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| redirect_fuzz::packet(data));
