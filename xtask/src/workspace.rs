//! Paths in the repository, and the commands that run there.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The repository. All build output goes below its `target`, regardless of `CARGO_TARGET_DIR`, because
/// `.cargo/config.toml` names the kernel side's object there.
pub(crate) struct Workspace {
    root: PathBuf,
}

impl Workspace {
    pub(crate) fn find() -> Self {
        let xtask = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let root = Path::new(&xtask).parent().unwrap_or(Path::new("/")).to_owned();
        Self { root }
    }

    #[cfg(test)]
    pub(crate) fn at(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// `<path>` in the repository.
    pub(crate) fn root(&self, path: impl AsRef<Path>) -> PathBuf {
        self.root.join(path)
    }

    /// `target/<path>`.
    pub(crate) fn target(&self, path: impl AsRef<Path>) -> PathBuf {
        self.root.join("target").join(path)
    }

    /// A path for messages: relative to the repository if it is inside.
    pub(crate) fn show<'a>(&self, path: &'a Path) -> std::path::Display<'a> {
        path.strip_prefix(&self.root).unwrap_or(path).display()
    }

    /// A command that runs in the repository's root directory.
    pub(crate) fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = self.command_here(program);
        command.current_dir(&self.root);
        command
    }

    /// A command that runs in the caller's directory.
    pub(crate) fn command_here(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        if let Some(path) = self.path() {
            command.env("PATH", path);
        }
        command
    }

    /// Scripts that start programs unpacked below `target/tools`.
    pub(crate) fn private_programs(&self) -> PathBuf {
        self.target("tools/debian/bin")
    }

    /// Finds a program like a shell, but also in the administrator's directories, which are not in every user's `PATH`, and
    /// among those unpacked below `target/tools`.
    pub(crate) fn which(&self, program: &str) -> Option<PathBuf> {
        let path = env::var_os("PATH").unwrap_or_default();
        env::split_paths(&path)
            .chain(["/usr/sbin".into(), "/sbin".into(), self.private_programs()])
            .map(|folder| folder.join(program))
            .find(|file| is_executable(file))
    }

    /// The `PATH` for commands, if it differs from ours: the programs unpacked below `target/tools` come
    /// last.
    fn path(&self) -> Option<OsString> {
        let ours = self.private_programs();
        let path = env::var_os("PATH").unwrap_or_default();
        let folders: Vec<PathBuf> = env::split_paths(&path).collect();
        if folders.contains(&ours) || !ours.is_dir() {
            return None;
        }
        env::join_paths(folders.into_iter().chain([ours])).ok()
    }

    /// The cargo that runs this task.
    pub(crate) fn cargo(&self) -> Command {
        let mut command = self.command(cargo());
        command.env("CARGO_TARGET_DIR", self.target(""));
        // Variables that the cargo of this task sets. Build scripts that check them would run again, and everything that
        // depends on them would be rebuilt.
        for (name, _) in env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
                command.env_remove(&name);
            }
        }
        command
    }
}

/// The directory of cargo's downloads.
pub(crate) fn cargo_home() -> Option<PathBuf> {
    let named = env::var_os("CARGO_HOME").map(PathBuf::from);
    named.or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")))
}

/// The path of the cargo that runs this task.
pub(crate) fn cargo() -> PathBuf {
    env::var_os("CARGO").map_or_else(|| "cargo".into(), PathBuf::from)
}

fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}
