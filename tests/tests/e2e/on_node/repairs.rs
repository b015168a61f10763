//! Changes by other software on the host are detected and repaired, while the agent runs and when it starts.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::Family;
use redirect_ebpf::constants::{INGRESS_DEVICE, ROUTE_TABLE};
use redirect_tests::kernel::Footprint;
use redirect_tests::{Families, Netns, Node, NodeOptions, Pod, Stack, wait};

use super::host_device;
use crate::context::{Context, trial};
use crate::{inbound, outbound};

/// The damage.
#[derive(Clone, Copy, Debug)]
enum Damage {
    Rule(Family),
    Route(Family),
    Filter(Family),
    Qdisc,
    IngressDevice,
    EntranceQdisc,
    Sysctl,
    Untracked,
    Pin,
    Detach,
    Pod,
    Device,
}

impl Damage {
    const ALL: [Self; 15] = [
        Self::Rule(Family::Ipv4),
        Self::Rule(Family::Ipv6),
        Self::Route(Family::Ipv4),
        Self::Route(Family::Ipv6),
        Self::Filter(Family::Ipv4),
        Self::Filter(Family::Ipv6),
        Self::Qdisc,
        Self::EntranceQdisc,
        Self::IngressDevice,
        Self::Sysctl,
        Self::Untracked,
        Self::Pin,
        Self::Detach,
        Self::Pod,
        Self::Device,
    ];

    /// The kind of the repair.
    const fn kind(self) -> &'static str {
        match self {
            Self::Filter(_) | Self::Qdisc => "program",
            Self::Pod | Self::Device => "map",
            Self::Rule(_)
            | Self::Route(_)
            | Self::IngressDevice
            | Self::EntranceQdisc
            | Self::Sysctl
            | Self::Untracked
            | Self::Pin
            | Self::Detach => "link",
        }
    }

    fn name(self) -> String {
        format!("{self:?}").to_lowercase().replace('(', "_").replace(')', "")
    }

    fn inflict(self, node: &Node, pod: &Pod) -> Result<()> {
        let host = node.netns();
        let flag = |family| if family == Family::Ipv4 { "-4" } else { "-6" };
        let lookup = node.pin_dir().join("links/noted_listener-host");
        match self {
            Self::Rule(family) => host.ip(&format!("{} rule del pref 5", flag(family))).map(drop),
            Self::Route(family) => {
                host.ip(&format!("{} route flush table {ROUTE_TABLE}", flag(family))).map(drop)
            }
            Self::Filter(family) => {
                let device = host_device(pod)?;
                ["ingress", "egress"]
                    .into_iter()
                    .try_for_each(|side| host.delete_filters(&device, side, family))
            }
            Self::Qdisc => host.json(&format!("tc qdisc del dev {} clsact", host_device(pod)?)).map(drop),
            Self::EntranceQdisc => host.json(&format!("tc qdisc del dev {INGRESS_DEVICE} clsact")).map(drop),
            Self::IngressDevice => host.ip(&format!("link del {INGRESS_DEVICE}")).map(drop),
            Self::Sysctl => host.set_sysctl("net.ipv4.tcp_early_demux", "1"),
            Self::Untracked => nft(host, "flush ruleset").map(drop),
            Self::Pin => Ok(fs::remove_file(lookup)?),
            Self::Detach => bpftool(&["link", "detach", "pinned"], &lookup, &[]),
            Self::Pod => forget(node, "PODS-", &pod.netns().cookie()?.to_ne_bytes()),
            Self::Device => {
                let link = host.json(&format!("ip -j link show {}", host_device(pod)?))?;
                let index = link[0]["ifindex"].as_u64().context("an interface has an index")?;
                forget(node, "INTERFACES-", &(index as u32).to_ne_bytes())
            }
        }
    }
}

fn nft(host: &Netns, words: &str) -> Result<String> {
    let mut command = Command::new("nft");
    command.args(words.split(' '));
    Ok(String::from_utf8_lossy(&host.output(command, b"")?).into_owned())
}

fn forget(node: &Node, map: &str, key: &[u8]) -> Result<()> {
    let mut maps = fs::read_dir(node.pin_dir().join("maps-v1"))?.flatten();
    let map = maps.find(|entry| entry.file_name().to_string_lossy().starts_with(map)).context("a map")?;
    let key: Vec<String> = key.iter().map(|byte| format!("{byte:02x}")).collect();
    bpftool(&["map", "delete", "pinned"], &map.path(), &[&["key".into(), "hex".into()], &key[..]].concat())
}

fn bpftool(words: &[&str], pin: &Path, more: &[String]) -> Result<()> {
    let mut command = Command::new("bpftool");
    command.args(words).arg(pin).args(more);
    ensure!(command.status()?.success(), "{command:?}");
    Ok(())
}

pub(super) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials: Vec<_> = Damage::ALL
        .into_iter()
        .map(|damage| {
            let name = format!("repairs::while_running::{}", damage.name());
            trial(context, name, move |context| while_running(context, damage))
        })
        .collect();
    trials.push(trial(context, "repairs::at_start", at_start));
    for (name, note) in [("ingress_device", Note::Alias), ("checkpoints", Note::Checkpoint)] {
        let name = format!("repairs::sysctl_is_restored_without_the_{name}");
        trials.push(trial(context, name, move |context| restored(context, note)));
    }
    trials
}

/// The deadline for a repair: the interval of the checks, on a busy machine.
const LIMIT: Duration = Duration::from_secs(10);

fn arguments() -> Vec<String> {
    ["--on-exit", "keep"].map(str::to_owned).to_vec()
}

fn node(context: &Context) -> Result<Arc<Node>> {
    Node::with(&context.session()?, NodeOptions { agent_arguments: arguments(), ..NodeOptions::default() })
}

fn repairs(node: &Node, kind: &str) -> Result<u64> {
    let repairs = node.status()?.repairs;
    Ok(repairs.into_iter().find(|report| report.kind == kind).map_or(0, |report| report.repairs))
}

fn works(pod: &Pod, other: &Pod) -> Result<()> {
    for stack in Stack::ALL {
        outbound::passes_the_proxy_once(pod, other, stack)?;
        inbound::passes_the_proxy_once(other.netns(), pod, stack)?;
    }
    Ok(())
}

fn while_running(context: &Context, damage: Damage) -> Result<()> {
    let node = node(context)?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let before = Footprint::of(node.netns())?;
    ensure!(repairs(&node, damage.kind())? == 0);
    damage.inflict(&node, &pod)?;
    let is_mended = || -> Result<bool> {
        let notrack = nft(node.netns(), "list ruleset")?.contains(r#"iifname "redirect0" notrack"#);
        Ok(repairs(&node, damage.kind())? > 0 && Footprint::of(node.netns())? == before && notrack)
    };
    wait::until_true("repair", LIMIT, is_mended)
        .with_context(|| format!("{:?}, {before:#?}, {:#?}", node.status(), Footprint::of(node.netns())))?;
    pod.check()?;
    works(&pod, &other)?;
    node.end_agent()?;
    ensure!(node.uninstall(&[])?.status.success());
    let sysctl = node.netns().sysctl("net.ipv4.tcp_early_demux")?;
    ensure!(sysctl == "1", "the sysctl is {sysctl}, and was 1 before us");
    let left = nft(node.netns(), "list ruleset")?;
    ensure!(left.is_empty(), "{left}");
    Ok(())
}

/// Everything at once, while no agent runs.
fn at_start(context: &Context) -> Result<()> {
    let node = node(context)?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let before = Footprint::of(node.netns())?;
    node.kill_agent()?;
    for damage in Damage::ALL {
        // A link has to be pinned to be detached, and the device has to exist to be removed.
        if !matches!(damage, Damage::Detach | Damage::Qdisc | Damage::EntranceQdisc) {
            damage.inflict(&node, &pod).with_context(|| format!("{damage:?}"))?;
        }
    }
    node.start_agent(&arguments())?;
    node.wait_for_proxy()?;
    let after = Footprint::of(node.netns())?;
    ensure!(after == before, "before: {before:#?}\nafter: {after:#?}");
    pod.check()?;
    works(&pod, &other)
}

/// The notes that the sysctl was on.
#[derive(Clone, Copy, Debug)]
enum Note {
    Alias,
    Checkpoint,
}

/// One of the two notes gets lost while no agent runs: the other one is enough, for `uninstall` and for the next agent, which
/// restores both.
fn restored(context: &Context, note: Note) -> Result<()> {
    let lose = |node: &Node, note: Note| match note {
        Note::Alias => node.netns().ip(&format!("link del {INGRESS_DEVICE}")).map(drop),
        Note::Checkpoint => Ok(fs::remove_dir_all(node.state_dir())?),
    };
    let other = if matches!(note, Note::Alias) { Note::Checkpoint } else { Note::Alias };
    for losses in [&[note][..], &[note, other]] {
        let node = node(context)?;
        node.kill_agent()?;
        for (round, note) in losses.iter().enumerate() {
            if round > 0 {
                node.start_agent(&arguments())?;
                node.kill_agent()?;
            }
            lose(&node, *note)?;
        }
        ensure!(node.netns().sysctl("net.ipv4.tcp_early_demux")? == "0");
        ensure!(node.uninstall(&[])?.status.success());
        let sysctl = node.netns().sysctl("net.ipv4.tcp_early_demux")?;
        ensure!(sysctl == "1", "{losses:?}: the sysctl is {sysctl}, and was 1 before us");
    }
    Ok(())
}
