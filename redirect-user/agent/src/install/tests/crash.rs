//! The process dies between any two steps: the chain works, and the next run completes.

use std::io;

use super::*;
use crate::install::files::{Attributes, Disk, Files};

/// Executes this many steps, then nothing, like a process that was killed. Writes half of the file at which it
/// is killed.
struct Mortal {
    left: usize,
    steps: Vec<&'static str>,
}

impl Mortal {
    fn step<T>(&mut self, name: &'static str, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if self.left == 0 {
            return Err(io::Error::other("dead"));
        }
        self.left -= 1;
        self.steps.push(name);
        act()
    }
}

impl Files for Mortal {
    fn create(&mut self, path: &Path) -> io::Result<File> {
        self.step("create", || Disk.create(path))
    }

    fn write(&mut self, file: &mut File, bytes: &[u8]) -> io::Result<()> {
        if self.left == 0 {
            Disk.write(file, &bytes[..bytes.len() / 2])?;
        }
        self.step("write", || Disk.write(file, bytes))
    }

    fn attribute(&mut self, file: &File, attributes: Attributes) -> io::Result<()> {
        self.step("attribute", || Disk.attribute(file, attributes))
    }

    fn sync(&mut self, file: &File) -> io::Result<()> {
        self.step("sync", || Disk.sync(file))
    }

    fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        self.step("rename", || Disk.rename(from, to))
    }

    fn remove(&mut self, path: &Path) -> io::Result<()> {
        self.step("remove", || Disk.remove(path))
    }

    fn sync_directory(&mut self, path: &Path) -> io::Result<()> {
        self.step("sync_directory", || Disk.sync_directory(path))
    }
}

type Task = fn(&Options, &mut Mortal) -> bool;

fn install_task(options: &Options, files: &mut Mortal) -> bool {
    install(options, files).is_ok()
}

fn remove_task(options: &Options, files: &mut Mortal) -> bool {
    take_out(&options.directories, files).is_ok()
}

/// Tries every number of steps until the task completes. Returns how many it needs.
fn die_everywhere(prepare: impl Fn() -> Host, task: Task, types: &[&str]) -> Vec<&'static str> {
    for left in 0..100 {
        let host = prepare();
        let mut mortal = Mortal { left, steps: Vec::new() };
        let survived = task(&host.options, &mut mortal);
        host.runtime_s_view();

        let mut next = Mortal { left: usize::MAX, steps: Vec::new() };
        assert!(task(&host.options, &mut next), "after {:?}", mortal.steps);
        assert_eq!(host.runtime_s_view(), types, "after {:?}", mortal.steps);
        for directory in [&host.options.directories.cni_conf_dir, &host.options.directories.cni_bin_dir] {
            for entry in fs::read_dir(directory).unwrap() {
                let name = entry.unwrap().file_name();
                assert!(!name.to_string_lossy().ends_with(".tmp"), "{name:?} after {:?}", mortal.steps);
            }
        }
        if survived {
            return mortal.steps;
        }
    }
    panic!("the task never ends")
}

const REPLACE: [&str; 6] = ["create", "write", "attribute", "sync", "rename", "sync_directory"];

#[test]
fn installation() {
    let fresh = || Host::new(&[("10-b.conflist", list())]);
    let steps = die_everywhere(fresh, install_task, &["bridge", PLUGIN]);
    assert_eq!(steps, [REPLACE; 3].concat(), "the plugin, the configuration as it was, then the new one");
}

#[test]
fn conversion_of_a_single_configuration() {
    let fresh = || Host::new(&[("10-b.conf", single())]);
    let steps = die_everywhere(fresh, install_task, &["bridge", PLUGIN]);
    assert_eq!(steps, [&[REPLACE; 3].concat()[..], &["remove", "sync_directory"]].concat());
}

#[test]
fn a_configuration_of_our_own() {
    let fresh = || {
        let mut host = Host::new(&[("10-b.conflist", list())]);
        host.options.cni_own_conf = true;
        host
    };
    die_everywhere(fresh, install_task, &["bridge", PLUGIN]);

    let back = || {
        let mut host = fresh();
        host.install().unwrap();
        host.options.cni_own_conf = false;
        host
    };
    die_everywhere(back, install_task, &["bridge", PLUGIN]);
}

#[test]
fn upgrade() {
    let installed = || {
        let mut host = Host::new(&[("10-b.conflist", list())]);
        host.install().unwrap();
        host.plugin(&format!("{PLUGIN_SCRIPT}# newer\n"));
        host.options.cni_timeout = Some(7);
        host
    };
    let steps = die_everywhere(installed, install_task, &["bridge", PLUGIN]);
    assert_eq!(steps.len(), 12);
}

#[test]
fn removal() {
    let installed = || {
        let host = Host::new(&[("10-b.conflist", list())]);
        host.install().unwrap();
        host
    };
    let steps = die_everywhere(installed, remove_task, &["bridge"]);
    let after = ["remove", "sync_directory", "remove"];
    assert_eq!(
        steps,
        [&REPLACE[..], &after].concat(),
        "the configuration, what was kept of it, then the plugin"
    );
}

#[test]
fn removal_of_a_single_configuration() {
    let installed = || {
        let host = Host::new(&[("10-b.conf", single())]);
        host.install().unwrap();
        host
    };
    die_everywhere(installed, remove_task, &["bridge"]);
}
