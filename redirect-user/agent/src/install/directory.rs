//! The contents of a configuration directory.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::chain::Chain;
use super::error::Error;
use super::files::Attributes;
use redirect_protocol::input::read_file;

/// The files that runtimes read, in their order.
#[derive(Debug)]
pub(super) struct Directory {
    pub(super) path: PathBuf,
    pub(super) files: Vec<Conf>,
    /// The contents from before our entry was added, by the files' names.
    pub(super) originals: Vec<Conf>,
    /// Configurations of others that Cilium has renamed to disable them.
    pub(super) disabled_by_cilium: Vec<String>,
}

/// The suffix of files that keep a configuration from before our entry was added. Runtimes ignore such files.
const ORIGINAL: &str = ".before-ambient-redirect";

/// The name of the file that keeps a configuration.
pub(super) fn original_of(name: &str) -> String {
    format!("{name}{ORIGINAL}")
}

/// Whether a file with this name keeps a configuration.
pub(super) fn is_original(name: &str) -> bool {
    name.ends_with(ORIGINAL)
}

/// The maximum size of a configuration.
const LONGEST: usize = 1 << 20;

/// The maximum number of files in the directory.
const MOST: usize = 10_000;

/// A configuration file.
#[derive(Debug)]
pub(super) struct Conf {
    pub(super) name: String,
    pub(super) attributes: Attributes,
    /// Empty if the file is too long.
    pub(super) bytes: Vec<u8>,
    too_long: bool,
    /// The error says why it is not a valid configuration.
    pub(super) chain: Result<Chain, String>,
}

impl Directory {
    pub(super) fn read(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::read(path, source);
        let mut directory = Self {
            path: path.into(),
            files: Vec::new(),
            originals: Vec::new(),
            disabled_by_cilium: Vec::new(),
        };
        for (number, entry) in fs::read_dir(path).map_err(failed)?.enumerate() {
            if number == MOST {
                let what = format!("it has more than {MOST} files");
                return Err(failed(io::Error::new(io::ErrorKind::FileTooLarge, what)));
            }
            let Ok(name) = entry.map_err(failed)?.file_name().into_string() else { continue };
            if name.ends_with(".cilium_bak") {
                directory.disabled_by_cilium.push(name);
            } else if let Some(of) = name.strip_suffix(ORIGINAL) {
                let kept = Conf::read(&path.join(&name), of.to_owned())?;
                // A kept configuration must be complete to be restored.
                if kept.as_ref().is_some_and(|kept| kept.too_long) {
                    let what = format!("{name} is larger than {LONGEST} bytes");
                    return Err(failed(io::Error::new(io::ErrorKind::FileTooLarge, what)));
                }
                directory.originals.extend(kept);
            } else if [".conf", ".conflist", ".json"].iter().any(|end| name.ends_with(end)) {
                directory.files.extend(Conf::read(&path.join(&name), name)?);
            }
        }
        directory.files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(directory)
    }

    pub(super) fn get(&self, name: &str) -> Option<&Conf> {
        self.files.iter().find(|conf| conf.name == name)
    }

    /// The problems of the invalid files.
    pub(super) fn invalid(&self) -> Vec<String> {
        let complaint = |conf: &Conf| Some(format!("{} {}", conf.name, conf.chain.as_ref().err()?));
        self.files.iter().filter_map(complaint).collect()
    }
}

impl Conf {
    /// `None` if it is not a file, or was just removed.
    fn read(path: &Path, name: String) -> Result<Option<Self>, Error> {
        let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
        let metadata = match fs::metadata(path) {
            Ok(metadata) if metadata.is_file() => metadata,
            Ok(_) => return Ok(None),
            Err(error) if gone(&error) => return Ok(None),
            Err(error) => return Err(Error::read(path, error)),
        };
        let attributes =
            Attributes { mode: metadata.mode() & 0o7777, uid: metadata.uid(), gid: metadata.gid() };
        match read_file(path, LONGEST) {
            Ok(bytes) => {
                let chain = Chain::parse(&name, &bytes);
                Ok(Some(Self { chain, name, attributes, bytes, too_long: false }))
            }
            // Runtimes can't use it either.
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
                let chain = Err(error.to_string());
                Ok(Some(Self { chain, name, attributes, bytes: Vec::new(), too_long: true }))
            }
            Err(error) if gone(&error) => Ok(None),
            Err(error) => Err(Error::read(path, error)),
        }
    }
}
