//! `cargo xtask licenses`: every package has a license that deny.toml permits, and comes from crates.io.
//!
//! In a workflow, cargo-deny checks the same file more thoroughly, and advisories as well. This check needs neither network
//! nor minutes of compilation.

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use spdx::{Expression, Licensee, ParseMode};

use crate::architecture::Architecture;
use crate::progress;
use crate::workspace::Workspace;

/// The relevant part of cargo-deny's configuration.
#[derive(Deserialize)]
struct Deny {
    licenses: Licenses,
}

#[derive(Deserialize)]
struct Licenses {
    allow: Vec<String>,
}

const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    /// `None` for packages of this repository.
    source: Option<String>,
    license: Option<String>,
    manifest_path: String,
}

/// Fails with a list of every violation.
pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    let mut cargo = workspace.cargo();
    cargo.args(["metadata", "--format-version", "1", "--locked"]);
    for architecture in Architecture::ALL {
        cargo.args(["--filter-platform", architecture.target()]);
    }
    let output = cargo.output().context("cannot run cargo")?;
    if !output.status.success() {
        bail!("cargo metadata failed\n{}", String::from_utf8_lossy(&output.stderr));
    }
    let metadata: Metadata = serde_json::from_slice(&output.stdout).context("cargo's metadata")?;
    let root = workspace.root("").display().to_string();
    let path = workspace.root("deny.toml");
    let deny = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let complaints = complaints(&metadata.packages, &root, &permitted(&deny)?)?;
    if !complaints.is_empty() {
        bail!("{}", complaints.join("\n"));
    }
    progress::say(&format!("{} packages: licenses and sources are permitted", metadata.packages.len()));
    Ok(())
}

fn permitted(deny: &str) -> Result<Vec<Licensee>> {
    let deny: Deny = basic_toml::from_str(deny).context("deny.toml")?;
    let parse = |name: &String| Licensee::parse(name).with_context(|| format!("deny.toml permits {name}"));
    deny.licenses.allow.iter().map(parse).collect()
}

/// The violations, package by package.
fn complaints(packages: &[Package], root: &str, permitted: &[Licensee]) -> Result<Vec<String>> {
    let mut complaints = Vec::new();
    for package in packages {
        let mut complain =
            |what: String| complaints.push(format!("{} {}: {what}", package.name, package.version));
        match package.source.as_deref() {
            Some(CRATES_IO) => {}
            // Our own.
            None if package.manifest_path.starts_with(root) => continue,
            None => complain(format!("is not in this repository: {}", package.manifest_path)),
            Some(other) => complain(format!("comes from {other}, not from crates.io")),
        }
        let Some(license) = package.license.as_deref() else {
            complain("names no license".into());
            continue;
        };
        match Expression::parse_mode(license, ParseMode::LAX) {
            Ok(expression) => {
                if !expression.evaluate(|wanted| permitted.iter().any(|one| one.satisfies(wanted))) {
                    complain(format!("the license {license} is not permitted here"));
                }
            }
            Err(error) => complain(format!("the license {license} can't be read: {}", error.reason)),
        }
    }
    Ok(complaints)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaint(license: Option<&str>, source: Option<&str>, manifest_path: &str) -> String {
        let package = Package {
            name: "some-crate".into(),
            version: "1.2.3".into(),
            source: source.map(str::to_owned),
            license: license.map(str::to_owned),
            manifest_path: manifest_path.into(),
        };
        let permitted = permitted(include_str!("../../deny.toml")).unwrap();
        complaints(&[package], "/here/", &permitted).unwrap_or_default().join("\n")
    }

    #[test]
    fn what_deny_toml_permits_has_to_be_a_license() {
        assert!(permitted("[licenses]\nallow = [\"Mine\"]").unwrap_err().to_string().contains("Mine"));
        permitted("[licenses]").unwrap_err();
    }

    #[test]
    fn permitted_licenses_pass() {
        for license in [
            "MIT",
            "MIT/Apache-2.0",
            "GPL-3.0-only OR MIT",
            "(MIT OR Apache-2.0) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception OR GPL-2.0-only",
        ] {
            assert_eq!(complaint(Some(license), Some(CRATES_IO), "/x"), "", "{license}");
        }
        assert_eq!(complaint(Some("MIT OR GPL-2.0-only"), None, "/here/Cargo.toml"), "");
    }

    #[test]
    fn others_are_refused_by_the_crates_name() {
        for license in
            ["GPL-3.0-only", "MIT AND AGPL-3.0-only", "LGPL-2.1-or-later", "MIT WITH Bison-exception-2.2"]
        {
            let text = complaint(Some(license), Some(CRATES_IO), "/x");
            assert!(text.starts_with("some-crate 1.2.3: ") && text.contains(license), "{license}: {text}");
        }
        assert_eq!(complaint(None, Some(CRATES_IO), "/x"), "some-crate 1.2.3: names no license");
        assert!(complaint(Some("mine"), Some(CRATES_IO), "/x").contains("can't be read"));
    }

    #[test]
    fn other_sources_are_refused() {
        let git = "git+https://example.com/some-crate#0123";
        assert!(complaint(Some("MIT"), Some(git), "/x").contains(git));
        let mirror = "registry+https://example.com/index";
        assert!(complaint(Some("MIT"), Some(mirror), "/x").contains("not from crates.io"));
        assert!(complaint(Some("MIT"), None, "/elsewhere/Cargo.toml").contains("not in this repository"));
    }
}
