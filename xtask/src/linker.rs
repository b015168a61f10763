//! `bpf-linker`, which must use the same LLVM as the rustc whose bitcode it links.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::packages::{Evidence, Package, Packages};
use crate::progress::{self, Watch};
use crate::toolchain::Rustc;
use crate::workspace::{Workspace, cargo_home};

const VERSION: &str = "0.13.0";

/// Finds a `bpf-linker` that matches `rustc`, or builds one below `target/tools`.
pub(crate) fn ensure(workspace: &Workspace, packages: &Packages<'_>, rustc: &Rustc) -> Result<PathBuf> {
    // A linker that the user names is not checked.
    if let Some(named) = env::var_os("BPF_LINKER") {
        return Ok(named.into());
    }
    let llvm = rustc.llvm();
    let root = workspace.target(format!("tools/bpf-linker-{VERSION}-llvm{llvm}"));
    let ours = root.join("bin/bpf-linker");
    let candidates = [
        workspace.which("bpf-linker"),
        cargo_home().map(|home| home.join("bin/bpf-linker")),
        Some(ours.clone()),
    ];
    if let Some(found) = candidates.into_iter().flatten().find(|path| matches(workspace, path, llvm)) {
        return Ok(found);
    }
    install(workspace, packages, llvm, &root)?;
    if !matches(workspace, &ours, llvm) {
        bail!("{} was built but is not {VERSION} on LLVM {llvm}", ours.display());
    }
    Ok(ours)
}

fn install(workspace: &Workspace, packages: &Packages<'_>, llvm: u32, root: &Path) -> Result<()> {
    let mut cargo = workspace.cargo();
    // The linker is an ordinary program of this machine, not one of the project's.
    for variable in ["CARGO_TARGET_DIR", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET"] {
        cargo.env_remove(variable);
    }
    if packages.has_apt() {
        packages.ensure(&[Package::new(
            "g++",
            Evidence::Program("c++"),
            "bpf-linker links LLVM, which is C++",
        )
        .in_place()])?;
        packages.ensure_together(&llvm_packages(llvm))?;
        let prefix = format!("/usr/lib/llvm-{llvm}");
        let private = packages.private().file(&prefix);
        if private.is_some() {
            let libraries = packages.private().libraries();
            let flag = |path: &PathBuf| {
                let path = path.display();
                format!("-Lnative={path}\x1f-Clink-arg=-Wl,-rpath,{path}")
            };
            cargo.env("LD_LIBRARY_PATH", env::join_paths(&libraries)?);
            cargo.env("CARGO_ENCODED_RUSTFLAGS", libraries.iter().map(flag).collect::<Vec<_>>().join("\x1f"));
        }
        let prefix = private.unwrap_or_else(|| prefix.into());
        let path = env::var_os("PATH").unwrap_or_default();
        let path = env::join_paths(std::iter::once(prefix.join("bin")).chain(env::split_paths(&path)))?;
        cargo.env("PATH", path).env(format!("LLVM_SYS_{llvm}1_PREFIX"), &prefix);
    } else if !llvm_config_is(workspace, llvm) {
        bail!(
            "no bpf-linker {VERSION} on LLVM {llvm} here, and no LLVM {llvm} to build one with\n\
             remedy: install LLVM {llvm}'s development files with llvm-config in PATH, or name a linker in BPF_LINKER"
        );
    }
    cargo.args(["install", "bpf-linker", "--locked", "--version", VERSION, "--no-default-features"]);
    cargo.args(["--features", &format!("llvm-{llvm}"), "--root"]).arg(root);
    // Linking time is spent in LLVM, which is precompiled.
    cargo.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0").env("CARGO_PROFILE_RELEASE_DEBUG", "false");
    let what = format!("building bpf-linker {VERSION} on LLVM {llvm}");
    progress::watch(workspace, &what, "bpf-linker", &mut cargo, Watch::Cargo).context("no bpf-linker")
}

/// The Debian packages for building it.
fn llvm_packages(llvm: u32) -> Vec<Package> {
    vec![
        Package::new(format!("llvm-{llvm}-dev"), Evidence::Installed, "bpf-linker is built on rustc's LLVM"),
        Package::new(format!("libpolly-{llvm}-dev"), Evidence::Installed, "LLVM's own libraries name it"),
        Package::new("libzstd-dev", Evidence::Installed, "LLVM's own libraries name it"),
        Package::new("zlib1g-dev", Evidence::Installed, "LLVM's own libraries name it"),
    ]
}

fn matches(workspace: &Workspace, linker: &Path, llvm: u32) -> bool {
    let answer = |program: &Path, argument: &Path| {
        let output = workspace.command(program).arg(argument).output().ok()?;
        Some(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    linker.exists()
        && answer(linker, Path::new("--version")).is_some_and(|text| is_version(&text))
        && answer(Path::new("ldd"), linker).is_some_and(|text| linked_llvm(&text) == Some(llvm))
}

fn is_version(text: &str) -> bool {
    text.split_whitespace().nth(1) == Some(VERSION)
}

/// The major version of the LLVM that a program is linked with, from `ldd`.
fn linked_llvm(text: &str) -> Option<u32> {
    let library = text.lines().map(str::trim).find(|line| line.starts_with("libLLVM"))?;
    let (name, found) = library.split_once(" => ").unwrap_or((library, ""));
    if found.contains("not found") {
        return None;
    }
    // libLLVM.so.22.1 and libLLVM-22.so are both in use.
    let digits = name.trim_start_matches(|c: char| !c.is_ascii_digit());
    digits.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

fn llvm_config_is(workspace: &Workspace, llvm: u32) -> bool {
    let Some(program) = workspace.which("llvm-config") else { return false };
    let output = workspace.command(program).arg("--version").output();
    output.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).starts_with(&format!("{llvm}.")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_linkers_llvm_is_read_from_ldd() {
        let cases = [
            (
                "\tlinux-vdso.so.1 (0x0)\n\tlibLLVM.so.22.1 => /usr/lib/llvm-22/lib/libLLVM.so.22.1 (0x0)\n",
                Some(22),
            ),
            ("\tlibLLVM-21.so => /usr/lib64/libLLVM-21.so (0x0)\n", Some(21)),
            ("\tlibLLVM.so.22.1 => not found\n\tlibc.so.6 => /lib/libc.so.6 (0x0)\n", None),
            ("\tstatically linked\n", None),
            ("", None),
        ];
        for (text, expected) in cases {
            assert_eq!(linked_llvm(text), expected, "{text}");
        }
    }

    #[test]
    fn only_one_version_of_the_linker_will_do() {
        let cases = [("bpf-linker 0.13.0\n", true), ("bpf-linker 0.12.1\n", false), ("", false)];
        for (text, expected) in cases {
            assert_eq!(is_version(text), expected, "{text}");
        }
    }
}
