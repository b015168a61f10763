//! `cargo xtask image`: the container image, written without a container engine.
//!
//! One layer with the two programs, their licenses and their bill of materials. The same sources give the same bytes:
//! times are the commit's, owners and order are fixed, and the programs contain no paths of this machine.

mod layout;
mod sbom;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::architecture::Architecture;
use crate::setup;
use crate::userspace::{self, Programs};
use crate::workspace::Workspace;
use layout::{Entry, Image};

/// What the image is called, and how much is checked.
#[derive(Args)]
pub(crate) struct Settings {
    /// Name and tag inside the archive; the package's version by default.
    #[arg(long, value_name = "NAME:TAG")]
    name: Option<String>,
    /// Builds everything once more, in another directory, and compares the digests. Takes minutes.
    #[arg(long)]
    verify: bool,
    /// What it is for.
    #[arg(long, value_enum, default_value = Architecture::HOST.name())]
    architecture: Architecture,
}

pub(crate) fn image(workspace: &Workspace, settings: &Settings) -> Result<()> {
    let architecture = settings.architecture;
    let kernel_side = setup::kernel_side(workspace)?;
    architecture.ensure(workspace)?;
    let programs = userspace::build_for(workspace, &kernel_side, architecture)?;
    architecture.try_out(workspace, &programs)?;
    let name = settings.name.clone().unwrap_or_else(default_name);
    let (image, archive) = write_for(workspace, architecture, &programs, &name)?;
    for Entry { path, bytes, .. } in &image.entries {
        println!("{:>9}  /{path}", bytes.len());
    }
    println!("{}: {name}, {:.1} MiB", workspace.show(&archive), mebibytes(&archive)?);
    println!("{}", image.digest()?);

    if settings.verify {
        for Entry { path, bytes, .. } in &image.entries {
            let place = userspace::places(workspace).into_iter().find(|place| contains(bytes, place));
            ensure!(
                place.is_none(),
                "/{path} names {}, which is another folder elsewhere",
                place.unwrap_or_default()
            );
        }
        let again = workspace.target("image/again");
        let programs = userspace::build_in(workspace, architecture, &again)?;
        let digest = assemble(workspace, architecture, &programs, &name)?.digest()?;
        ensure!(digest == image.digest()?, "a second build is another image: {digest}");
        println!("a second build, in {}, is the same image", workspace.show(&again));
    }
    Ok(())
}

/// Writes the archive for this machine.
pub(crate) fn write(workspace: &Workspace, programs: &Programs, name: &str) -> Result<(Image, PathBuf)> {
    write_for(workspace, Architecture::HOST, programs, name)
}

/// Writes the archive for another machine.
pub(crate) fn write_for(
    workspace: &Workspace,
    architecture: Architecture,
    programs: &Programs,
    name: &str,
) -> Result<(Image, PathBuf)> {
    let image = assemble(workspace, architecture, programs, name)?;
    let archive = workspace.target(match architecture {
        Architecture::HOST => "image/ambient-redirect.tar".into(),
        other => format!("image/ambient-redirect-{}.tar", other.in_packages()),
    });
    image.write(&archive).with_context(|| format!("cannot write {}", archive.display()))?;
    Ok((image, archive))
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

pub(crate) fn default_name() -> String {
    format!("localhost/ambient-redirect:{}", env!("CARGO_PKG_VERSION"))
}

fn assemble(
    workspace: &Workspace,
    architecture: Architecture,
    programs: &Programs,
    name: &str,
) -> Result<Image> {
    let mut entries = Vec::new();
    let mut add =
        |path: &str, mode: u32, bytes: Vec<u8>| entries.push(Entry { path: path.into(), mode, bytes });
    for (path, program) in [("redirect", &programs.redirect), ("redirect-cni", &programs.plugin)] {
        let bytes = read(program)?;
        architecture
            .check(&bytes)
            .with_context(|| format!("{} can't run in an image of its own", program.display()))?;
        add(path, 0o755, bytes);
    }
    for licence in ["LICENSE-APACHE", "LICENSE-MIT", "LICENSE-GPL-2.0"] {
        add(&format!("licenses/{licence}"), 0o644, read(&workspace.root(licence))?);
    }
    add("sbom.spdx.json", 0o644, bill_of_materials(workspace, architecture)?);
    Ok(Image { name: name.to_owned(), architecture, created: commit_time(workspace)?, entries })
}

/// The sources of the programs.
pub(crate) fn bill_of_materials(workspace: &Workspace, architecture: Architecture) -> Result<Vec<u8>> {
    sbom::spdx(workspace, architecture, commit_time(workspace)?)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The commit's time in seconds since 1970, or `SOURCE_DATE_EPOCH`.
pub(crate) fn commit_time(workspace: &Workspace) -> Result<u64> {
    if let Some(epoch) = std::env::var_os("SOURCE_DATE_EPOCH") {
        return epoch.to_string_lossy().parse().context("SOURCE_DATE_EPOCH");
    }
    let output = workspace.command("git").args(["log", "-1", "--format=%ct"]).output();
    let output = output.context("cannot run git: set SOURCE_DATE_EPOCH")?;
    String::from_utf8_lossy(&output.stdout).trim().parse().context("no commit here: set SOURCE_DATE_EPOCH")
}

pub(crate) fn mebibytes(path: &Path) -> Result<f64> {
    Ok(path.metadata()?.len() as f64 / f64::from(1 << 20))
}
