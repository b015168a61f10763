//! See [`redirect_fuzz::conflist`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| redirect_fuzz::conflist(data));
