//! The kernel's state: BPF objects, and the rules, routes, filters and sysctls of a namespace.

use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Output};

use anyhow::{Context, Result, bail};
use redirect_ebpf::constants::{REPLY_TABLE, ROUTE_TABLE};
use serde_json::Value;

use crate::netns::Netns;
use crate::wait;

/// BPF objects by their IDs, which the kernel does not soon reuse.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Objects {
    /// Programs.
    pub programs: BTreeSet<u32>,
    /// Maps.
    pub maps: BTreeSet<u32>,
    /// Links.
    pub links: BTreeSet<u32>,
}

impl Objects {
    /// The objects of a process: those that it holds open, these programs, the maps that the programs use and the
    /// links that attach them.
    pub fn of(process: u32, programs: BTreeSet<u32>) -> Result<Self> {
        let mut objects = Self::held_by(process)?;
        objects.programs.extend(programs);
        for program in bpftool("prog")? {
            if id(&program, "id").is_some_and(|id| objects.programs.contains(&id)) {
                let maps = program["map_ids"].as_array().into_iter().flatten();
                objects.maps.extend(maps.filter_map(|id| u32::try_from(id.as_u64()?).ok()));
            }
        }
        for link in bpftool("link")? {
            if id(&link, "prog_id").is_some_and(|id| objects.programs.contains(&id)) {
                objects.links.extend(id(&link, "id"));
            }
        }
        Ok(objects)
    }

    fn held_by(process: u32) -> Result<Self> {
        let mut objects = Self::default();
        let directory = format!("/proc/{process}/fdinfo");
        for entry in fs::read_dir(&directory).context(directory)?.flatten() {
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            let field = |name: &str| -> Option<u32> {
                text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
            };
            objects.maps.extend(field("map_id:"));
            match field("link_id:") {
                // A link's information also names its program, which need not be held open itself.
                Some(link) => {
                    objects.links.insert(link);
                    objects.programs.extend(field("prog_id:"));
                }
                None => objects.programs.extend(field("prog_id:")),
            }
        }
        Ok(objects)
    }

    /// Those that still exist.
    pub fn alive(&self) -> Result<Self> {
        let existing = |kind: &str, ids: &BTreeSet<u32>| -> Result<BTreeSet<u32>> {
            if ids.is_empty() {
                return Ok(BTreeSet::new());
            }
            let existing: BTreeSet<u32> =
                bpftool(kind)?.iter().filter_map(|object| id(object, "id")).collect();
            Ok(existing.intersection(ids).copied().collect())
        };
        Ok(Self {
            programs: existing("prog", &self.programs)?,
            maps: existing("map", &self.maps)?,
            links: existing("link", &self.links)?,
        })
    }

    /// Waits until none exists; the kernel frees some of them with a delay.
    pub fn wait_until_gone(&self) -> Result<()> {
        let mut left = Ok(Self::default());
        let gone = wait::for_cleanup(wait::SOON, || {
            left = self.alive();
            left.as_ref().is_ok_and(|left| *left == Self::default())
        });
        if gone { Ok(()) } else { bail!("left behind in the kernel: {left:?}") }
    }
}

/// The output of `bpftool KIND show`.
pub fn bpftool(kind: &str) -> Result<Vec<Value>> {
    // A link that is being created makes the whole list fail, for as long as an RCU grace period takes.
    let mut output = show(kind)?;
    wait::for_cleanup(2 * wait::SOON, || {
        if !output.status.success()
            && let Ok(again) = show(kind)
        {
            output = again;
        }
        output.status.success()
    });
    if !output.status.success() {
        bail!("bpftool {kind} show: {}", String::from_utf8_lossy(&output.stdout));
    }
    if output.stdout.trim_ascii().is_empty() {
        return Ok(Vec::new());
    }
    serde_json::from_slice(&output.stdout).with_context(|| format!("bpftool -j {kind} show"))
}

fn show(kind: &str) -> Result<Output> {
    Command::new("bpftool").args(["-j", kind, "show"]).output().context("run bpftool")
}

fn id(object: &Value, field: &str) -> Option<u32> {
    u32::try_from(object[field].as_u64()?).ok()
}

/// The state of a namespace, a pod's or the host's, that capture changes, in a comparable form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Routing rules, both families.
    pub rules: Vec<Value>,
    /// Routes in our table, both families.
    pub routes: Vec<Value>,
    /// TC filters and queueing disciplines of every interface.
    pub traffic_control: Vec<Value>,
    /// Sysctls, name and value.
    pub sysctls: Vec<(&'static str, String)>,
}

impl Footprint {
    /// The differences from another one, each with a sign.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Vec<String> {
        let lines = |footprint: &Self| -> Vec<String> {
            let objects = [&footprint.rules, &footprint.routes, &footprint.traffic_control];
            let objects = objects.into_iter().flatten().map(Value::to_string);
            objects.chain(footprint.sysctls.iter().map(|(name, value)| format!("{name}={value}"))).collect()
        };
        let (mine, others) = (lines(self), lines(other));
        let more = mine.iter().filter(|line| !others.contains(line)).map(|line| format!("+ {line}"));
        let less = others.iter().filter(|line| !mine.contains(line)).map(|line| format!("- {line}"));
        more.chain(less).collect()
    }
}

const SYSCTLS: [&str; 7] = [
    "net.ipv4.conf.lo.accept_local",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_early_demux",
    "net.ipv4.tcp_fwmark_accept",
    "net.ipv4.fwmark_reflect",
    "net.ipv6.fwmark_reflect",
    "net.ipv4.tcp_migrate_req",
];

impl Footprint {
    /// The present one.
    pub fn of(netns: &Netns) -> Result<Self> {
        let mut footprint = Self {
            rules: Vec::new(),
            routes: Vec::new(),
            traffic_control: list(netns.json("tc -j qdisc show")?),
            sysctls: Vec::new(),
        };
        for family in ["-4", "-6"] {
            footprint.rules.extend(list(netns.json(&format!("ip -j {family} rule show"))?));
            for table in [ROUTE_TABLE, REPLY_TABLE] {
                let routes = netns.json(&format!("ip -j {family} route show table {table}"));
                // A table that does not exist is an error to `ip -6` and `ip -4` alike.
                footprint.routes.extend(routes.map(list).unwrap_or_default());
            }
        }
        for link in list(netns.json("ip -j link show")?) {
            let name = link["ifname"].as_str().context("an interface has a name")?;
            for hook in ["ingress", "egress"] {
                let filters = netns.json(&format!("tc -j filter show dev {name} {hook}"));
                let mut filters = filters.map(list).unwrap_or_default();
                // The next agent's programs have other IDs.
                for filter in &mut filters {
                    if let Some(program) = filter["options"]["prog"].as_object_mut() {
                        program.remove("id");
                    }
                }
                footprint.traffic_control.extend(filters);
            }
        }
        // Devices may have been recreated in another order.
        footprint.traffic_control.sort_by_key(Value::to_string);
        for name in SYSCTLS {
            if netns.has_sysctl(name)? {
                footprint.sysctls.push((name, netns.sysctl(name)?));
            }
        }
        Ok(footprint)
    }
}

fn list(value: Value) -> Vec<Value> {
    match value {
        Value::Array(values) => values,
        other => vec![other],
    }
}
