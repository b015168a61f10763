//! The embedded object.

use anyhow::{Context as _, bail};
use aya::programs::{Program, ProgramError};
use aya::{Ebpf, EbpfLoader};
use redirect_ebpf::constants::MAX_PROXY_CGROUPS;

use super::Settings;

/// The kernel side, as the build script found it. Aligned as an ELF file has to be.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/redirect.o"));

/// Creates the maps and prepares the programs. None of them is loaded yet.
pub fn load(settings: &Settings) -> anyhow::Result<Ebpf> {
    if OBJECT.is_empty() {
        bail!("this binary was built without its eBPF programs: build it with `cargo xtask build`");
    }
    let capacities = settings.capacities;
    EbpfLoader::new()
        .map_max_entries("PODS", capacities.pods)
        .map_max_entries("POD_IPV4", capacities.addresses)
        .map_max_entries("POD_IPV6", capacities.addresses)
        .map_max_entries("EXCLUDED_IPV4", capacities.exclusions)
        .map_max_entries("EXCLUDED_IPV6", capacities.exclusions)
        .map_max_entries("EXCLUDED_PORTS", capacities.exclusions)
        // A pod has two listeners of the proxy; twice that while one proxy takes over from another.
        .map_max_entries("LISTENERS", capacities.pods.saturating_mul(4))
        .map_max_entries("PROXY_CGROUPS", MAX_PROXY_CGROUPS)
        .load(OBJECT)
        .context("the eBPF maps can't be created: the agent needs root (CAP_BPF, CAP_NET_ADMIN) and a kernel with BTF")
}

/// A program of the object, by name.
pub(super) fn program<'a, T>(programs: &'a mut Ebpf, name: &str) -> anyhow::Result<&'a mut T>
where
    &'a mut T: TryFrom<&'a mut Program, Error = ProgramError>,
{
    let program =
        programs.program_mut(name).with_context(|| format!("program {name} is not in the object"))?;
    Ok(program.try_into()?)
}
