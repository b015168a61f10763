//! Debian's archive, including suites that this machine is not configured for. It does not affect the machine's own
//! package lists.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::progress::{self, Watch};
use crate::workspace::Workspace;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Suites with kernels of different ages.
const SUITES: [(&str, &str); 3] = [
    ("debian-security", "bullseye-security"),
    ("debian-security", "bookworm-security"),
    ("debian", "trixie-backports"),
];

/// The archive's lists of packages.
pub(super) struct Archive<'a> {
    workspace: &'a Workspace,
    home: PathBuf,
    /// The error of fetching them: some may be old, or missing.
    pub(super) complaint: Option<String>,
}

/// A package that can be downloaded.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) name: String,
    pub(super) version: String,
    pub(super) depends: Vec<String>,
}

impl<'a> Archive<'a> {
    /// Fetches the lists, as far as possible.
    pub(super) fn open(workspace: &'a Workspace) -> Result<Self> {
        let home = workspace.target("vm/apt");
        for folder in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(home.join(folder))
                .with_context(|| format!("cannot create {}", home.display()))?;
        }
        fs::write(home.join("sources.list"), sources(&configured(workspace)))?;
        let mut archive = Self { workspace, home, complaint: None };
        let mut update = archive.apt("apt-get");
        // Without this, apt accepts old or missing lists.
        update.args(["-q", "-o", "APT::Update::Error-Mode=any", "update"]);
        let asked = progress::watch(
            workspace,
            "asking Debian's archive for kernels",
            "vm-apt-update",
            &mut update,
            Watch::Apt,
        );
        archive.complaint = asked.err().map(|error| format!("{error:#}"));
        if let Some(complaint) = &archive.complaint {
            progress::say(&format!("Debian's archive can't be read in full: {complaint}"));
        }
        Ok(archive)
    }

    /// The packages with this name prefix.
    pub(super) fn candidates(&self, prefix: &str) -> Result<Vec<Candidate>> {
        let names = self.output(self.apt("apt-cache").args(["pkgnames", prefix]))?;
        let names: Vec<&str> = names.lines().collect();
        if names.is_empty() {
            return Ok(Vec::new());
        }
        Ok(parse(&self.output(self.apt("apt-cache").arg("show").args(names))?))
    }

    /// Downloads packages and unpacks them into a directory.
    pub(super) fn unpack(&self, packages: &[String], folder: &Path) -> Result<()> {
        let debs = self.home.join("debs");
        let _ = fs::remove_dir_all(&debs);
        fs::create_dir_all(&debs)?;
        let mut download = self.apt("apt-get");
        download.args(["-q", "download"]).args(packages).current_dir(&debs);
        let what = format!("downloading {}", packages.join(", "));
        progress::watch(self.workspace, &what, "vm-apt-download", &mut download, Watch::Apt)?;
        for deb in fs::read_dir(&debs)? {
            let mut unpack = self.workspace.command("dpkg-deb");
            self.output(unpack.arg("-x").arg(deb?.path()).arg(folder))?;
        }
        fs::remove_dir_all(&debs)?;
        Ok(())
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = self.workspace.command(program);
        let set = |name: &str, value: &Path| format!("{name}={}", value.display());
        for option in [
            set("Dir::Etc::sourcelist", &self.home.join("sources.list")),
            set("Dir::Etc::sourceparts", Path::new("/dev/null")),
            set("Dir::State::lists", &self.home.join("lists")),
            set("Dir::Cache", &self.home.join("cache")),
            "Acquire::Retries=3".to_owned(),
            "Acquire::http::Timeout=30".to_owned(),
            // The user that apt switches to can't read our directories.
            "APT::Sandbox::User=root".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command.env("LC_ALL", "C");
        command
    }

    fn output(&self, command: &mut Command) -> Result<String> {
        let program = command.get_program().display().to_string();
        let output =
            command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {program}"))?;
        if !output.status.success() {
            bail!("{program} failed ({})\n{}", output.status, String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// The addresses of the archives that this machine uses: it may have a mirror.
fn configured(workspace: &Workspace) -> Vec<String> {
    let mut command = workspace.command("apt-get");
    let output = command.args(["indextargets", "--format", "$(REPO_URI)"]).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().map(|uri| uri.trim_end_matches('/').to_owned()).collect()
}

fn sources(configured: &[String]) -> String {
    let line = |(archive, suite): &(&str, &str)| {
        let mirror = configured.iter().find(|uri| uri.ends_with(&format!("/{archive}")));
        let uri = mirror.cloned().unwrap_or_else(|| format!("http://deb.debian.org/{archive}"));
        format!("deb [signed-by={KEYRING}] {uri} {suite} main\n")
    };
    SUITES.iter().map(line).collect()
}

/// Parses the output of `apt-cache show`.
fn parse(text: &str) -> Vec<Candidate> {
    let field = |paragraph: &str, name: &str| {
        let value = paragraph.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        value.unwrap_or_default().to_owned()
    };
    let candidate = |paragraph: &str| Candidate {
        name: field(paragraph, "Package"),
        version: field(paragraph, "Version"),
        depends: field(paragraph, "Depends")
            .split(", ")
            .filter_map(|dependency| dependency.split(' ').next())
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
            .collect(),
    };
    text.split("\n\n").map(candidate).filter(|candidate| !candidate.name.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_of_this_machine_are_used() {
        let text =
            sources(&["http://mirror.example/debian".into(), "http://mirror.example/debian-updates".into()]);
        assert!(text.contains("] http://deb.debian.org/debian-security bookworm-security main\n"), "{text}");
        assert!(text.contains("] http://mirror.example/debian trixie-backports main\n"), "{text}");
    }

    #[test]
    fn packages_are_read() {
        let text = "Package: linux-image-9.1-amd64\nVersion: 9.1-1\nDepends: dracut | x, linux-binary-9.1-amd64 (= 9.1-1)\n\n\
                    Package: linux-image-8-amd64\nVersion: 8.0-2\n\n";
        let expected = [
            Candidate {
                name: "linux-image-9.1-amd64".into(),
                version: "9.1-1".into(),
                depends: vec!["dracut".into(), "linux-binary-9.1-amd64".into()],
            },
            Candidate { name: "linux-image-8-amd64".into(), version: "8.0-2".into(), depends: Vec::new() },
        ];
        assert_eq!(parse(text), expected);
    }
}
