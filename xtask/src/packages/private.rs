//! Packages that are unpacked below `target/tools` instead of being installed, with all their dependencies except the
//! C library and what every Debian has. Scripts start their programs and set the library path.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use super::apt::with_flags;
use crate::architecture::Architecture;
use crate::progress::{self, Watch};
use crate::workspace::Workspace;

/// The machine's installed packages.
const STATUS: &str = "/var/lib/dpkg/status";

/// C run-time libraries: a process can't have two versions of them, so these are the machine's.
const RUN_TIME: [&str; 4] = ["libc6", "libcrypt1", "libgcc-s1", "libstdc++6"];

/// Present on every machine that builds with cargo, from Debian's packages or elsewhere.
const COMPILER: [&str; 3] = ["binutils", "gcc", "libc6-dev"];

/// The directory of unpacked packages.
pub(crate) struct Private<'a> {
    workspace: &'a Workspace,
    home: PathBuf,
    /// More options of apt.
    options: &'a [String],
}

impl<'a> Private<'a> {
    pub(crate) fn new(workspace: &'a Workspace) -> Self {
        Self::with_options(workspace, &[])
    }

    pub(super) fn with_options(workspace: &'a Workspace, options: &'a [String]) -> Self {
        Self { workspace, home: workspace.target("tools/debian"), options }
    }

    /// The path of a system file here.
    pub(crate) fn file(&self, path: impl AsRef<Path>) -> Option<PathBuf> {
        let path = path.as_ref();
        let here = self.root().join(path.strip_prefix("/").unwrap_or(path));
        here.exists().then_some(here)
    }

    /// Whether a package was unpacked here.
    pub(crate) fn has(&self, package: &str) -> bool {
        self.home.join("packages").join(package).exists()
    }

    /// The program that one of our scripts starts.
    pub(crate) fn program(&self, script: &Path) -> Option<PathBuf> {
        let name = script.strip_prefix(self.workspace.private_programs()).ok()?;
        PROGRAMS.iter().find_map(|folder| self.file(Path::new(folder).join(name)))
    }

    /// The path that a file would have if it were installed, relative to the directory.
    pub(crate) fn place<'p>(&self, file: &'p Path) -> std::borrow::Cow<'p, Path> {
        match file.strip_prefix(self.root()) {
            Ok(below) => Path::new("/").join(below).into(),
            Err(_) => file.into(),
        }
    }

    /// Where the libraries are.
    pub(crate) fn libraries(&self) -> Vec<PathBuf> {
        let triplet = format!("{}-linux-gnu", Architecture::HOST.name());
        ["lib", "usr/lib"].map(|folder| self.root().join(folder).join(&triplet)).to_vec()
    }

    /// Downloads packages with their dependencies, and unpacks them.
    pub(crate) fn unpack(&self, names: &[&str]) -> Result<()> {
        let archives = self.home.join("archives");
        for folder in [archives.join("partial"), self.root(), self.home.join("packages")] {
            fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        let status = fs::read_to_string(STATUS).with_context(|| format!("cannot read {STATUS}"))?;
        fs::write(self.home.join("status"), base_of(&status))?;
        let what = format!("fetching {}, to be unpacked in target/tools", names.join(" "));
        progress::watch(self.workspace, &what, "apt-download", &mut self.download(names), Watch::Apt)?;
        progress::step("unpacking them", || self.unpack_all(names, &archives))?;
        fs::remove_dir_all(&archives).with_context(|| format!("cannot remove {}", archives.display()))
    }

    fn root(&self) -> PathBuf {
        self.home.join("root")
    }

    fn download(&self, names: &[&str]) -> Command {
        let mut command = self.workspace.command("apt-get");
        let set = |name: &str, file: &str| format!("{name}={}", self.home.join(file).display());
        let ours = [
            set("Dir::State::status", "status"),
            set("Dir::State::extended_states", "extended_states"),
            set("Dir::Cache", "."),
            set("Dir::Cache::archives", "archives"),
            "Debug::NoLocking=true".to_owned(),
            // The user that apt switches to can't write into our directories.
            "APT::Sandbox::User=root".to_owned(),
        ];
        // The last option with a name counts.
        command.args(with_flags(self.options)).args(with_flags(&ours));
        command.args(["-q", "install", "--yes", "--no-install-recommends", "--download-only"]).args(names);
        command.env("LC_ALL", "C");
        command
    }

    fn unpack_all(&self, wanted: &[&str], archives: &Path) -> Result<()> {
        let debs: Vec<PathBuf> = fs::read_dir(archives)?
            .map(|entry| Ok(entry?.path()))
            .filter(|path| {
                path.as_ref().map_or(true, |path| path.extension().is_some_and(|end| end == "deb"))
            })
            .collect::<Result<_>>()?;
        let mut programs = BTreeSet::new();
        let mut found = BTreeSet::new();
        for deb in &debs {
            let name = self.output(&["--field", "{}", "Package"], deb)?.trim().to_owned();
            if RUN_TIME.contains(&name.as_str()) {
                self.is_recent_enough(&name, self.output(&["--field", "{}", "Version"], deb)?.trim())?;
                continue;
            }
            let mut extract = self.workspace.command("dpkg-deb");
            let output = extract.arg("--extract").arg(deb).arg(self.root()).output()?;
            ensure!(output.status.success(), "dpkg-deb: {}", String::from_utf8_lossy(&output.stderr));
            if wanted.contains(&name.as_str()) {
                programs.extend(programs_in(&self.output(&["--contents", "{}"], deb)?));
            }
            found.insert(name);
        }
        for name in wanted {
            ensure!(found.contains(*name), "apt fetched no package {name}");
        }
        for program in programs {
            self.write_script(&program)?;
        }
        for name in wanted {
            fs::write(self.home.join("packages").join(name), "")?;
        }
        Ok(())
    }

    /// Whether the machine's own package can replace this version.
    fn is_recent_enough(&self, name: &str, version: &str) -> Result<()> {
        let mut query = self.workspace.command("dpkg-query");
        let installed = query.args(["--show", "--showformat", "${Version}", name]).output()?;
        let installed = String::from_utf8_lossy(&installed.stdout).into_owned();
        let mut compare = self.workspace.command("dpkg");
        let is_newer = compare.args(["--compare-versions", &installed, "ge", version]).status()?.success();
        ensure!(
            is_newer || upstream(&installed) == upstream(version),
            "{name} {version} is needed, but {installed} is installed\nremedy: apt-get install {name}"
        );
        Ok(())
    }

    /// A script that starts a program with these libraries ahead of the machine's.
    fn write_script(&self, program: &str) -> Result<()> {
        let path =
            self.file(program).with_context(|| format!("{program} is not in {}", self.root().display()))?;
        let folder = self.workspace.private_programs();
        fs::create_dir_all(&folder)?;
        let script = folder.join(path.file_name().context("a name")?);
        let mut libraries = String::new();
        for library in self.libraries() {
            write!(libraries, "{}:", library.display())?;
        }
        let text = format!(
            "#!/bin/sh\n# Written by `cargo xtask`.\nexport LD_LIBRARY_PATH=\"{libraries}${{LD_LIBRARY_PATH-}}\"\nexec \"{}\" \"$@\"\n",
            path.display()
        );
        fs::write(&script, text).with_context(|| format!("cannot write {}", script.display()))?;
        Ok(fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?)
    }

    /// The output of dpkg-deb for a file, which replaces `{}` among the arguments.
    fn output(&self, arguments: &[&str], deb: &Path) -> Result<String> {
        let mut command = self.workspace.command("dpkg-deb");
        for argument in arguments {
            if *argument == "{}" {
                command.arg(deb)
            } else {
                command.arg(argument)
            };
        }
        let output = command.stdin(Stdio::null()).output().context("cannot run dpkg-deb")?;
        if !output.status.success() {
            bail!("dpkg-deb: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

const PROGRAMS: [&str; 4] = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"];

/// The part of dpkg's status that every machine has: essential packages and the C run-time libraries.
fn base_of(status: &str) -> String {
    let field = |paragraph: &str, name: &str| -> String {
        let value = paragraph.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        value.unwrap_or_default().to_owned()
    };
    let is_base = |paragraph: &&str| {
        field(paragraph, "Essential") == "yes"
            || field(paragraph, "Priority") == "required"
            || [&RUN_TIME[..], &COMPILER].concat().contains(&field(paragraph, "Package").as_str())
    };
    let kept = status.split("\n\n").map(|paragraph| paragraph.trim_matches('\n'));
    // Their dependencies are removed, because apt would try to fix them.
    let without_dependencies = |paragraph: &str| -> String {
        let mut text = String::new();
        let mut skipping = false;
        for line in paragraph.lines() {
            if !line.starts_with(' ') {
                skipping = ["Depends:", "Pre-Depends:", "Recommends:", "Suggests:", "Breaks:", "Conflicts:"]
                    .iter()
                    .any(|field| line.starts_with(field));
            }
            if !skipping {
                text += line;
                text.push('\n');
            }
        }
        text
    };
    kept.filter(is_base).map(|paragraph| without_dependencies(paragraph) + "\n").collect()
}

/// A version without Debian's revision, which does not affect linking.
fn upstream(version: &str) -> &str {
    version.rsplit_once('-').map_or(version, |(upstream, _)| upstream)
}

/// The programs in the output of `dpkg-deb --contents`.
fn programs_in(contents: &str) -> Vec<String> {
    let path = |line: &str| {
        // -rwxr-xr-x root/root 1 2025-01-01 00:00 ./usr/bin/name -> target
        let mut words = line.split_whitespace();
        let mode = words.next()?;
        let path = words.nth(4)?.strip_prefix('.')?;
        let (folder, _) = path.rsplit_once('/')?;
        let is_program = PROGRAMS.contains(&folder) && !path.ends_with('/') && mode.ends_with("x");
        is_program.then(|| path.to_owned())
    };
    contents.lines().filter_map(path).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_machines_packages_are_the_base() {
        let status = "Package: dash\nEssential: yes\nStatus: install ok installed\nDepends: a (>= 1),\n b\nVersion: 1\n\n\
                      Package: libc6\nVersion: 2.36-9\nDepends: libgcc-s1\n\n\
                      Package: qemu-utils\nPriority: optional\nVersion: 3\n\n\
                      Package: login\nPriority: required\nPre-Depends: libpam0g\nDescription: x\n y\n";
        let base = "Package: dash\nEssential: yes\nStatus: install ok installed\nVersion: 1\n\n\
                    Package: libc6\nVersion: 2.36-9\n\n\
                    Package: login\nPriority: required\nDescription: x\n y\n\n";
        assert_eq!(base_of(status), base);
        assert_eq!(base_of(""), "");
    }

    #[test]
    fn programs_are_found_in_packages() {
        let contents = "drwxr-xr-x root/root         0 2025-01-01 00:00 ./usr/bin/\n\
                        -rwxr-xr-x root/root      1234 2025-01-01 00:00 ./usr/bin/dig\n\
                        lrwxrwxrwx root/root         0 2025-01-01 00:00 ./usr/sbin/nft-x -> nft\n\
                        -rw-r--r-- root/root      1234 2025-01-01 00:00 ./usr/bin/data\n\
                        -rwxr-xr-x root/root      1234 2025-01-01 00:00 ./usr/lib/dig/helper\n";
        assert_eq!(programs_in(contents), ["/usr/bin/dig", "/usr/sbin/nft-x"]);
    }

    #[test]
    fn versions_of_one_source_can_be_linked_with() {
        for (version, expected) in
            [("2.36-9+deb12u14", "2.36"), ("1:4.4.33-2", "1:4.4.33"), ("13", "13"), ("", "")]
        {
            assert_eq!(upstream(version), expected);
        }
    }
}
