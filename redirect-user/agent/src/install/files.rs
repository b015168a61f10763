//! Disk operations behind a trait, so that tests can kill the process between any two steps.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::process;
use std::time::SystemTime;

use super::error::Error;

/// The prefix of temporary files, which are renamed when they are complete.
const TEMPORARY: &str = ".ambient-redirect.";

/// Their suffix. Runtimes ignore such files; the next run removes what a crash left.
const ENDING: &str = ".tmp";

/// Mode and owner of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// The disk operations.
pub(super) trait Files {
    fn create(&mut self, path: &Path) -> io::Result<File>;
    fn write(&mut self, file: &mut File, bytes: &[u8]) -> io::Result<()>;
    fn attribute(&mut self, file: &File, attributes: Attributes) -> io::Result<()>;
    fn sync(&mut self, file: &File) -> io::Result<()>;
    fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()>;
    fn remove(&mut self, path: &Path) -> io::Result<()>;
    fn sync_directory(&mut self, path: &Path) -> io::Result<()>;
}

/// The real file system.
#[derive(Debug)]
pub(super) struct Disk;

impl Files for Disk {
    fn create(&mut self, path: &Path) -> io::Result<File> {
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
    }

    fn write(&mut self, file: &mut File, bytes: &[u8]) -> io::Result<()> {
        file.write_all(bytes)
    }

    fn attribute(&mut self, file: &File, attributes: Attributes) -> io::Result<()> {
        file.set_permissions(Permissions::from_mode(attributes.mode))?;
        match fchown(file, Some(attributes.uid), Some(attributes.gid)) {
            // The agent has dropped CAP_CHOWN, so a configuration of another user becomes root's.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
            changed => changed,
        }
    }

    fn sync(&mut self, file: &File) -> io::Result<()> {
        file.sync_all()
    }

    fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&mut self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_directory(&mut self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }
}

/// Creates or replaces a file atomically.
pub(super) fn replace(
    files: &mut impl Files,
    path: &Path,
    bytes: &[u8],
    attributes: Attributes,
) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let temporary = temporary(directory);
    let mut file = files.create(&temporary)?;
    files.write(&mut file, bytes)?;
    files.attribute(&file, attributes)?;
    files.sync(&file)?;
    // A file that is open for writing can't be executed.
    drop(file);
    files.rename(&temporary, path)?;
    files.sync_directory(directory)
}

/// Removes the leftovers of a crash.
pub(super) fn sweep(directory: &Path, files: &mut impl Files) -> Result<(), Error> {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(TEMPORARY) && name.ends_with(ENDING) {
            let path = entry.path();
            files.remove(&path).map_err(|source| Error::write(&path, source))?;
        }
    }
    Ok(())
}

/// Unique, because another process may be writing as well.
fn temporary(directory: &Path) -> PathBuf {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    directory.join(format!("{TEMPORARY}{}-{}{ENDING}", process::id(), now.as_nanos()))
}
