//! The cost of many pods: memory of the agent and of the kernel, CPU time of an idle agent.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;

use super::crowd::{BarePod, gather};
use super::nursery::Nursery;
use super::proxies::cpu_time;
use super::rules::Netfilter;
use crate::kernel::bpftool;
use crate::{Session, signals};

/// Memory at a number of pods.
#[derive(Clone, Debug, Serialize)]
pub struct Level {
    /// How many pods are enrolled.
    pub pods: usize,
    /// The agent's resident memory, in bytes.
    pub agent: u64,
    /// Memory of maps and programs, in bytes.
    pub bpf: u64,
    /// Links of programs.
    pub links: usize,
    /// The kernel's memory in slabs and per-CPU areas, in bytes, for the whole machine.
    pub kernel: u64,
    /// The share of a CPU that the agent uses while idle.
    pub idle: f64,
}

/// What was found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Scale {
    /// By number of pods.
    pub levels: Vec<Level>,
    /// Kernel memory per pod, in bytes, that the last enrollments took and that un-enrollment released.
    pub kernel_per_pod: [f64; 2],
    /// The same for rules of iptables.
    pub iptables_per_pod: [f64; 2],
    /// The same for rules of nftables.
    pub nft_per_pod: [f64; 2],
}

/// Measures at these numbers of pods; observes the idle agent for this long.
pub fn measure(session: &Arc<Session>, levels: &[usize], idle: Duration) -> Result<Scale> {
    let nursery = Nursery::start(session, "nursery")?;
    let agent = nursery.agent_socket();
    let most = levels.iter().copied().max().unwrap_or(0);
    let pods = gather(1, most)?;
    let mut scale = Scale::default();
    let mut enrolled = 0;
    let before = kernel_memory()?;
    for &level in levels {
        for pod in pods.get(enrolled..level).unwrap_or_default() {
            signals::check()?;
            pod.enroll(&agent)?;
        }
        enrolled = level;
        scale.levels.push(look(&nursery, level, idle)?);
    }
    let full = kernel_memory()?;
    for pod in &pods {
        pod.unenroll(&agent)?;
    }
    scale.kernel_per_pod = per_pod(&pods, before, full, kernel_memory()?);
    scale.iptables_per_pod = rules(&pods, Netfilter::Iptables)?;
    scale.nft_per_pod = rules(&pods, Netfilter::Nft)?;
    Ok(scale)
}

fn rules(pods: &[BarePod], netfilter: Netfilter) -> Result<[f64; 2]> {
    let few = pods.get(..pods.len().min(100)).unwrap_or_default();
    let before = kernel_memory()?;
    for pod in few {
        signals::check()?;
        netfilter.apply(&pod.netns)?;
    }
    let full = kernel_memory()?;
    for pod in few {
        netfilter.remove(&pod.netns)?;
    }
    Ok(per_pod(few, before, full, kernel_memory()?))
}

fn per_pod(pods: &[BarePod], before: u64, full: u64, after: u64) -> [f64; 2] {
    let count = pods.len().max(1) as f64;
    [full as f64 - before as f64, full as f64 - after as f64].map(|bytes| bytes / count)
}

fn look(nursery: &Nursery, pods: usize, span: Duration) -> Result<Level> {
    let status = nursery.node().status()?;
    let programs: BTreeSet<u64> = status.programs.iter().map(|program| program.id.into()).collect();
    let process = status.pid;
    // The work that the query itself caused is done by then.
    thread::sleep(Duration::from_millis(50));
    let before = cpu_time(process)?;
    thread::sleep(span);
    let idle = (cpu_time(process)? - before) as f64 / span.as_nanos() as f64;
    Ok(Level {
        pods,
        agent: resident(process)?,
        bpf: bpf_memory(&programs)?,
        links: status.programs.iter().map(|program| program.links).sum(),
        kernel: kernel_memory()?,
        idle,
    })
}

/// The resident memory of a process, in bytes.
pub fn resident(process: u32) -> Result<u64> {
    field(&fs::read_to_string(format!("/proc/{process}/status"))?, "VmRSS:")
}

/// How many files a process has open.
pub fn descriptors(process: u32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{process}/fd"))?.count())
}

fn bpf_memory(ours: &BTreeSet<u64>) -> Result<u64> {
    let id = |object: &Value| object["id"].as_u64().unwrap_or_default();
    let bytes = |object: &Value| object["bytes_memlock"].as_u64().unwrap_or_default();
    let programs: Vec<Value> =
        bpftool("prog")?.into_iter().filter(|program| ours.contains(&id(program))).collect();
    let maps: BTreeSet<u64> = programs
        .iter()
        .flat_map(|program| program["map_ids"].as_array().into_iter().flatten())
        .filter_map(Value::as_u64)
        .collect();
    let of_maps = bpftool("map")?.iter().filter(|map| maps.contains(&id(map))).map(bytes).sum::<u64>();
    Ok(of_maps + programs.iter().map(bytes).sum::<u64>())
}

/// Slabs and per-CPU areas.
fn kernel_memory() -> Result<u64> {
    // Objects are freed after a grace period.
    thread::sleep(Duration::from_millis(300));
    let text = fs::read_to_string("/proc/meminfo")?;
    Ok(field(&text, "SUnreclaim:")? + field(&text, "Percpu:")?)
}

fn field(text: &str, name: &str) -> Result<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB"));
    Ok(value.with_context(|| format!("no {name}"))?.trim().parse::<u64>()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_in_kilobytes() {
        let text = "MemTotal:       24731700 kB\nSUnreclaim:        1024 kB\nHugePages_Total:       0\n";
        assert_eq!(field(text, "SUnreclaim:").expect("a field"), 1024 * 1024);
        assert!(field(text, "Percpu:").is_err() && field(text, "HugePages_Total:").is_err());
    }
}
