//! The architectures that programs are built for.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;

use crate::packages::{Evidence, Package, Packages};
use crate::progress;
use crate::userspace::Programs;
use crate::workspace::Workspace;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Architecture {
    #[value(name = "x86_64")]
    X86_64,
    #[value(name = "aarch64")]
    Aarch64,
}

impl Architecture {
    /// The architecture of this machine.
    pub(crate) const HOST: Self = if cfg!(target_arch = "aarch64") { Self::Aarch64 } else { Self::X86_64 };

    pub(crate) const ALL: [Self; 2] = [Self::X86_64, Self::Aarch64];

    /// Its name in Rust and the kernel.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        }
    }

    /// Its name in Debian and OCI images.
    pub(crate) const fn in_packages(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::Aarch64 => "arm64",
        }
    }

    /// Rust's target.
    pub(crate) const fn target(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-unknown-linux-gnu",
            Self::Aarch64 => "aarch64-unknown-linux-gnu",
        }
    }

    /// The C cross compiler, which is also the linker.
    pub(crate) const fn compiler(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-linux-gnu-gcc",
            Self::Aarch64 => "aarch64-linux-gnu-gcc",
        }
    }

    /// The directories of the static C library for cross compilation.
    const fn c_library(self) -> &'static [&'static str] {
        match self {
            Self::X86_64 => &["/usr/x86_64-linux-gnu/lib/libc.a"],
            Self::Aarch64 => &["/usr/aarch64-linux-gnu/lib/libc.a"],
        }
    }

    /// The emulator for its programs on another machine.
    const fn emulator(self) -> &'static str {
        match self {
            Self::X86_64 => "qemu-x86_64-static",
            Self::Aarch64 => "qemu-aarch64-static",
        }
    }

    /// `e_machine` of its programs.
    const fn elf(self) -> u16 {
        match self {
            Self::X86_64 => 62,
            Self::Aarch64 => 183,
        }
    }

    /// Ensures that programs for it can be built here.
    pub(crate) fn ensure(self, workspace: &Workspace) -> Result<()> {
        if self == Self::HOST {
            return Ok(());
        }
        let name = self.in_packages();
        Packages::new(workspace).ensure(&[
            Package::new(
                format!("gcc-{}-linux-gnu", self.name().replace('_', "-")),
                Evidence::Program(self.compiler()),
                "programs of another architecture are compiled and linked with it",
            ),
            Package::new(
                format!("libc6-dev-{name}-cross"),
                Evidence::File(self.c_library()),
                "the C library in programs of another architecture",
            ),
            Package::new(
                "qemu-user-static",
                Evidence::Program(self.emulator()),
                "programs of another architecture are tried out with it",
            ),
        ])?;
        self.ensure_library(workspace)
    }

    /// Rust's standard library, from the same source as the compiler.
    fn ensure_library(self, workspace: &Workspace) -> Result<()> {
        let mut rustc = workspace.command("rustc");
        rustc.args(["--print", "target-libdir", "--target", self.target()]);
        let output = rustc.output().context("cannot run rustc")?;
        if output.status.success() && Path::new(String::from_utf8_lossy(&output.stdout).trim()).exists() {
            return Ok(());
        }
        if workspace.which("rustup").is_none() {
            bail!(
                "rustc has no library for {}\nremedy: install it from where rustc came from",
                self.target()
            );
        }
        let mut rustup = workspace.command("rustup");
        rustup.args(["target", "add", self.target()]);
        progress::run(workspace, &format!("installing {}", self.target()), "rustup", &mut rustup)
    }

    /// Checks that a program can run in an otherwise empty image: static, and for this architecture.
    pub(crate) fn check(self, program: &[u8]) -> Result<()> {
        let (machine, interpreter) = examine(program).context("no ELF program")?;
        ensure!(machine == self.elf(), "it is for another machine ({machine})");
        ensure!(!interpreter, "it is not static");
        Ok(())
    }

    /// Runs a program of another architecture with `--version`.
    pub(crate) fn try_out(self, workspace: &Workspace, programs: &Programs) -> Result<()> {
        if self == Self::HOST {
            return Ok(());
        }
        let mut command = workspace.command(self.emulator());
        command.arg(&programs.redirect).arg("--version");
        let output = command.output().with_context(|| format!("cannot run {}", self.emulator()))?;
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        let failure = String::from_utf8_lossy(&output.stderr);
        ensure!(said.ends_with(env!("CARGO_PKG_VERSION")), "{command:?}: {} {said}{failure}", output.status);
        println!("{}: {said}", self.emulator());
        Ok(())
    }
}

/// The machine type of a 64-bit ELF program, and whether it needs a dynamic loader.
fn examine(program: &[u8]) -> Option<(u16, bool)> {
    /// `PT_INTERP`.
    const INTERPRETER: u32 = 3;
    let bytes = |at: usize, length: usize| program.get(at..at.checked_add(length)?);
    let half = |at: usize| Some(u16::from_le_bytes(bytes(at, 2)?.try_into().ok()?));
    let word = |at: usize| Some(u32::from_le_bytes(bytes(at, 4)?.try_into().ok()?));
    let long = |at: usize| Some(u64::from_le_bytes(bytes(at, 8)?.try_into().ok()?));
    if bytes(0, 6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let (headers, size, count) = (usize::try_from(long(0x20)?).ok()?, half(0x36)?, half(0x38)?);
    let mut interpreter = false;
    for number in 0..usize::from(count) {
        interpreter |= word(headers.checked_add(number * usize::from(size))?)? == INTERPRETER;
    }
    Some((half(0x12)?, interpreter))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF header and program headers of these kinds.
    fn program(machine: u16, kinds: &[u32]) -> Vec<u8> {
        let mut bytes = vec![0; 0x40];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[0x12..0x14].copy_from_slice(&machine.to_le_bytes());
        bytes[0x20..0x28].copy_from_slice(&0x40_u64.to_le_bytes());
        bytes[0x36..0x38].copy_from_slice(&56_u16.to_le_bytes());
        bytes[0x38..0x3a].copy_from_slice(&(kinds.len() as u16).to_le_bytes());
        for kind in kinds {
            bytes.extend(kind.to_le_bytes());
            bytes.extend([0; 52]);
        }
        bytes
    }

    #[test]
    fn static_programs_of_the_architecture_pass() {
        for architecture in Architecture::ALL {
            let elf = architecture.elf();
            architecture.check(&program(elf, &[1, 1, 6])).unwrap();
            assert!(
                architecture.check(&program(elf, &[6, 3, 1])).unwrap_err().to_string().contains("static")
            );
            assert!(architecture.check(&program(elf + 1, &[1])).unwrap_err().to_string().contains("machine"));
            architecture.check(b"#!/bin/sh").unwrap_err();
            let mut cut = program(elf, &[1, 3]);
            cut.truncate(0x50);
            architecture.check(&cut).unwrap_err();
        }
    }

    #[test]
    fn the_shell_is_of_this_machine_and_not_static() {
        let shell = std::fs::read("/bin/sh").unwrap();
        assert_eq!(examine(&shell), Some((Architecture::HOST.elf(), true)));
    }
}
