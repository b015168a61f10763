//! `cargo xtask release`: everything that is published with a release, in `target/dist`.
//!
//! Images of both architectures with their bills of materials, the Helm chart, the Debian package, and the checksums of
//! all of them. Signing and publishing need an identity, which a workflow has.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use sha2::{Digest as _, Sha256};

use crate::architecture::Architecture;
use crate::packages::Packages;
use crate::workspace::Workspace;
use crate::{deb, helm, image, progress, setup, userspace};

const NAME: &str = concat!("ambient-redirect-", env!("CARGO_PKG_VERSION"));

/// Builds everything from scratch.
pub(crate) fn release(workspace: &Workspace) -> Result<()> {
    let kernel_side = setup::kernel_side(workspace)?;
    let directory = workspace.target("dist");
    if directory.exists() {
        fs::remove_dir_all(&directory).with_context(|| format!("cannot remove {}", directory.display()))?;
    }
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    for architecture in Architecture::ALL {
        architecture.ensure(workspace)?;
        let programs = userspace::build_for(workspace, &kernel_side, architecture)?;
        architecture.try_out(workspace, &programs)?;
        let (_, archive) = image::write_for(workspace, architecture, &programs, &image::default_name())?;
        let name = architecture.in_packages();
        copy(&archive, &directory.join(format!("{NAME}-image-{name}.tar")))?;
        let materials = directory.join(format!("{NAME}-{name}.spdx.json"));
        fs::write(materials, image::bill_of_materials(workspace, architecture)?)?;
        if architecture == Architecture::HOST {
            copy(&deb::write(workspace, &programs)?, &directory.join(format!("{NAME}-{name}.deb")))?;
        }
    }
    package_chart(workspace, &directory)?;
    let sums = checksums(&directory)?;
    fs::write(directory.join("SHA256SUMS"), &sums)?;
    println!("{}:\n{sums}", workspace.show(&directory));
    Ok(())
}

fn package_chart(workspace: &Workspace, directory: &Path) -> Result<()> {
    let tools = helm::ensure(workspace, &Packages::new(workspace))?;
    let mut helm = workspace.command(&tools.helm);
    helm.args(["package", "deploy/chart", "--destination"]).arg(directory);
    progress::run(workspace, "packaging the chart", "chart", &mut helm)?;
    let chart = directory.join(format!("{NAME}.tgz"));
    ensure!(chart.exists(), "the chart's version is not that of the programs, {}", env!("CARGO_PKG_VERSION"));
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

/// One line per file, in the format of `sha256sum --check`.
fn checksums(directory: &Path) -> Result<String> {
    let files = fs::read_dir(directory)?.map(|entry| Ok(entry?.path()));
    let mut files = files.collect::<Result<Vec<PathBuf>>>()?;
    files.sort();
    let mut text = String::new();
    for file in files {
        let name = file.file_name().context("a name")?.to_string_lossy();
        let bytes = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        for byte in Sha256::digest(bytes) {
            let _ = write!(text, "{byte:02x}");
        }
        let _ = writeln!(text, "  {name}");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::fs;

    #[test]
    fn checksums_are_those_of_sha256sum() {
        let directory = std::env::temp_dir().join(format!("redirect-checksums-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join("b"), "").unwrap();
        fs::write(directory.join("a"), "abc").unwrap();
        let sums = super::checksums(&directory);
        fs::remove_dir_all(&directory).unwrap();
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  a\n\
                        e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855  b\n";
        assert_eq!(sums.unwrap(), expected);
    }
}
