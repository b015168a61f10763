//! Kernels to boot: packages of Debian's archive, unpacked below `target/vm/kernels`, or files that the user names.

use std::cmp::Ordering;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::apt::{Archive, Candidate};
use crate::workspace::Workspace;

/// The flavor for virtual machines: small, and with everything that containers need.
const FLAVOUR: &str = "-cloud-amd64";

/// The suffix of kernels with `PREEMPT_RT`, and their flavor.
const RT: (&str, &str) = ("-rt", "-rt-amd64");

/// The archive's newest kernel.
pub(super) const NEWEST: &str = "newest";

/// A kernel that can be booted.
#[derive(Clone, Debug)]
pub(super) struct Kernel {
    /// Its release name.
    pub(super) release: String,
    pub(super) image: PathBuf,
    /// The directory that contains `lib/modules/<release>`.
    pub(super) modules: PathBuf,
}

impl Kernel {
    /// A kernel that the user provides: its image, beside or below a directory with `lib/modules`.
    pub(super) fn from_files(image: &Path) -> Result<Self> {
        let name = image.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let release = name.strip_prefix("vmlinuz-").with_context(|| {
            format!("{} is not named vmlinuz-<release>, so that its modules can't be found", image.display())
        })?;
        let modules = image.ancestors().find(|folder| folder.join("lib/modules").join(release).is_dir());
        let modules =
            modules.with_context(|| format!("no lib/modules/{release} above {}", image.display()))?;
        Ok(Self { release: release.to_owned(), image: image.to_owned(), modules: modules.to_owned() })
    }

    /// The newest kernel of a series, such as `6.1` or `6.1-rt`, or of the whole archive.
    pub(super) fn from_archive(workspace: &Workspace, archive: &Archive<'_>, alias: &str) -> Result<Self> {
        let candidates = archive.candidates("linux-image-")?;
        let package = choose(candidates, alias).with_context(|| match &archive.complaint {
            None => format!("Debian's archive has no kernel {alias} any more, or not yet"),
            Some(_) => format!("what could be read of Debian's archive has no kernel {alias}"),
        })?;
        let release = package.name.trim_start_matches("linux-image-").to_owned();
        let folder = workspace.target(format!("vm/kernels/{release}"));
        if !folder.is_dir() {
            fetch(archive, &package, &folder)?;
        }
        let modules = folder.join("lib/modules").join(&release);
        let images = [folder.join("boot").join(format!("vmlinuz-{release}")), modules.join("vmlinuz")];
        let image = images.into_iter().find(|image| image.is_file());
        let image = image.with_context(|| format!("no kernel image in {}", folder.display()))?;
        Ok(Self { release, image, modules: folder })
    }
}

fn fetch(archive: &Archive<'_>, package: &Candidate, folder: &Path) -> Result<()> {
    // Newer kernels are split into several packages.
    let parts = package
        .depends
        .iter()
        .filter(|name| ["linux-binary-", "linux-modules-"].iter().any(|prefix| name.starts_with(prefix)));
    let packages: Vec<String> = [package.name.clone()].into_iter().chain(parts.cloned()).collect();
    // The directory appears when it is complete.
    let partial = folder.with_extension("partial");
    let _ = fs::remove_dir_all(&partial);
    fs::create_dir_all(&partial)?;
    archive.unpack(&packages, &partial)?;
    let (usr, lib) = (partial.join("usr/lib/modules"), partial.join("lib/modules"));
    if usr.is_dir() && !lib.is_dir() {
        fs::create_dir_all(partial.join("lib"))?;
        fs::rename(usr, lib)?;
    }
    fs::rename(&partial, folder).with_context(|| format!("cannot create {}", folder.display()))
}

fn choose(candidates: Vec<Candidate>, alias: &str) -> Option<Candidate> {
    let (series, flavour) = alias.strip_suffix(RT.0).map_or((alias, FLAVOUR), |series| (series, RT.1));
    let of_the_series = |candidate: &Candidate| {
        candidate.name.ends_with(flavour)
            && candidate.name.trim_start_matches("linux-image-").starts_with(|first: char| first.is_ascii_digit())
            // Metapackages have no version of their own in their names.
            && candidate.name.trim_end_matches(flavour).matches('.').count() > 1
            && (series == NEWEST || candidate.version.starts_with(&format!("{series}.")))
    };
    candidates.into_iter().filter(of_the_series).max_by(|one, other| compare(&one.version, &other.version))
}

/// Compares versions number by number.
fn compare(one: &str, other: &str) -> Ordering {
    let numbers = |version: &str| -> Vec<u64> {
        version.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
    };
    numbers(one).cmp(&numbers(other))
}

/// Whether the user's name of a kernel is a path.
pub(super) fn is_file(kernel: &str) -> Result<bool> {
    let series = kernel.strip_suffix(RT.0).unwrap_or(kernel);
    if series == NEWEST || series.split('.').all(|part| !part.is_empty() && part.parse::<u32>().is_ok()) {
        return Ok(false);
    }
    if Path::new(kernel).is_file() {
        return Ok(true);
    }
    bail!("{kernel} is neither a series, such as 6.1 or 6.1-rt, nor {NEWEST}, nor a kernel image");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(name: &str, version: &str) -> Candidate {
        Candidate { name: format!("linux-image-{name}"), version: version.into(), ..Candidate::default() }
    }

    #[test]
    fn the_newest_of_a_series_is_chosen() {
        let candidates = || {
            vec![
                candidate("6.1.0-9-cloud-amd64", "6.1.99-1"),
                candidate("6.1.0-56-cloud-amd64", "6.1.192-2"),
                candidate("6.1.0-56-amd64", "6.1.192-2"),
                candidate("6.1.0-56-rt-amd64", "6.1.192-2"),
                candidate("6.1.0-56-rt-amd64-unsigned", "6.1.192-2"),
                candidate("6.12-rt-amd64", "6.12.117-1"),
                candidate("6.1-cloud-amd64", "6.1.192-2"),
                candidate("6.12.117+deb12-cloud-amd64", "6.12.117-1~deb12u1"),
                candidate("7.2.12+deb13-cloud-amd64", "7.2.12-1~bpo13+1"),
                candidate("7.2.9+deb13-cloud-amd64", "7.2.9-1~bpo13+1"),
                candidate("cloud-amd64", "9.9.9"),
            ]
        };
        let chosen = |alias| choose(candidates(), alias).map(|candidate| candidate.name);
        assert_eq!(chosen("6.1").as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(chosen("6.12").as_deref(), Some("linux-image-6.12.117+deb12-cloud-amd64"));
        assert_eq!(chosen(NEWEST).as_deref(), Some("linux-image-7.2.12+deb13-cloud-amd64"));
        assert_eq!(chosen("6.1-rt").as_deref(), Some("linux-image-6.1.0-56-rt-amd64"));
        assert_eq!(chosen("newest-rt").as_deref(), Some("linux-image-6.1.0-56-rt-amd64"));
        assert_eq!(chosen("5.15"), None);
    }

    #[test]
    fn series_and_files_are_told_apart() {
        assert!(!is_file("6.1").unwrap_or(true));
        assert!(!is_file(NEWEST).unwrap_or(true));
        assert!(!is_file("6.12-rt").unwrap_or(true));
        assert!(is_file("/proc/self/exe").unwrap_or(false));
        assert!(is_file("6.x").is_err());
    }
}
