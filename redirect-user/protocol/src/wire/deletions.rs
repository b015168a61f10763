//! Notes of deletions while no agent runs. The runtime does not repeat a `DEL` that succeeded, and the namespace may outlive it
//! by a moment, in which the next agent could adopt the pod and keep it for good. So the plugin leaves a note beside the agent's
//! socket. The agent reads the notes after it has bound its socket and before it answers. A plugin that tries again after leaving
//! a note therefore either finds the socket, or its note is read.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::Attachment;

/// How many notes are read at a time. A node has at most hundreds of pods.
const MOST: usize = 65_536;

/// Neither container IDs nor interface names contain this character.
const SEPARATOR: char = ':';

/// Leaves a note, if the directory of the agent's socket exists: without it, no agent has run.
pub fn leave(socket: &Path, attachment: &Attachment) -> io::Result<()> {
    match fs::create_dir(directory(socket)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    File::create(note(socket, attachment)).map(drop)
}

/// Removes a note, if there is one: the agent has answered, or the attachment is about to be added.
pub fn take_back(socket: &Path, attachment: &Attachment) -> io::Result<()> {
    match fs::remove_file(note(socket, attachment)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

/// Lists the notes.
pub fn read(socket: &Path) -> io::Result<Vec<Attachment>> {
    let entries = match fs::read_dir(directory(socket)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let names = entries.take(MOST).map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>()?;
    let attachment = |name: &str| {
        let (container_id, interface) = name.split_once(SEPARATOR)?;
        Some(Attachment { container_id: container_id.into(), interface: interface.into() })
    };
    Ok(names.iter().filter_map(|name| attachment(name.to_str()?)).collect())
}

fn directory(socket: &Path) -> PathBuf {
    socket.with_extension("deleted")
}

fn note(socket: &Path, Attachment { container_id, interface }: &Attachment) -> PathBuf {
    directory(socket).join(format!("{container_id}{SEPARATOR}{interface}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_read_until_it_is_taken_back() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("agent.sock");
        let [first, second] = ["eth0", "net1"]
            .map(|interface| Attachment { container_id: "a-b.c_1".into(), interface: interface.into() });
        assert_eq!(read(&socket).unwrap(), []);
        take_back(&socket, &first).unwrap();
        for attachment in [&first, &second, &first] {
            leave(&socket, attachment).unwrap();
        }
        File::create(super::directory(&socket).join("something else")).unwrap();
        let mut notes = read(&socket).unwrap();
        notes.sort();
        assert_eq!(notes, [first.clone(), second.clone()]);
        take_back(&socket, &first).unwrap();
        assert_eq!(read(&socket).unwrap(), [second]);
    }

    #[test]
    fn where_no_agent_has_been_there_is_no_note() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("none/agent.sock");
        leave(&socket, &Attachment { container_id: "c".into(), interface: "eth0".into() }).unwrap();
        assert_eq!(read(&socket).unwrap(), []);
        assert!(!directory.path().join("none").exists());
    }
}
