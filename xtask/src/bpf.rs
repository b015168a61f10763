//! The kernel side: built and linted for the BPF target.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use ::object::build::elf::{Builder, SectionData};
use ::object::elf::SHT_STRTAB;
use ::object::write::StreamingBuffer;
use ::object::{File, Object as _, ObjectSection as _};
use anyhow::{Context, Result, bail};

use crate::architecture::Architecture;
use crate::progress::{self, Watch};
use crate::setup::{self, KernelSide};
use crate::workspace::Workspace;

/// BPF programs have the byte order of their machine.
const TARGET: &str = "bpfel-unknown-none";

/// The kernel side's object. `.cargo/config.toml` names the one for this machine.
pub(crate) fn object(workspace: &Workspace, architecture: Architecture) -> PathBuf {
    workspace.target(match architecture {
        Architecture::HOST => "bpf/redirect.o".into(),
        other => format!("bpf/redirect-{}.o", other.name()),
    })
}

/// Builds the object. The file stays untouched if nothing changed, so that user space, which embeds it, is not
/// rebuilt.
pub(crate) fn build(
    workspace: &Workspace,
    kernel_side: &KernelSide,
    architecture: Architecture,
) -> Result<()> {
    let mut cargo = kernel_side.rustc.cargo(workspace, "build");
    for_bpf(workspace, kernel_side, architecture, &mut cargo);
    progress::watch(workspace, "building the kernel side", "build-ebpf", &mut cargo, Watch::Cargo)?;
    let built = workspace.target(format!("bpf-build/{TARGET}/bpf/redirect-ebpf"));
    check(&built)?;
    let object = object(workspace, architecture);
    let bytes = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    let stripped = without_debug(&bytes).with_context(|| format!("cannot strip {}", built.display()))?;
    let changed = write_if_changed(&stripped, &object)?;
    let size = object.metadata()?.len();
    let state = if changed { "new" } else { "unchanged" };
    progress::say(&format!("{}: {size} bytes, {state}", workspace.show(&object)));
    Ok(())
}

/// Lints the kernel side; warnings are errors.
pub(crate) fn clippy(workspace: &Workspace) -> Result<()> {
    let kernel_side = setup::kernel_side_lints(workspace)?;
    let mut clippy = kernel_side.rustc.clippy(workspace);
    for_bpf(workspace, &kernel_side, Architecture::HOST, &mut clippy);
    clippy.args(["--lib", "--", "-Dwarnings"]);
    progress::watch(workspace, "linting the kernel side", "clippy-ebpf", &mut clippy, Watch::Cargo)
}

fn for_bpf(workspace: &Workspace, kernel_side: &KernelSide, architecture: Architecture, cargo: &mut Command) {
    let flags = [
        // aya-ebpf's register layouts are those of the traced machine, not of BPF.
        format!("--cfg=bpf_target_arch=\"{}\"", architecture.name()),
        format!("-Clinker={}", kernel_side.linker.display()),
        // The kernel requires BTF, which is generated from debug information.
        "-Clink-arg=--btf".into(),
        "-Cdebuginfo=2".into(),
        "-Cpanic=abort".into(),
    ];
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    cargo.args(["--package", "redirect-ebpf", "--bin", "redirect-ebpf", "--profile", "bpf"]);
    cargo.args(["-Zbuild-std=core", "--target", TARGET, "--target-dir"]);
    cargo.arg(workspace.target("bpf-build"));
}

/// Rejects an object with global variables. The loader creates a map for each such section and would pin it like the others: a
/// restarted agent would find the pin and fill it again. Read-only data (settings, the log's texts) is not pinned.
fn check(object: &Path) -> Result<()> {
    let sections = data(object)?;
    if !sections.is_empty() {
        bail!(
            "the kernel side has variables of its own: {}\nremedy: no `static` that is written to, but maps; one that is only read (`Global`) is a \
             setting",
            sections.join(", ")
        );
    }
    Ok(())
}

/// The sections of variables, for which the loader creates maps.
fn data(object: &Path) -> Result<Vec<String>> {
    let bytes = fs::read(object).with_context(|| format!("cannot read {}", object.display()))?;
    let file = File::parse(&*bytes).with_context(|| format!("cannot read {}", object.display()))?;
    let is_data = |name: &str| [".data", ".bss"].iter().any(|start| name.starts_with(start));
    let sections = file.sections().filter(|section| section.size() > 0);
    let described = sections.filter_map(|section| Some((section.name().ok()?.to_owned(), section.size())));
    Ok(described
        .filter(|(name, _)| is_data(name))
        .map(|(name, size)| format!("{name} ({size} bytes)"))
        .collect())
}

/// The object without the debug information from which BTF was generated: three quarters of it, which the
/// agent would keep in memory.
fn without_debug(object: &[u8]) -> Result<Vec<u8>> {
    let mut builder = Builder::read(object)?;
    for section in &mut builder.sections {
        let name = section.name.to_string();
        section.delete = [".debug", ".rel.debug"].iter().any(|start| name.starts_with(start));
    }
    // The linker stores the names of sections with those of symbols.
    let names = builder.sections.add();
    names.name = ".shstrtab".into();
    names.sh_type = SHT_STRTAB;
    names.data = SectionData::SectionString;
    let mut stripped = Vec::new();
    builder.write(&mut StreamingBuffer::new(&mut stripped))?;
    Ok(stripped)
}

fn write_if_changed(new: &[u8], to: &Path) -> Result<bool> {
    if fs::read(to).is_ok_and(|old| old == new) {
        return Ok(false);
    }
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    }
    fs::write(to, new).with_context(|| format!("cannot write {}", to.display()))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_found_in_an_object() {
        // This program has some of each kind.
        let program = Path::new("/proc/self/exe");
        let found = data(program).unwrap_or_default();
        for kind in [".data", ".bss"] {
            assert!(found.iter().any(|section| section.starts_with(kind)), "{kind}: {found:?}");
        }
        assert!(!found.iter().any(|section| section.starts_with(".rodata")), "{found:?}");
        assert!(check(program).is_err_and(|error| error.to_string().contains(".data")));
        assert!(check(Path::new("/proc/self/cmdline")).is_err());
    }
}
