//! See [`redirect_fuzz::cni_result`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| redirect_fuzz::cni_result(data));
