//! Loads the eBPF object. Its maps are created, or reused from the pins; its programs are always its own.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use anyhow::{Context as _, bail};
use aya::programs::{CgroupSockAddr, Program, SchedClassifier, SkLookup, SockOps};
use aya::{Ebpf, EbpfLoader};
use aya_log::{EbpfLogger, Level};
use aya_obj::EbpfSectionKind;
use aya_obj::generated::bpf_map_info;
use redirect_ebpf::constants::MAX_PROXY_CGROUPS;

use super::listeners::NotedBy;
use super::maps::DIAGNOSTICS;
use super::pins::Pins;
use super::placed::{Placed, on_root};
use super::{PROBE, Settings, placed};
use crate::facts::Lookup;
use crate::faults::Words;
use redirect_linux::bpf;
use redirect_linux::link;

/// The kernel side's object from the build script, aligned as ELF requires.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/redirect.o"));

/// Creates the maps and prepares the programs, without loading them.
pub fn load(settings: &Settings) -> anyhow::Result<Ebpf> {
    loader(settings).load(&bytes(settings)?).context(REMEDY)
}

/// The layout of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    /// `enum bpf_map_type`.
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

impl Layout {
    /// The layout of a pinned map.
    fn of_pin(pin: &Path) -> io::Result<Self> {
        let bpf_map_info { type_: kind, key_size, value_size, max_entries, map_flags: flags, .. } =
            bpf::info(bpf::obj_get(pin)?.as_fd())?;
        Ok(Self { kind, key_size, value_size, max_entries, flags })
    }
}

const REMEDY: &str =
    "the eBPF maps can't be created: the agent needs root (CAP_BPF, CAP_NET_ADMIN) and a kernel with BTF";

/// Like [`load`], with pinned maps. Returns their pins as well.
pub(super) fn load_pinned(settings: &Settings, pins: &Pins) -> anyhow::Result<(Ebpf, Vec<PathBuf>)> {
    let bytes = bytes(settings)?;
    let object = aya_obj::Object::parse(&bytes).context("cannot parse the eBPF object")?;
    let capacities = capacities(settings);
    let mut loader = loader(settings);
    let mut paths = Vec::new();
    let shared = object.maps.iter().filter(|(name, map)| outlives_the_agent(name, map.section_kind()));
    for (name, map) in shared {
        let chosen = capacities.iter().find(|(known, _)| known == name);
        let layout = Layout {
            kind: map.map_type(),
            key_size: map.key_size(),
            value_size: map.value_size(),
            max_entries: chosen.map_or(map.max_entries(), |(_, capacity)| *capacity),
            flags: map.map_flags(),
        };
        let Layout { kind, key_size, value_size, max_entries, flags } = layout;
        let path = pins.maps().join(format!("{name}-{kind}-{key_size}-{value_size}-{max_entries}-{flags}"));
        match Layout::of_pin(&path) {
            Ok(found) if found == layout => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.kind() != io::ErrorKind::InvalidInput => {
                // It may be our pin.
                return Err(error).with_context(|| format!("cannot read the pin {}", path.display()));
            }
            found => {
                tracing::warn!(pin = %path.display(), ?found, "replacing a pin that is not our map");
                fs::remove_file(&path).with_context(|| path.display().to_string())?;
            }
        }
        loader.map_pin_path(name, path.clone());
        paths.push(path);
    }
    Ok((loader.load(&bytes).context(REMEDY)?, paths))
}

/// aya-log's ring buffer.
const LOG: &str = "AYA_LOGS";

/// Not the log, which belongs to one agent, nor read-only data, which every load creates anew: settings and the log's
/// texts.
fn outlives_the_agent(map: &str, kind: EbpfSectionKind) -> bool {
    ![LOG, DIAGNOSTICS].contains(&map) && kind != EbpfSectionKind::Rodata
}

/// The drop log's reader. To be called before the programs are loaded.
pub(super) fn log(object: &mut Ebpf) -> anyhow::Result<(EbpfLogger<Words>, Arc<AtomicU32>)> {
    let (words, read) = Words::counted();
    Ok((EbpfLogger::init_with_logger(object, words).context("drop log of the eBPF programs")?, read))
}

fn bytes(settings: &Settings) -> anyhow::Result<Cow<'static, [u8]>> {
    if let Some(path) = &settings.object {
        return Ok(fs::read(path).with_context(|| format!("eBPF object {}", path.display()))?.into());
    }
    if OBJECT.is_empty() {
        bail!("this binary was built without its eBPF programs: build it with `cargo xtask build`");
    }
    Ok(OBJECT.into())
}

fn capacities(settings: &Settings) -> [(&'static str, u32); 10] {
    let capacities = settings.capacities;
    [
        ("PODS", capacities.pods),
        ("POD_COUNTERS", capacities.pods),
        ("POD_IPV4", capacities.addresses),
        ("POD_IPV6", capacities.addresses),
        ("INTERFACES", capacities.addresses),
        ("EXCLUDED_IPV4", capacities.exclusions),
        ("EXCLUDED_IPV6", capacities.exclusions),
        ("EXCLUDED_PORTS", capacities.exclusions),
        // A pod has three listeners of the proxy, each for both families, and twice as many while one proxy replaces another.
        ("LISTENERS", capacities.pods.saturating_mul(12)),
        ("PROXY_CGROUPS", MAX_PROXY_CGROUPS),
    ]
}

fn loader<'a>(settings: &Settings) -> EbpfLoader<'a> {
    let mut loader = EbpfLoader::new();
    if settings.diagnostics {
        loader.override_global(aya_log::LEVEL, &(Level::Debug as u8), true);
    } else {
        // The verifier removes the code for other levels.
        loader.override_global(aya_log::LEVEL, &0u8, true);
        // One page.
        loader.map_max_entries(LOG, 1);
    }
    for (name, capacity) in capacities(settings) {
        loader.map_max_entries(name, capacity);
    }
    let in_pods = if placed(settings.placement).looks_up_in_pods() { &1u8 } else { &0u8 };
    loader.override_global("LOOKUP_IN_PODS", in_pods, true);
    let tc_knows_listeners = match settings.noted_by {
        NotedBy::Tc => &1u8,
        NotedBy::SockOps => &0u8,
    };
    loader.override_global("TC_KNOWS_LISTENERS", tc_knows_listeners, true);
    loader
}

/// The loaded programs, by name.
pub(super) struct Programs(BTreeMap<&'static str, link::Program>);

impl Programs {
    /// Loads the programs that these placements need.
    pub(super) fn load(
        object: &mut Ebpf,
        placements: &[&'static dyn Placed],
        noted_by: NotedBy,
    ) -> anyhow::Result<Self> {
        let of_placement = |&placed: &&'static dyn Placed| {
            let cgroup = on_root(placed, noted_by).map(|(name, _)| name);
            cgroup.chain(placed.hooks().iter().map(|hook| hook.program()))
        };
        let of_both = Lookup::ALL.map(Lookup::program).into_iter().chain([PROBE]);
        let names: BTreeSet<_> = placements.iter().flat_map(of_placement).chain(of_both).collect();
        let mut programs = BTreeMap::new();
        for name in names {
            let program =
                object.program_mut(name).with_context(|| format!("program {name} is not in the object"))?;
            let loaded = match program {
                Program::CgroupSockAddr(program) => CgroupSockAddr::load(program),
                Program::SchedClassifier(program) => SchedClassifier::load(program),
                Program::SkLookup(program) => SkLookup::load(program),
                Program::SockOps(program) => SockOps::load(program),
                other => bail!("program {name} is of an unexpected type {:?}", other.prog_type()),
            };
            loaded.with_context(|| format!("the kernel rejects program {name}"))?;
            let fd = program.fd()?.as_fd().try_clone_to_owned()?;
            programs.insert(name, link::Program { fd, id: program.info()?.id() });
        }
        Ok(Self(programs))
    }

    pub(super) fn get(&self, name: &str) -> io::Result<&link::Program> {
        self.0.get(name).ok_or_else(|| io::Error::other(format!("program {name} is not loaded")))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&'static str, u32)> {
        self.0.iter().map(|(name, program)| (*name, program.id))
    }
}
