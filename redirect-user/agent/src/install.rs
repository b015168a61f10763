//! Adds the plugin to the node's CNI chain, keeps it there, and removes it.
//!
//! ```text
//!  directory: what is there ──▶ plan: what is to be done ──▶ files: one atomic step after the other
//!                                 ▲
//!  plugin: the binary answers VERSION and STATUS before anything refers to it
//!  keep: inotify, repairs, and how often
//! ```
//!
//! Invariant: after every single step the directory holds a working chain, with or without our plugin. So the binary is in
//! place before any configuration names it, and is removed only when none does.

mod chain;
mod directory;
mod error;
mod files;
mod keep;
mod options;
mod pace;
mod plan;
mod plugin;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

pub use error::Error;
pub use keep::keep;
pub use options::{Directories, Install, Options};

use chain::Chain;
use directory::{Directory, is_original};
use files::{Disk, Files};
use plan::Op;
use redirect_linux::lock;

/// The plugin's file name, which is also its type in configurations.
pub const PLUGIN: &str = "redirect-cni";

/// Our own configuration, for `--cni-own-conf`. Its name sorts before those that primary CNIs write.
pub const OWN_CONF: &str = "00-ambient-redirect.conflist";

/// The result of an installation.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The configuration that now has the plugin.
    pub configuration: PathBuf,
    /// The files that were written or removed; empty if everything was in place.
    pub changed: Vec<PathBuf>,
    /// Warnings for the operator.
    pub warnings: Vec<String>,
}

/// `redirect install`.
pub fn run(install: Install) -> anyhow::Result<()> {
    if install.remove {
        for path in remove(&install.options.directories)? {
            println!("changed: {}", path.display());
        }
        return Ok(());
    }
    if install.check {
        let missing = missing(&install.options)?;
        anyhow::ensure!(missing.is_empty(), "not in place: {}", missing.join(", "));
        return Ok(());
    }
    if install.watch {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        return runtime.block_on(keep::until_signal(install.options));
    }
    let outcome = install_once(&install.options)?;
    for warning in &outcome.warnings {
        eprintln!("redirect: {warning}");
    }
    for path in &outcome.changed {
        println!("changed: {}", path.display());
    }
    println!("in place: {}", outcome.configuration.display());
    Ok(())
}

/// Installs plugin and entry, or repairs them. Changes nothing if everything is in place.
pub fn install_once(options: &Options) -> Result<Outcome, Error> {
    install(options, &mut Disk)
}

/// Removes the entry from every configuration, then the plugin. Needs neither agent nor cluster. Returns the
/// changed files.
pub fn remove(directories: &Directories) -> Result<Vec<PathBuf>, Error> {
    take_out(directories, &mut Disk)
}

/// The node's chain as container runtimes see it.
#[derive(Debug)]
pub struct Found {
    /// The configuration that they use.
    pub configuration: PathBuf,
    /// Whether it contains our plugin.
    pub chained: bool,
    /// The plugin, or its problem.
    pub plugin: Result<PathBuf, String>,
}

/// Reads a node's chain. Asks the plugin for its versions.
pub fn find(directories: &Directories) -> Result<Found, Error> {
    let directory = Directory::read(&directories.cni_conf_dir)?;
    let Some((conf, chain)) = directory.files.iter().find_map(|conf| Some((conf, conf.chain.as_ref().ok()?)))
    else {
        let invalid = directory.invalid();
        return Err(Error::NoConfiguration { directory: directories.cni_conf_dir.clone(), invalid });
    };
    let plugin = directories.installed_plugin();
    Ok(Found {
        configuration: directories.cni_conf_dir.join(&conf.name),
        chained: chain.has(PLUGIN),
        plugin: plugin::versions(&plugin).map(|_| plugin).map_err(|error| error.to_string()),
    })
}

/// A configuration with the plugin's entry, as `redirect install` writes it, or the reason why container runtimes
/// reject it.
pub fn chained(name: &str, configuration: &[u8], entry: &Map<String, Value>) -> Result<Value, String> {
    Ok(Chain::parse(name, configuration)?.with(entry).document())
}

/// A configuration without the plugin, as `redirect install --remove` leaves it.
pub fn unchained(name: &str, configuration: &[u8]) -> Result<Value, String> {
    Ok(Chain::parse(name, configuration)?.without().document())
}

/// The changes that an installation would make.
pub(crate) fn missing(options: &Options) -> Result<Vec<String>, Error> {
    let mut missing = Vec::new();
    if !plugin::is_current(options)? {
        missing.push(options.directories.installed_plugin().display().to_string());
    }
    let plan = plan::install(&Directory::read(&options.directories.cni_conf_dir)?, options)?;
    missing.extend(
        plan.ops.iter().map(|op| options.directories.cni_conf_dir.join(op.name()).display().to_string()),
    );
    Ok(missing)
}

fn install(options: &Options, files: &mut impl Files) -> Result<Outcome, Error> {
    let _lock = lock(&options.directories.cni_conf_dir)?;
    // Checked before anything is changed.
    plan::install(&Directory::read(&options.directories.cni_conf_dir)?, options)?;
    for directory in [&options.directories.cni_conf_dir, &options.directories.cni_bin_dir] {
        files::sweep(directory, files)?;
    }
    let mut outcome = Outcome::default();
    if plugin::install(options, files)? {
        outcome.changed.push(options.directories.installed_plugin());
    }
    // Read again, because a primary CNI may have written meanwhile.
    let plan = plan::install(&Directory::read(&options.directories.cni_conf_dir)?, options)?;
    outcome.configuration = options.directories.cni_conf_dir.join(&plan.target);
    if !plan.ops.is_empty() {
        plan.check_versions(&plugin::versions(&options.directories.installed_plugin())?)?;
        outcome.warnings.extend(plugin::ready(options)?);
        outcome.changed.extend(execute(&options.directories.cni_conf_dir, plan.ops, files)?);
    }
    outcome.warnings.extend(plan.warnings);
    Ok(outcome)
}

fn take_out(directories: &Directories, files: &mut impl Files) -> Result<Vec<PathBuf>, Error> {
    let mut changed = Vec::new();
    // Without a directory there are no entries.
    if directories.cni_conf_dir.is_dir() {
        let _lock = lock(&directories.cni_conf_dir)?;
        let ops = plan::remove(&Directory::read(&directories.cni_conf_dir)?);
        changed.extend(execute(&directories.cni_conf_dir, ops, files)?);
        files::sweep(&directories.cni_conf_dir, files)?;
    }
    let plugin = directories.installed_plugin();
    if plugin.exists() {
        files.remove(&plugin).map_err(|source| Error::write(&plugin, source))?;
        changed.push(plugin);
    }
    if directories.cni_bin_dir.is_dir() {
        files::sweep(&directories.cni_bin_dir, files)?;
    }
    Ok(changed)
}

fn execute(directory: &Path, ops: Vec<Op>, files: &mut impl Files) -> Result<Vec<PathBuf>, Error> {
    let mut changed = Vec::new();
    for op in ops {
        let path = directory.join(op.name());
        let done = match op {
            Op::Write { ref bytes, attributes, .. } => files::replace(files, &path, bytes, attributes),
            Op::Remove { .. } => files.remove(&path).and_then(|()| files.sync_directory(directory)),
        };
        done.map_err(|source| Error::write(&path, source))?;
        if !is_original(op.name()) {
            changed.push(path);
        }
    }
    Ok(changed)
}

/// Installers should not run concurrently, although a DaemonSet's old and new pod overlap. If they do, each still
/// writes whole files.
fn lock(directory: &Path) -> Result<File, Error> {
    lock::of_directory(directory).map_err(|source| Error::read(directory, source))
}
