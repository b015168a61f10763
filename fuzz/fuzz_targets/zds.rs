//! See [`redirect_fuzz::zds`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| redirect_fuzz::zds(data));
