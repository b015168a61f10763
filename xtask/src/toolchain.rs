//! The compiler of the kernel side: a rustc with the source of core, because there is no prebuilt core for the BPF
//! target.
//!
//! rustup's rustc qualifies if its component `rust-src` is installed. Otherwise Debian's packages `rustc-web` and
//! `rust-web-src` do; cargo remains the one that runs this task.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::packages::{Evidence, Package};
use crate::workspace::{Workspace, cargo};

/// The versions of LLVM for which `bpf-linker` can be built.
const LLVM: std::ops::RangeInclusive<u32> = 21..=23;

/// Where a distribution puts its rustc.
const DISTRIBUTION_RUSTC: &str = "/usr/bin/rustc";

/// A rustc for the kernel side.
#[derive(Debug)]
pub(crate) struct Rustc {
    path: PathBuf,
    version: Version,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    release: (u32, u32),
    llvm: u32,
}

impl Rustc {
    /// The first rustc that can build the kernel side. The error contains the problem of each.
    pub(crate) fn find(workspace: &Workspace) -> Result<Self> {
        let in_use = env::var_os("RUSTC").map_or_else(|| "rustc".into(), PathBuf::from);
        let mut complaints = Vec::new();
        // Not through PATH: the first rustc there is the current one.
        let private = workspace.private_programs().join("rustc");
        for path in [in_use.as_path(), Path::new(DISTRIBUTION_RUSTC), private.as_path()] {
            match Self::examine(workspace, path) {
                Ok(rustc) => return Ok(rustc),
                Err(complaint) => complaints.push(format!("  {}: {complaint:#}", path.display())),
            }
        }
        bail!("no rustc here can build for the BPF target:\n{}\nremedy: {REMEDY}", complaints.join("\n"))
    }

    fn examine(workspace: &Workspace, path: &Path) -> Result<Self> {
        let version = Version::parse(&ask(workspace, path, &["-vV"])?).context("unknown answer to -vV")?;
        version.check()?;
        let sysroot = ask(workspace, path, &["--print", "sysroot"])?;
        let core = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs");
        if !core.exists() {
            bail!("core's source (rust-src) is not installed beside it");
        }
        Ok(Self { path: path.to_owned(), version })
    }

    pub(crate) fn llvm(&self) -> u32 {
        self.version.llvm
    }

    pub(crate) fn describe(&self) -> String {
        let Version { release: (major, minor), llvm } = self.version;
        format!("{} {major}.{minor}, LLVM {llvm}", self.path.display())
    }

    /// A cargo command that compiles with this rustc. `RUSTC_BOOTSTRAP` allows a stable one to build core.
    pub(crate) fn cargo(&self, workspace: &Workspace, subcommand: &str) -> Command {
        let mut command = workspace.cargo();
        command.arg(subcommand);
        self.environment(&mut command);
        command
    }

    /// A clippy command with the lints of this rustc. The clippy of another version could not read its core.
    pub(crate) fn clippy(&self, workspace: &Workspace) -> Command {
        let own = self.path.with_file_name("cargo-clippy");
        if self.path.components().count() == 1 || !own.exists() {
            return self.cargo(workspace, "clippy");
        }
        let mut command = workspace.command(own);
        command.arg("clippy").env("CARGO", cargo());
        self.environment(&mut command);
        command
    }

    /// The packages that `clippy` needs in addition to this rustc.
    pub(crate) fn clippy_packages(&self) -> Vec<Package> {
        // Rustup's includes it.
        if !self.path.is_absolute() {
            return Vec::new();
        }
        const DRIVER: &[&str] = &["/usr/bin/clippy-driver"];
        let clippy =
            Package::new("rust-web-clippy", Evidence::File(DRIVER), "lints of the kernel side's compiler");
        let is_installed = self.path == Path::new(DISTRIBUTION_RUSTC);
        vec![if is_installed { clippy.in_place() } else { clippy.unpacked() }]
    }

    fn environment(&self, command: &mut Command) {
        command.env("RUSTC", &self.path).env("RUSTC_BOOTSTRAP", "1");
    }
}

/// Debian's compiler with core's source.
pub(crate) fn packages() -> [Package; 2] {
    [
        Package::new("rustc-web", Evidence::Installed, "a rustc whose core's source can be installed"),
        Package::new("rust-web-src", Evidence::Installed, "core's source, to build it for the BPF target"),
    ]
}

/// The remedy if apt has no compiler that is new enough.
const REMEDY: &str = "rustup component add rust-src, for the toolchain in use";

fn ask(workspace: &Workspace, rustc: &Path, arguments: &[&str]) -> Result<String> {
    if rustc.is_absolute() && !rustc.exists()
        || rustc.components().count() == 1 && workspace.which("rustc").is_none()
    {
        bail!("not there");
    }
    let output = workspace.command(rustc).args(arguments).output().context("cannot run it")?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

impl Version {
    /// Parses the output of `rustc -vV`.
    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        let llvm = field("LLVM version")?.split('.').next()?.trim().parse().ok()?;
        Some(Self { release: major_minor(field("release")?)?, llvm })
    }

    fn check(self) -> Result<()> {
        let (major, minor) = self.release;
        let needed = env!("CARGO_PKG_RUST_VERSION");
        if Some(self.release) < major_minor(needed) {
            bail!("its version is {major}.{minor}, at least {needed} is needed");
        }
        if !LLVM.contains(&self.llvm) {
            bail!("bpf-linker does not know its LLVM {}, only {} to {}", self.llvm, LLVM.start(), LLVM.end());
        }
        Ok(())
    }
}

fn major_minor(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split(['.', '-']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_rustc() {
        let rustup = "rustc 1.95.0 (59807616e 2026-04-14)\nbinary: rustc\nhost: x86_64-unknown-linux-gnu\n\
                      release: 1.95.0\nLLVM version: 22.1.2\n";
        let cases = [
            (rustup, Some(Version { release: (1, 95), llvm: 22 })),
            ("release: 1.98.0-nightly\nLLVM version: 23.1.0\n", Some(Version { release: (1, 98), llvm: 23 })),
            ("release: 1.63.0\nLLVM version: 14.0\n", Some(Version { release: (1, 63), llvm: 14 })),
            ("release: 1.63.0\n", None),
            ("", None),
        ];
        for (text, expected) in cases {
            assert_eq!(Version::parse(text), expected, "{text}");
        }
    }

    #[test]
    fn old_compilers_and_unknown_llvms_are_refused() {
        let cases = [((1, 95), 22, true), ((2, 0), 23, true), ((1, 94), 22, false), ((1, 95), 20, false)];
        for (release, llvm, accepted) in cases {
            assert_eq!(Version { release, llvm }.check().is_ok(), accepted, "{release:?} {llvm}");
        }
    }
}
