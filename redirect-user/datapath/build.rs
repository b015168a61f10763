//! Embeds the kernel side's object, built by `cargo xtask build-ebpf`, into the `redirect` binary.
//!
//! Without the object (plain `cargo check` on a machine without the BPF toolchain) an empty file is embedded,
//! and the agent explains at start how to build it.

use std::path::PathBuf;
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-env-changed=REDIRECT_BPF_OBJECT");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("redirect.o");
    let object = env::var_os("REDIRECT_BPF_OBJECT").map(PathBuf::from);
    let bytes = match &object {
        Some(path) => {
            println!("cargo:rerun-if-changed={}", path.display());
            fs::read(path).unwrap_or_default()
        }
        None => Vec::new(),
    };
    fs::write(&out, bytes).expect("OUT_DIR is writable");
}
