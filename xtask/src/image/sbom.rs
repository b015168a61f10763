//! The bill of materials: the packages in the programs, as SPDX 2.3.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::layout::rfc3339;
use crate::architecture::Architecture;
use crate::workspace::Workspace;

const ROOT: &str = "SPDXRef-ambient-redirect";

/// The document, for user space and kernel side.
pub(super) fn spdx(workspace: &Workspace, architecture: Architecture, created: u64) -> Result<Vec<u8>> {
    // Names and versions with licenses; only normal dependencies, which are those that end up in the programs.
    let mut crates = BTreeMap::new();
    for (package, target) in [
        ("redirect-cli", architecture.target()),
        ("redirect-cni", architecture.target()),
        ("redirect-ebpf", "bpfel-unknown-none"),
    ] {
        let mut cargo = workspace.cargo();
        cargo.args([
            "tree",
            "--locked",
            "--edges",
            "normal,no-proc-macro",
            "--prefix",
            "none",
            "--no-dedupe",
        ]);
        cargo.args(["--package", package, "--target", target, "--format", "{p}\t{l}"]);
        let output = cargo.output().context("cannot run cargo tree")?;
        if !output.status.success() {
            bail!("cargo tree: {}", String::from_utf8_lossy(&output.stderr));
        }
        crates.extend(parse(&String::from_utf8_lossy(&output.stdout))?);
    }
    Ok(serde_json::to_vec_pretty(&document(&crates, created))?)
}

/// Names, versions and licenses of crates from the registry.
fn parse(tree: &str) -> Result<BTreeMap<(String, String), String>> {
    let mut crates = BTreeMap::new();
    for line in tree.lines().filter(|line| !line.is_empty()) {
        let (package, licence) = line.split_once('\t').with_context(|| format!("cargo tree says {line}"))?;
        // "name v1.0.0 (/path)" for crates of this repository.
        let mut words = package.split(' ');
        let (Some(name), Some(version)) = (words.next(), words.next()) else {
            bail!("cargo tree says {line}")
        };
        if !package.contains('(') {
            let version = version.trim_start_matches('v').to_owned();
            // An old form of OR that SPDX does not support.
            crates.insert((name.to_owned(), version), licence.replace('/', " OR "));
        }
    }
    Ok(crates)
}

fn document(crates: &BTreeMap<(String, String), String>, created: u64) -> Value {
    let id = |(name, version): &(String, String)| {
        let text = format!("SPDXRef-{name}-{version}");
        text.replace(|c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '.', "-")
    };
    let own = json!({
        "SPDXID": ROOT, "name": "ambient-redirect", "versionInfo": env!("CARGO_PKG_VERSION"),
        "downloadLocation": "NOASSERTION", "licenseConcluded": "NOASSERTION",
        "licenseDeclared": "Apache-2.0 AND (MIT OR GPL-2.0-only)", "copyrightText": "NOASSERTION",
        "filesAnalyzed": false,
    });
    let package = |(key, licence): (&(String, String), &String)| {
        let (name, version) = key;
        let licence = if licence.is_empty() { "NOASSERTION" } else { licence };
        json!({
            "SPDXID": id(key), "name": name, "versionInfo": version,
            "downloadLocation": "NOASSERTION", "licenseConcluded": "NOASSERTION",
            "licenseDeclared": licence, "copyrightText": "NOASSERTION", "filesAnalyzed": false,
            "externalRefs": [{
                "referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl",
                "referenceLocator": format!("pkg:cargo/{name}@{version}"),
            }],
        })
    };
    let depends =
        |key| json!({"spdxElementId": ROOT, "relationshipType": "DEPENDS_ON", "relatedSpdxElement": id(key)});
    let describes = json!({"spdxElementId": "SPDXRef-DOCUMENT", "relationshipType": "DESCRIBES", "relatedSpdxElement": ROOT});
    json!({
        "spdxVersion": "SPDX-2.3", "SPDXID": "SPDXRef-DOCUMENT", "dataLicense": "CC0-1.0",
        "name": "ambient-redirect",
        "documentNamespace": format!("https://spdx.org/spdxdocs/ambient-redirect-{}-{created}", env!("CARGO_PKG_VERSION")),
        "creationInfo": {"created": rfc3339(created), "creators": ["Tool: cargo-xtask"]},
        "packages": std::iter::once(own).chain(crates.iter().map(package)).collect::<Vec<_>>(),
        "relationships": std::iter::once(describes).chain(crates.keys().map(depends)).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crates_of_the_registry_are_listed_once() {
        let tree = "redirect-cli v0.1.0 (/src/redirect-user/cli)\tApache-2.0\nlibc v0.2.1\tMIT/Apache-2.0\n\nlibc v0.2.1\tMIT/Apache-2.0\n";
        let crates = parse(tree).unwrap();
        let document = document(&crates, 0);
        assert_eq!(document["packages"].as_array().unwrap().len(), 2);
        assert_eq!(document["packages"][1]["licenseDeclared"], "MIT OR Apache-2.0");
        assert_eq!(document["packages"][1]["externalRefs"][0]["referenceLocator"], "pkg:cargo/libc@0.2.1");
        assert_eq!(document["relationships"][1]["relatedSpdxElement"], "SPDXRef-libc-0.2.1");
        assert!(parse("nonsense").is_err());
    }
}
