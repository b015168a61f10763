//! The contents of a configuration directory.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::chain::Chain;
use super::error::Error;
use super::files::Attributes;
use redirect_protocol::input::read_file;

/// The files that runtimes look at, in the order in which they do.
#[derive(Debug)]
pub(super) struct Directory {
    pub(super) path: PathBuf,
    pub(super) files: Vec<Conf>,
    /// What was there before our entry came, by the names that the files had.
    pub(super) originals: Vec<Conf>,
    /// Names that Cilium gave to configurations of others, to disable them.
    pub(super) disabled_by_cilium: Vec<String>,
}

/// How the name of a file ends that keeps what was in a configuration before our entry came. Runtimes read no such file.
const ORIGINAL: &str = ".before-ambient-redirect";

/// The name of the file that keeps what was in a configuration.
pub(super) fn original_of(name: &str) -> String {
    format!("{name}{ORIGINAL}")
}

/// Whether a file of this name keeps what was in a configuration.
pub(super) fn is_original(name: &str) -> bool {
    name.ends_with(ORIGINAL)
}

/// The longest configuration.
const LONGEST: usize = 1 << 20;

/// How many names a directory may have.
const MOST: usize = 10_000;

/// One of them.
#[derive(Debug)]
pub(super) struct Conf {
    pub(super) name: String,
    pub(super) attributes: Attributes,
    /// Empty, if it is too long.
    pub(super) bytes: Vec<u8>,
    too_long: bool,
    /// The error says why it is no configuration.
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
                // What is put back has to be all of it.
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

    /// What is wrong with the files that are no configurations.
    pub(super) fn invalid(&self) -> Vec<String> {
        let complaint = |conf: &Conf| Some(format!("{} {}", conf.name, conf.chain.as_ref().err()?));
        self.files.iter().filter_map(complaint).collect()
    }
}

impl Conf {
    /// `None` if it is no file, or has just gone.
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
            // No runtime gets anywhere with it either.
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
                let chain = Err(error.to_string());
                Ok(Some(Self { chain, name, attributes, bytes: Vec::new(), too_long: true }))
            }
            Err(error) if gone(&error) => Ok(None),
            Err(error) => Err(Error::read(path, error)),
        }
    }
}
