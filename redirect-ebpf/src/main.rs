//! The eBPF programs of ambient-redirect. Built for `bpfel-unknown-none` by `cargo xtask build-ebpf`; for any other
//! target this is an empty program, so that the package is checked, linted and tested with the rest of the workspace.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]

#[cfg(target_arch = "bpf")]
mod kernel;

#[cfg(not(target_arch = "bpf"))]
fn main() {
    eprintln!("the programs of this package run in the kernel: build them with `cargo xtask build-ebpf`");
    std::process::exit(2);
}
