//! Packages of the distribution: found first, installed if missing, and named if there is no apt.
//!
//! No package of the user is removed or replaced. Packages that apt can't install beside the existing ones are
//! unpacked below `target/tools`, with all their dependencies.

mod apt;
mod lists;
mod private;

use std::collections::HashSet;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use crate::progress;
use crate::workspace::Workspace;
use apt::Apt;

pub(crate) use lists::{for_bench, for_machines, for_pods, for_scripts, for_tests};
pub(crate) use private::Private;

/// A package of the distribution.
#[derive(Clone, Debug)]
pub(crate) struct Package {
    /// Its package in Debian.
    pub(crate) name: String,
    /// The evidence that it exists, wherever it came from.
    pub(crate) evidence: Evidence,
    /// Why it is needed.
    pub(crate) reason: &'static str,
    place: Place,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Installed, or unpacked if that is impossible.
    Either,
    /// Its files refer to each other by absolute paths, or its scripts create required files.
    Installed,
    /// It belongs to another package that was unpacked.
    Unpacked,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Evidence {
    /// A program in `PATH`.
    Program(&'static str),
    /// One of several files.
    File(&'static [&'static str]),
    /// Only the distribution knows.
    Installed,
}

impl Package {
    pub(crate) fn new(name: impl Into<String>, evidence: Evidence, reason: &'static str) -> Self {
        Self { name: name.into(), evidence, reason, place: Place::Either }
    }

    /// A package that works only when it is installed.
    pub(crate) fn in_place(self) -> Self {
        Self { place: Place::Installed, ..self }
    }

    /// A package that must be where another one was unpacked.
    pub(crate) fn unpacked(self) -> Self {
        Self { place: Place::Unpacked, ..self }
    }
}

/// Installs packages.
pub(crate) struct Packages<'a> {
    workspace: &'a Workspace,
    apt: Apt<'a>,
    private: Private<'a>,
}

impl<'a> Packages<'a> {
    pub(crate) fn new(workspace: &'a Workspace) -> Self {
        Self::with_options(workspace, &[])
    }

    /// With more options of apt.
    fn with_options(workspace: &'a Workspace, options: &'a [String]) -> Self {
        Self {
            workspace,
            apt: Apt::new(workspace, options),
            private: Private::with_options(workspace, options),
        }
    }

    /// Ensures that all of `wanted` exists.
    pub(crate) fn ensure(&self, wanted: &[Package]) -> Result<()> {
        let missing = self.missing(wanted)?;
        self.bring(&missing, |missing| Plan::one_by_one(missing, |names| self.apt.simulate(names)))
    }

    /// The same for packages that must be in one place: all of them are installed, or all are unpacked.
    pub(crate) fn ensure_together(&self, wanted: &[Package]) -> Result<()> {
        let missing = self.missing(wanted)?;
        self.bring(&missing, |missing| Plan::together(wanted, missing, |names| self.apt.simulate(names)))
    }

    /// Installs or unpacks all of these; newer versions if available.
    pub(crate) fn install_together(&self, wanted: &[Package]) -> Result<()> {
        let all: Vec<&Package> = wanted.iter().collect();
        self.bring(&all, |all| Plan::together(wanted, all, |names| self.apt.simulate(names)))
    }

    pub(crate) fn has_apt(&self) -> bool {
        ["apt-get", "dpkg-query", "dpkg-deb"].iter().all(|program| self.workspace.which(program).is_some())
    }

    /// Fetches the package lists unless that was done before. Returns whether it did.
    pub(crate) fn refresh(&self) -> bool {
        nix::unistd::geteuid().is_root() && self.apt.refresh()
    }

    /// The packages that were unpacked instead of installed.
    pub(crate) fn private(&self) -> &Private<'a> {
        &self.private
    }

    fn missing<'p>(&self, wanted: &'p [Package]) -> Result<Vec<&'p Package>> {
        let mut missing: Vec<&Package> = wanted.iter().filter(|package| !self.is_evident(package)).collect();
        let mut seen = HashSet::new();
        missing.retain(|package| seen.insert(&package.name));
        if !missing.is_empty() && self.has_apt() {
            let installed = self.apt.installed(&names(&missing))?;
            missing.retain(|package| package.place == Place::Unpacked || !installed.contains(&package.name));
        }
        Ok(missing)
    }

    fn is_evident(&self, package: &Package) -> bool {
        match package.evidence {
            _ if package.place == Place::Unpacked => self.private.has(&package.name),
            Evidence::Program(program) => self.workspace.which(program).is_some(),
            Evidence::File(paths) => {
                paths.iter().any(|path| Path::new(path).exists() || self.private.file(path).is_some())
            }
            Evidence::Installed => self.private.has(&package.name),
        }
    }

    fn bring<'p>(
        &self,
        packages: &[&'p Package],
        plan: impl Fn(&[&'p Package]) -> Result<Plan<'p>>,
    ) -> Result<()> {
        if packages.is_empty() {
            return Ok(());
        }
        for package in packages {
            progress::say(&format!("missing: {} ({})", package.name, package.reason));
        }
        let by_hand = names(packages).join(" ");
        if !self.has_apt() {
            bail!(
                "this is not a Debian: install what provides these Debian packages, then try again: {by_hand}"
            );
        }
        if !nix::unistd::geteuid().is_root() {
            return self
                .unpack(packages, "not root, cannot install packages")
                .with_context(|| format!("remedy: sudo apt-get install --no-install-recommends {by_hand}"));
        }
        let apt = &self.apt;
        if !apt.all_have_candidates(&names(packages))? {
            apt.refresh();
        }
        let plan = plan(packages)?;
        for (package, complaint) in &plan.obstacles {
            progress::say(&format!("{} does not fit beside what is installed: {complaint}", package.name));
        }
        if !plan.install.is_empty() {
            self.again_if_stale(|| apt.install(&names(&plan.install)))?;
        }
        self.unpack(&plan.unpack, "can't be installed beside what is there")
    }

    /// Retries with fresh package lists if it fails.
    fn again_if_stale(&self, work: impl Fn() -> Result<()>) -> Result<()> {
        let first = work();
        if first.is_err() && self.refresh() {
            progress::say("the lists of packages may have been stale: trying once more");
            return work();
        }
        first
    }

    fn unpack(&self, packages: &[&Package], cause: &str) -> Result<()> {
        if packages.is_empty() {
            return Ok(());
        }
        let fixed = packages.iter().copied().filter(|package| package.place == Place::Installed);
        let fixed = names(&fixed.collect::<Vec<_>>()).join(" ");
        ensure!(fixed.is_empty(), "{fixed}: {cause}");
        let names = names(packages);
        self.again_if_stale(|| self.private.unpack(&names))
            .with_context(|| format!("cannot unpack {}", names.join(" ")))?;
        for package in packages {
            ensure!(self.is_evident(package), "{} was unpacked, but isn't usable", package.name);
        }
        Ok(())
    }
}

/// The packages that apt can install without removing another one, and those that it can't.
struct Plan<'p> {
    install: Vec<&'p Package>,
    unpack: Vec<&'p Package>,
    /// The obstacles, as reported by apt.
    obstacles: Vec<(&'p Package, String)>,
}

impl<'p> Plan<'p> {
    /// `simulate` returns what prevents the installation of these packages together.
    fn one_by_one(
        packages: &[&'p Package],
        simulate: impl Fn(&[&str]) -> Result<Option<String>>,
    ) -> Result<Self> {
        let mut plan = Self { install: Vec::new(), unpack: Vec::new(), obstacles: Vec::new() };
        let (apart, together): (Vec<&Package>, Vec<&Package>) =
            packages.iter().partition(|package| package.place == Place::Unpacked);
        plan.unpack = apart;
        if simulate(&names(&together))?.is_none() {
            plan.install = together;
            return Ok(plan);
        }
        for package in together {
            plan.install.push(package);
            if let Some(complaint) = simulate(&names(&plan.install))? {
                plan.install.pop();
                plan.unpack.push(package);
                plan.obstacles.push((package, complaint));
            }
        }
        Ok(plan)
    }

    /// All missing packages can be installed, or all have to be unpacked.
    fn together(
        all: &'p [Package],
        missing: &[&'p Package],
        simulate: impl Fn(&[&str]) -> Result<Option<String>>,
    ) -> Result<Self> {
        Ok(match (simulate(&names(missing))?, missing.first()) {
            (Some(complaint), Some(first)) => Self {
                install: Vec::new(),
                unpack: all.iter().collect(),
                obstacles: vec![(first, complaint)],
            },
            _ => Self { install: missing.to_vec(), unpack: Vec::new(), obstacles: Vec::new() },
        })
    }
}

fn names<'p>(packages: &[&'p Package]) -> Vec<&'p str> {
    packages.iter().map(|package| package.name.as_str()).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;

    use sha2::{Digest as _, Sha256};

    use super::*;

    const ALL: [&str; 4] = ["a", "b", "c", "d"];

    fn all() -> Vec<Package> {
        ALL.map(|name| Package::new(name, Evidence::Installed, "a test")).to_vec()
    }

    /// An apt that refuses to install any of these sets.
    fn apt(obstacles: &[&str]) -> impl Fn(&[&str]) -> Result<Option<String>> {
        let obstacles: Vec<String> = obstacles.iter().map(|&names| names.to_owned()).collect();
        move |names| {
            let hits = |obstacle: &&String| obstacle.split(' ').all(|name| names.contains(&name));
            Ok(obstacles.iter().find(hits).map(|obstacle| format!("{obstacle} conflicts")))
        }
    }

    #[test]
    fn what_fits_is_installed_and_the_rest_unpacked() {
        let all = all();
        let all: Vec<&Package> = all.iter().collect();
        let cases: [(&[&str], &[&str], &[&str]); 4] = [
            (&[], &ALL, &[]),
            // One that never fits, and one that conflicts with another.
            (&["b"], &["a", "c", "d"], &["b"]),
            (&["a c"], &["a", "b", "d"], &["c"]),
            (&ALL, &[], &ALL),
        ];
        for (obstacles, install, unpack) in cases {
            let plan = Plan::one_by_one(&all, apt(obstacles)).unwrap();
            assert_eq!(names(&plan.install), install, "{obstacles:?}");
            assert_eq!(names(&plan.unpack), unpack, "{obstacles:?}");
            assert!(plan.obstacles.iter().all(|(package, why)| why.contains(&package.name)), "{obstacles:?}");
            assert_eq!(plan.obstacles.len(), unpack.len(), "{obstacles:?}");
        }
    }

    #[test]
    fn what_belongs_together_is_in_one_place() {
        let all = all();
        let missing: Vec<&Package> = all[1..].iter().collect();
        let plan = Plan::together(&all, &missing, apt(&[])).unwrap();
        assert_eq!((names(&plan.install), names(&plan.unpack)), (ALL[1..].to_vec(), Vec::new()));
        let plan = Plan::together(&all, &missing, apt(&["d"])).unwrap();
        assert_eq!((names(&plan.install), names(&plan.unpack)), (Vec::new(), ALL.to_vec()));
        assert_eq!(plan.obstacles.len(), 1);
    }

    /// A repository with a program that needs a library to print its name, both of version 2, and a machine that has another
    /// program of the same source in version 3, and so version 3 of the library.
    struct Repository {
        folder: tempfile::TempDir,
    }

    impl Repository {
        fn new() -> Self {
            let repository = Self { folder: tempfile::tempdir().unwrap() };
            let path = |name: &str| repository.folder.path().join(name);
            let architecture = crate::architecture::Architecture::HOST;
            let libraries = format!("usr/lib/{}-linux-gnu", architecture.name());
            fs::write(path("lib.c"), "const char *greeting(void) { return \"version 2\"; }\n").unwrap();
            let main = "#include <stdio.h>\nconst char *greeting(void);\nint main(int c, char **v) { puts(greeting()); \
                        puts(v[c - 1]); return 3; }\n";
            fs::write(path("main.c"), main).unwrap();
            for folder in [
                &format!("library/{libraries}"),
                "tool/usr/bin",
                "state/lists/partial",
                "cache/archives/partial",
            ] {
                fs::create_dir_all(path(folder)).unwrap();
            }
            let library = path(&format!("library/{libraries}/libgreeting.so.2"));
            repository.run(
                Command::new("cc")
                    .args(["-shared", "-fPIC", "-Wl,-soname,libgreeting.so.2"])
                    .arg(path("lib.c"))
                    .arg("-o")
                    .arg(&library),
            );
            let program = path("tool/usr/bin/greeting-tool");
            repository.run(Command::new("cc").arg(path("main.c")).arg(&library).arg("-o").arg(&program));
            let index = [
                repository.package("tool", "greeting-tool", "libgreeting (= 2), libc6"),
                repository.package("library", "libgreeting", "libc6"),
            ];
            fs::write(path("Packages"), index.concat()).unwrap();
            fs::write(path("sources.list"), format!("deb [trusted=yes] copy:{} ./\n", path("").display()))
                .unwrap();
            let installed = |name: &str, fields: &str| {
                format!(
                    "Package: {name}\nStatus: install ok installed\nVersion: 3\nArchitecture: {}\nMaintainer: x\n\
                     Description: x\n{fields}\n",
                    architecture.in_packages()
                )
            };
            let status = [
                installed("greeting-utils", "Depends: libgreeting (= 3)\n"),
                installed("libgreeting", ""),
                installed("libc6", ""),
            ];
            fs::write(path("status"), status.concat()).unwrap();
            repository
        }

        fn run(&self, command: &mut Command) {
            let output = command.output().unwrap();
            assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        }

        /// Creates a package; returns its index entry.
        fn package(&self, folder: &str, name: &str, depends: &str) -> String {
            let folder = self.folder.path().join(folder);
            let architecture = crate::architecture::Architecture::HOST.in_packages();
            let control = format!(
                "Package: {name}\nVersion: 2\nArchitecture: {architecture}\nMaintainer: x\nDepends: {depends}\nDescription: x\n"
            );
            fs::create_dir_all(folder.join("DEBIAN")).unwrap();
            fs::write(folder.join("DEBIAN/control"), &control).unwrap();
            let deb = self.folder.path().join(format!("{name}.deb"));
            self.run(Command::new("dpkg-deb").args(["--root-owner-group", "--build"]).arg(&folder).arg(&deb));
            let bytes = fs::read(&deb).unwrap();
            let digest: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
            format!("{control}Filename: ./{name}.deb\nSize: {}\nSHA256: {digest}\n\n", bytes.len())
        }

        fn options(&self) -> Vec<String> {
            let set = |name: &str, file: &str| format!("{name}={}", self.folder.path().join(file).display());
            vec![
                set("Dir::Etc::sourcelist", "sources.list"),
                "Dir::Etc::sourceparts=/dev/null".to_owned(),
                set("Dir::State", "state"),
                set("Dir::State::status", "status"),
                set("Dir::Cache", "cache"),
                "APT::Sandbox::User=root".to_owned(),
            ]
        }
    }

    #[test]
    fn a_package_that_conflicts_with_the_users_is_unpacked_and_works() {
        let home = tempfile::tempdir().unwrap();
        let workspace = Workspace::at(home.path());
        let wanted = Package::new("greeting-tool", Evidence::Program("greeting-tool"), "a test");
        if !Packages::new(&workspace).has_apt() {
            let error = Packages::new(&workspace).ensure(&[wanted]).unwrap_err();
            assert!(error.to_string().contains("not a Debian"), "{error:#}");
            return;
        }
        let repository = Repository::new();
        let options = repository.options();
        let packages = Packages::with_options(&workspace, &options);
        assert!(packages.apt.refresh());
        let complaint = packages.apt.simulate(&["greeting-tool"]).unwrap().unwrap_or_default();
        assert!(complaint.contains("greeting"), "{complaint}");

        // A package that only works when installed is refused, with the cause.
        let fixed = wanted.clone().in_place();
        let error = packages.ensure(std::slice::from_ref(&fixed)).unwrap_err();
        assert!(format!("{error:#}").contains("greeting-tool: "), "{error:#}");
        assert!(workspace.which("greeting-tool").is_none());

        packages.ensure(std::slice::from_ref(&wanted)).unwrap();
        let program = workspace.which("greeting-tool").unwrap();
        assert!(program.starts_with(workspace.target("tools/debian/bin")), "{}", program.display());
        // By its path, and as other programs find it.
        for name in [program.as_path(), Path::new("greeting-tool")] {
            let output =
                workspace.command("sh").args(["-c", "exec \"$0\" 'two words'"]).arg(name).output().unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout), "version 2\ntwo words\n");
            assert_eq!(output.status.code(), Some(3));
        }
        // The user's packages are unchanged, and nothing is done twice.
        let status = fs::read_to_string(repository.folder.path().join("status")).unwrap();
        assert!(status.contains("Package: greeting-utils") && !status.contains("Version: 2"), "{status}");
        assert!(packages.missing(&[wanted]).unwrap().is_empty());
    }

    #[test]
    fn what_has_to_be_unpacked_is_not_installed() {
        let [a, b] = ["a", "b"].map(|name| Package::new(name, Evidence::Installed, "a test"));
        let b = b.unpacked();
        let plan = Plan::one_by_one(&[&a, &b], apt(&[])).unwrap();
        assert_eq!((names(&plan.install), names(&plan.unpack)), (vec!["a"], vec!["b"]));
    }
}
