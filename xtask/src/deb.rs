//! `cargo xtask deb`: a Debian package, for nodes without Kubernetes.
//!
//! Uses `dpkg-deb`, which every Debian has, instead of cargo-deb, whose own build takes minutes on a fresh machine and
//! which would need a second copy of the image's file list.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use flate2::{Compression, GzBuilder};

use crate::architecture::Architecture;
use crate::packages::{Evidence, Package, Packages};
use crate::userspace::{self, Programs};
use crate::workspace::Workspace;
use crate::{image, progress, setup};

const NAME: &str = "ambient-redirect";

/// Where the programs are, side by side, so that `redirect install` finds the plugin.
const LIBRARY: &str = "usr/lib/ambient-redirect";

pub(crate) fn deb(workspace: &Workspace) -> Result<()> {
    let programs = userspace::build(workspace, &setup::kernel_side(workspace)?, &[])?;
    let package = write(workspace, &programs)?;
    let mut contents = workspace.command("dpkg-deb");
    let status = contents.arg("--contents").arg(&package).status().context("cannot run dpkg-deb")?;
    ensure!(status.success(), "dpkg-deb --contents: {status}");
    println!("{}: {:.1} MiB", workspace.show(&package), image::mebibytes(&package)?);
    Ok(())
}

/// Writes the package; returns its path.
pub(crate) fn write(workspace: &Workspace, programs: &Programs) -> Result<PathBuf> {
    Packages::new(workspace).ensure(&[Package::new(
        "dpkg",
        Evidence::Program("dpkg-deb"),
        "the Debian package is made with it",
    )])?;
    let root = workspace.target("deb/root");
    if root.exists() {
        fs::remove_dir_all(&root).with_context(|| format!("cannot remove {}", root.display()))?;
    }
    let tree = Tree { workspace, root };
    programs_and_documents(&tree, programs)?;
    services(&tree)?;
    control(&tree)?;

    let package = workspace.target(format!("deb/{NAME}.deb"));
    let mut build = workspace.command("dpkg-deb");
    build.args(["--root-owner-group", "-Zxz", "-z1", "--build"]).arg(&tree.root).arg(&package);
    build.env("SOURCE_DATE_EPOCH", image::commit_time(workspace)?.to_string());
    progress::run(workspace, "writing the Debian package", "deb", &mut build)?;
    Ok(package)
}

fn programs_and_documents(tree: &Tree<'_>, programs: &Programs) -> Result<()> {
    tree.copy(&programs.redirect, &format!("{LIBRARY}/redirect"), 0o755)?;
    tree.copy(&programs.plugin, &format!("{LIBRARY}/redirect-cni"), 0o755)?;
    tree.make("usr/bin")?;
    symlink("../lib/ambient-redirect/redirect", tree.root.join("usr/bin/redirect"))?;

    let documents = format!("usr/share/doc/{NAME}");
    tree.write(&format!("{documents}/copyright"), copyright().as_bytes(), 0o644)?;
    tree.write_compressed(&format!("{documents}/changelog.gz"), &tree.read("CHANGELOG.md")?)?;
    tree.write(
        &format!("{documents}/sbom.spdx.json"),
        &image::bill_of_materials(tree.workspace, Architecture::HOST)?,
        0o644,
    )?;

    let pages = tree.workspace.target("deb/man");
    output(Command::new(&programs.redirect).arg("man").arg(&pages))?;
    for page in fs::read_dir(&pages)? {
        let page = page?.path();
        let name = page.file_name().context("a name")?.to_string_lossy().into_owned();
        tree.write_compressed(&format!("usr/share/man/man1/{name}.gz"), &fs::read(&page)?)?;
    }
    let completion = output(Command::new(&programs.redirect).args(["completion", "bash"]))?;
    tree.write("usr/share/bash-completion/completions/redirect", &completion, 0o644)
}

fn services(tree: &Tree<'_>) -> Result<()> {
    for unit in ["ambient-redirect.service", "ambient-redirect-proxy.service"] {
        let text = tree.read(&format!("deploy/systemd/{unit}"))?;
        tree.write(&format!("usr/lib/systemd/system/{unit}"), &text, 0o644)?;
    }
    tree.write(&format!("etc/default/{NAME}"), &tree.read("deploy/systemd/default")?, 0o644)
}

fn control(tree: &Tree<'_>) -> Result<()> {
    let size = output(Command::new("du").args(["--summarize", "--block-size=1024"]).arg(&tree.root))?;
    let size = String::from_utf8_lossy(&size);
    let size = size.split_whitespace().next().context("du")?;
    let architecture = Architecture::HOST.in_packages();
    let version = env!("CARGO_PKG_VERSION");
    let control = format!(
        "Package: {NAME}\nVersion: {version}\nArchitecture: {architecture}\nSection: net\nPriority: optional\n\
         Maintainer: The ambient-redirect authors <ambient-redirect@localhost>\nInstalled-Size: {size}\n\
         Recommends: containernetworking-plugins\n\
         Description: captures containers' TCP connections to a node proxy, with eBPF\n \
         Agent, CNI plugin and node proxy of ambient-redirect, for nodes without\n \
         Kubernetes, such as those on which podman starts containers by CNI.\n"
    );
    let checksums = output(
        Command::new("sh")
            .current_dir(&tree.root)
            .args(["-c", "find usr -type f -print0 | LC_ALL=C sort -z | xargs -0 md5sum"]),
    )?;
    tree.write("DEBIAN/control", control.as_bytes(), 0o644)?;
    tree.write("DEBIAN/md5sums", &checksums, 0o644)?;
    tree.write("DEBIAN/conffiles", format!("/etc/default/{NAME}\n").as_bytes(), 0o644)?;
    for script in ["postinst", "prerm", "postrm"] {
        tree.write(&format!("DEBIAN/{script}"), &tree.read(&format!("deploy/debian/{script}"))?, 0o755)?;
    }
    Ok(())
}

fn copyright() -> String {
    "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\nUpstream-Name: ambient-redirect\n\n\
     Files: *\nCopyright: The ambient-redirect authors\nLicense: Apache-2.0\n \
     On Debian systems, the text is in /usr/share/common-licenses/Apache-2.0.\n\n\
     Files: redirect-ebpf/*\nCopyright: The ambient-redirect authors\nLicense: Expat or GPL-2\nComment:\n \
     The kernel side, which is embedded in the program. On Debian systems, the text of the GNU General Public License is in\n \
     /usr/share/common-licenses/GPL-2.\n"
        .into()
}

/// The contents of the package.
struct Tree<'a> {
    workspace: &'a Workspace,
    root: PathBuf,
}

impl Tree<'_> {
    fn read(&self, path: &str) -> Result<Vec<u8>> {
        fs::read(self.workspace.root(path)).with_context(|| format!("cannot read {path}"))
    }

    fn make(&self, directory: &str) -> Result<()> {
        let mut path = self.root.clone();
        fs::create_dir_all(&path)?;
        for name in Path::new(directory) {
            path.push(name);
            if !path.exists() {
                fs::create_dir(&path)?;
            }
            // Regardless of the umask.
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
        Ok(())
    }

    fn write(&self, path: &str, bytes: &[u8], mode: u32) -> Result<()> {
        let (directory, _) = path.rsplit_once('/').with_context(|| path.to_owned())?;
        self.make(directory)?;
        let path = self.root.join(path);
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(fs::set_permissions(&path, fs::Permissions::from_mode(mode))?)
    }

    fn write_compressed(&self, path: &str, bytes: &[u8]) -> Result<()> {
        self.write(path, &[], 0o644)?;
        let file = File::create(self.root.join(path))?;
        let mut gzip = GzBuilder::new().mtime(0).write(file, Compression::best());
        gzip.write_all(bytes)?;
        gzip.finish()?;
        Ok(())
    }

    fn copy(&self, from: &Path, to: &str, mode: u32) -> Result<()> {
        self.write(to, &fs::read(from).with_context(|| format!("cannot read {}", from.display()))?, mode)
    }
}

fn output(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout)
}
