//! Installs the plugin's binary, and calls it with VERSION and STATUS before a configuration names it.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use serde::Deserialize;
use serde_json::json;

use super::error::Error;
use super::files::{self, Attributes, Files};
use super::{Options, PLUGIN};
use redirect_cni::SpecVersion;
use redirect_protocol::wire::{Request, client};

/// Copies the plugin unless it is there. Whether it was copied.
pub(super) fn install(options: &Options, files: &mut impl Files) -> Result<bool, Error> {
    if is_current(options)? {
        return Ok(false);
    }
    let source = source(options)?;
    // Asked before it replaces one that works.
    versions(&source)?;
    let bytes = fs::read(&source).map_err(|error| Error::read(&source, error))?;
    let target = options.directories.installed_plugin();
    let owner = fs::metadata(&options.directories.cni_bin_dir)
        .map_err(|error| Error::read(&options.directories.cni_bin_dir, error))?;
    let attributes = Attributes { mode: 0o755, uid: owner.uid(), gid: owner.gid() };
    files::replace(files, &target, &bytes, attributes).map_err(|error| Error::write(&target, error))?;
    Ok(true)
}

/// Whether the plugin is there, as it should be.
pub(super) fn is_current(options: &Options) -> Result<bool, Error> {
    let (source, target) = (source(options)?, options.directories.installed_plugin());
    let wanted = fs::read(&source).map_err(|error| Error::read(&source, error))?;
    match fs::symlink_metadata(&target) {
        Ok(metadata) if !metadata.is_file() || metadata.mode() & 0o111 != 0o111 => return Ok(false),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Error::read(&target, error)),
    }
    Ok(fs::read(&target).map_err(|error| Error::read(&target, error))? == wanted)
}

fn source(options: &Options) -> Result<PathBuf, Error> {
    match &options.cni_plugin {
        Some(path) => Ok(path.clone()),
        None => {
            let own = Path::new("/proc/self/exe");
            let own = fs::read_link(own).map_err(|error| Error::read(own, error))?;
            Ok(own.with_file_name(PLUGIN))
        }
    }
}

/// The versions of the specification that it says it supports.
pub(super) fn versions(plugin: &Path) -> Result<Vec<SpecVersion>, Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Answer {
        supported_versions: Vec<String>,
    }
    let wrong = |problem: String| Error::Plugin { path: plugin.into(), problem };
    let output = ask(plugin, "VERSION", "{}").map_err(|error| wrong(format!("cannot run it: {error}")))?;
    if !output.status.success() {
        return Err(wrong(format!("VERSION fails: {}", said(&output))));
    }
    let answer: Answer = serde_json::from_slice(&output.stdout)
        .map_err(|error| wrong(format!("VERSION answers {}: {error}", said(&output))))?;
    let known =
        |version: &SpecVersion| answer.supported_versions.iter().any(|known| known == version.as_str());
    Ok(SpecVersion::ALL.into_iter().filter(known).collect())
}

/// An error if pods could not start with the plugin in the chain; a warning if only enrolled ones could not.
pub(super) fn ready(options: &Options) -> Result<Option<String>, Error> {
    client::call(&options.cni_agent_socket, &Request::Status, None, Options::PATIENCE)?;
    let path = options.directories.installed_plugin();
    let mut config = options.entry();
    config.insert("cniVersion".into(), SpecVersion::LATEST.as_str().into());
    config.insert("name".into(), "status".into());
    config.insert("timeoutSeconds".into(), json!(Options::PATIENCE.as_secs()));
    let output = ask(&path, "STATUS", &json!(config).to_string())
        .map_err(|error| Error::Plugin { path: path.clone(), problem: format!("cannot run it: {error}") })?;
    if output.status.success() {
        return Ok(None);
    }
    #[derive(Deserialize)]
    struct Answer {
        code: u32,
        msg: String,
    }
    match serde_json::from_slice(&output.stdout) {
        // The agent answers: pods that are not enrolled start, the others wait.
        Ok(Answer { code: 50, msg }) => Ok(Some(msg)),
        _ => Err(Error::Plugin { path, problem: format!("STATUS fails: {}", said(&output)) }),
    }
}

fn ask(plugin: &Path, command: &str, config: &str) -> io::Result<Output> {
    let mut child = loop {
        match start(plugin, command) {
            // Another thread has forked while the binary was being written, and has not called exec yet.
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => {
                thread::sleep(Duration::from_millis(10));
            }
            started => break started?,
        }
    };
    if let Some(mut stdin) = child.stdin.take() {
        // One that does not read is judged by what it answers.
        let _ = stdin.write_all(config.as_bytes());
    }
    child.wait_with_output()
}

fn start(plugin: &Path, command: &str) -> io::Result<Child> {
    Command::new(plugin)
        .env_clear()
        .env("CNI_COMMAND", command)
        .env("CNI_PATH", plugin.parent().unwrap_or(Path::new("/")))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
}

fn said(output: &Output) -> String {
    let text = [output.stdout.as_slice(), b" ", &output.stderr].concat();
    format!("{}, {}", output.status, String::from_utf8_lossy(&text).trim())
}
