//! The check for leftovers works: tested with BPF objects of this process.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::{Failed, Trial};
use redirect_tests::kernel::Objects;

use crate::context::{Context, Needs, trial_that_needs};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    vec![trial_that_needs(Needs::Root, context, "leftovers::bpf_objects_are_found", bpf_objects_are_found)]
}

/// Ends the shared state, and checks for leftovers of all tests.
pub(crate) fn nothing_is_left(contexts: &[Arc<Context>; 2]) -> Trial {
    let contexts = contexts.clone();
    Trial::test("leftovers::nothing_is_left", move || {
        contexts.iter().for_each(|context| context.end_node());
        let left = contexts[0].finish()?;
        if left.is_empty() { Ok(()) } else { Err(Failed::from(format!("left behind: {}", left.join(", ")))) }
    })
}

fn bpf_objects_are_found(context: &Context) -> Result<()> {
    let session = context.session()?;
    let map = create_map().context("make a map")?;
    let program = load_program().context("load a program")?;
    let cgroup = File::open(session.applications().path())?;
    let link = attach(&program, &cgroup).context("attach the program")?;

    let mut mine = Objects::of(std::process::id(), std::collections::BTreeSet::new())?;
    // Concurrent tests may have objects as well, but not of these kinds.
    ensure!(!mine.maps.is_empty() && !mine.programs.is_empty() && !mine.links.is_empty(), "{mine:?}");
    let by_program = Objects::of(std::process::id(), mine.programs.clone())?;
    ensure!(by_program.links.is_superset(&mine.links), "{by_program:?}");
    mine = mine.alive()?;
    ensure!(mine.maps.len() + mine.programs.len() + mine.links.len() >= 3, "{mine:?}");

    drop((link, program, map));
    mine.wait_until_gone()
}

const MAP_CREATE: libc::c_long = 0;
const PROG_LOAD: libc::c_long = 5;
const LINK_CREATE: libc::c_long = 28;

fn create_map() -> std::io::Result<OwnedFd> {
    // An array of one: type, key size, value size, entries.
    bpf(MAP_CREATE, &[word(2, 4), word(8, 1)])
}

fn load_program() -> std::io::Result<OwnedFd> {
    // r0 = 1; exit: let every packet pass.
    let instructions: [u64; 2] = [0x0000_0001_0000_00b7, 0x95];
    let license = c"GPL";
    // A cgroup_skb program of two instructions.
    bpf(
        PROG_LOAD,
        &[
            word(8, 2),
            instructions.as_ptr().expose_provenance() as u64,
            license.as_ptr().expose_provenance() as u64,
        ],
    )
}

fn attach(program: &OwnedFd, cgroup: &File) -> std::io::Result<OwnedFd> {
    // For incoming packets.
    bpf(LINK_CREATE, &[word(program.as_raw_fd() as u32, cgroup.as_raw_fd() as u32), word(0, 0)])
}

/// Two neighbouring 32-bit fields.
fn word(first: u32, second: u32) -> u64 {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&first.to_ne_bytes());
    bytes[4..].copy_from_slice(&second.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}

fn bpf(command: libc::c_long, fields: &[u64]) -> std::io::Result<OwnedFd> {
    let mut attributes = [0u64; 16];
    attributes[..fields.len()].copy_from_slice(fields);
    // SAFETY: `attributes`, and what it points to, lives through the call, and its size is passed along.
    let descriptor =
        unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size_of_val(&attributes)) };
    if descriptor < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the kernel has just created the descriptor, and we alone own it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor as i32) })
}
