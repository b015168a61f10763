//! `redirect uninstall`: removes everything that this project created in the kernel, without agent or cluster. The command also
//! removes the plugin from the CNI chain.
//!
//! It searches the kernel: every network namespace of the node for this project's rules, routes and filters, and all pins, of any
//! version. Checkpoints lead to namespaces that have neither processes nor mounts, and name the sysctls that were on before
//! enrollment.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use anyhow::Context as _;
use serde::Serialize;

use super::checkpoints::{self, Checkpoints};
use redirect_datapath::linux::{self, HostReport, InUse, Pins, Stripped};
use redirect_linux::netns::NetNs;
use redirect_protocol::pod::PodIdentity;

/// Settings.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Directory of the pins of maps and links
    #[arg(long, default_value = linux::DEFAULT_DIRECTORY, env = "REDIRECT_PIN_DIR", value_name = "DIRECTORY")]
    pub pin_dir: PathBuf,
    /// Directory of the checkpoints of enrolled pods
    #[arg(long, default_value = checkpoints::DEFAULT_DIRECTORY, env = "REDIRECT_STATE_DIR", value_name = "DIRECTORY")]
    pub state_dir: PathBuf,
    /// Continue even if an agent runs
    #[arg(long)]
    pub force: bool,
    /// Only clean up pods that checkpoints or pins name, for nodes that several agents share
    #[arg(long)]
    pub known_only: bool,
}

/// The result of the removal.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// The namespaces that had any of this project's state.
    pub namespaces: Vec<NamespaceReport>,
    /// The state removed from the host's namespace.
    pub host: HostReport,
    /// Pinned maps and links.
    pub pins: Vec<PathBuf>,
    /// Checkpoints of pods.
    pub checkpoints: usize,
    /// Changed or removed files of the CNI chain, including the plugin.
    pub chain: Vec<PathBuf>,
    /// Failed removals.
    pub errors: Vec<String>,
}

/// The state removed from one namespace.
#[derive(Clone, Debug, Serialize)]
pub struct NamespaceReport {
    /// Its inode.
    pub inode: u64,
    /// Its pod, if that is known.
    pub pod: Option<PodIdentity>,
    /// The removed state.
    #[serde(flatten)]
    pub removed: Stripped,
}

/// Removes everything. Fails with [`InUse`] while an agent runs on this pin directory or, unless its namespaces are left alone,
/// on another one.
pub fn uninstall(options: &Options) -> anyhow::Result<Report> {
    let pins = Pins::open_existing(&options.pin_dir, options.force)?;
    if !options.force
        && !options.known_only
        && let Some(other) = Pins::of_others(&options.pin_dir)?.into_iter().next()
    {
        return Err(InUse(other).into());
    }
    // The proxy must get no new connections while only some of a pod's programs and rules are left.
    if let Some(Err(error)) = pins.as_ref().map(Pins::release) {
        tracing::warn!(
            error = format!("{error:#}"),
            "connections of pods may fail until they are un-enrolled"
        );
    }
    let checkpoints = Checkpoints::at(&options.state_dir);
    let mut report = Report::default();
    let known = checkpoints.read().unwrap_or_else(|error| {
        report.errors.push(format!("cannot read the checkpoints of pods: {error}"));
        Vec::new()
    });
    report.checkpoints = known.len();
    let pinned = options.known_only.then(|| pins.as_ref().map(Pins::cookies).unwrap_or_default());
    let mut devices = options.known_only.then(|| pins.as_ref().map(Pins::devices).unwrap_or_default());
    for (netns, checkpoint) in namespaces(known, pinned.as_ref())? {
        let (pod, foreign) = match checkpoint {
            Some(checkpoint) => (Some(checkpoint.identity), Some(checkpoint.foreign)),
            None => (None, None),
        };
        let inode = netns.inode()?;
        let stripped = linux::strip(&netns, foreign.as_ref()).and_then(|removed| {
            if let Some(devices) = &mut devices {
                devices.extend(linux::devices_of(&netns)?);
            }
            Ok(removed)
        });
        match stripped {
            Ok(removed) if removed == Stripped::default() => {}
            Ok(removed) => report.namespaces.push(NamespaceReport { inode, pod, removed }),
            Err(error) => report.errors.push(match pod {
                Some(pod) => format!("pod {pod}: network namespace {inode}: {error}"),
                None => format!("network namespace {inode}: {error}"),
            }),
        }
    }
    let is_unknown = options.known_only && pins.is_none() && report.checkpoints == 0;
    if !is_unknown {
        let host = linux::strip_host(&checkpoints.early_demux(), devices.as_ref());
        report.host = host.context("the host's network namespace")?;
    }
    if !report.errors.is_empty() {
        // Checkpoints and pins stay, because they lead the next attempt to the rest.
        return Ok(report);
    }
    if let Some(pins) = pins {
        report.pins = pins.remove()?;
    }
    let directory = options.state_dir.display();
    checkpoints.remove_all().with_context(|| format!("cannot remove the state directory {directory}"))?;
    Ok(report)
}

/// Every network namespace except the host's, with its checkpoint if there is one. `limit` restricts those without a checkpoint
/// to these cookies. Fails unless all namespaces can be told apart: later, nothing would lead to the state in an omitted one.
fn namespaces(
    known: Vec<checkpoints::Checkpoint>,
    limit: Option<&BTreeSet<u64>>,
) -> anyhow::Result<impl Iterator<Item = (NetNs, Option<checkpoints::Checkpoint>)>> {
    let host = NetNs::current().context("the host's network namespace")?.inode()?;
    let mut all: BTreeMap<u64, (NetNs, Option<checkpoints::Checkpoint>)> = BTreeMap::new();
    for (inode, path) in checkpoints::namespaces() {
        // The namespace may have ended in the meantime.
        let Ok(netns) = NetNs::open(&path) else { continue };
        let is_wanted = match limit {
            None => true,
            Some(cookies) => {
                let cookie = netns.cookie();
                cookies
                    .contains(&cookie.with_context(|| format!("cannot identify network namespace {inode}"))?)
            }
        };
        if is_wanted {
            all.insert(inode, (netns, None));
        }
    }
    for found in checkpoints::find(known)? {
        if let Some(netns) = found.netns {
            all.insert(found.checkpoint.netns_inode, (netns, Some(found.checkpoint)));
        }
    }
    all.remove(&host);
    Ok(all.into_values())
}
