//! The time to enroll and un-enroll a pod, compared with writing netfilter rules for it.

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;

use super::crowd::{BarePod, at_once, gather};
use super::nursery::Nursery;
use super::rules::Netfilter;
use crate::{Session, signals};

/// Times of one pod, in microseconds, in the order of the attempts.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Enrollment {
    /// From the request to the answer.
    pub request: Vec<f64>,
    /// The proxy's share of it, as seen by the agent.
    pub proxy: Vec<f64>,
    /// The share of observing the kernel.
    pub read: Vec<f64>,
    /// The share of the steps that capture the pod.
    pub write: Vec<f64>,
    /// From the un-enrollment request to the answer.
    pub release: Vec<f64>,
    /// The same two with another build, in alternation with this one.
    pub against: Option<[Vec<f64>; 2]>,
    /// The proxy's share of it.
    pub release_proxy: Vec<f64>,
    /// The plugin's process from start to exit.
    pub plugin: Vec<f64>,
    /// The agent's share of it.
    pub plugin_agent: Vec<f64>,
    /// Writing the rules of iptables, rules of routing and routes.
    pub iptables: Vec<f64>,
    /// Removing them.
    pub iptables_release: Vec<f64>,
    /// The same with nft.
    pub nft: Vec<f64>,
    /// Removing them.
    pub nft_release: Vec<f64>,
    /// Concurrent enrollments.
    pub crowds: Vec<Crowd>,
}

/// Time until the last of some pods is captured, in microseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Crowd {
    /// How many at once.
    pub pods: usize,
    /// By the CNI plugin.
    pub ebpf: Vec<f64>,
    /// By iptables-restore.
    pub iptables: Vec<f64>,
    /// By nft.
    pub nft: Vec<f64>,
}

/// The extent of the measurement.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Attempts with one pod.
    pub attempts: usize,
    /// How many pods at once.
    pub crowds: Vec<usize>,
    /// How often.
    pub rounds: usize,
}

impl Enrollment {
    /// Our share of [`Self::request`].
    #[must_use]
    pub fn ours(&self) -> Vec<f64> {
        self.request.iter().zip(&self.proxy).map(|(all, proxy)| all - proxy).collect()
    }

    /// Our share of [`Self::release`].
    #[must_use]
    pub fn release_ours(&self) -> Vec<f64> {
        self.release.iter().zip(&self.release_proxy).map(|(all, proxy)| all - proxy).collect()
    }

    /// The plugin's process without the agent's work.
    #[must_use]
    pub fn plugin_alone(&self) -> Vec<f64> {
        self.plugin.iter().zip(&self.plugin_agent).map(|(all, agent)| all - agent).collect()
    }
}

/// The number of consecutive attempts of each arm.
const BLOCK: usize = 10;

/// The pause for the kernel between arms.
const SETTLE: Duration = Duration::from_millis(300);

/// Measures on a node that already has one enrolled pod, because the first one makes the kernel change its code (static keys).
///
/// The process has to be in the host's namespace, as kubelets and runtimes are: the agent checks processes from other
/// namespaces more closely.
pub fn measure(session: &Arc<Session>, against: Option<&Arc<Session>>, plan: &Plan) -> Result<Enrollment> {
    let nursery = Nursery::start(session, "nursery")?;
    let other = against.map(|session| Nursery::start(session, "other-nursery")).transpose()?;
    let agent = nursery.agent_socket();
    let plugin = session.binaries().plugin.clone();
    let _host = nursery.node().netns().visit()?;
    let most = plan.crowds.iter().copied().max().unwrap_or(1).max(plan.attempts);
    let pods = gather(1, most + 1)?;
    let (resident, pods) = pods.split_first().context("a pod")?;
    let mut times = Enrollment::default();
    let resident_of_the_other = gather(most + 2, usize::from(other.is_some()))?;
    let other = other.as_ref().map(Nursery::agent_socket);
    let settle = |resident: &BarePod, agent: &Path| -> Result<()> {
        // The first ones fill caches on both sides.
        for _ in 0..3 {
            resident.enroll(agent)?;
            resident.unenroll(agent)?;
        }
        resident.enroll(agent).map(drop)
    };
    settle(resident, &agent)?;
    for (resident, agent) in resident_of_the_other.iter().zip(&other) {
        settle(resident, agent)?;
    }
    times.against = other.as_ref().map(|_| Default::default());
    for block in 0..plan.attempts.div_ceil(BLOCK) {
        // Each attempt is with a pod that was never enrolled.
        let attempts = BLOCK.min(plan.attempts - block * BLOCK);
        let some = pods.get(block * BLOCK..).and_then(|rest| rest.get(..attempts)).context("as many pods")?;
        for one in some {
            signals::check()?;
            let ask = |agent: &Path, enrolled: &mut Vec<f64>, released: &mut Vec<f64>| -> Result<()> {
                enrolled.push(microseconds(one.enroll(agent)?));
                released.push(microseconds(one.unenroll(agent)?));
                Ok(())
            };
            let mut others = other.as_ref().zip(times.against.as_mut());
            let first = fastrand::bool();
            for ours in [first, !first] {
                if ours {
                    ask(&agent, &mut times.request, &mut times.release)?;
                } else if let Some((agent, [enrolled, released])) = &mut others {
                    ask(agent, enrolled, released)?;
                }
            }
            times.plugin.push(microseconds(one.run_plugin(&plugin, &agent, "ADD")?));
            one.run_plugin(&plugin, &agent, "DEL")?;
        }
        for (netfilter, written, removed) in [
            (Netfilter::Iptables, &mut times.iptables, &mut times.iptables_release),
            (Netfilter::Nft, &mut times.nft, &mut times.nft_release),
        ] {
            for one in some {
                signals::check()?;
                let took = rules(one, netfilter)?;
                written.push(took[0]);
                removed.push(took[1]);
            }
        }
        // The kernel cleans up after netfilter for a while, under global locks.
        thread::sleep(SETTLE);
    }
    read_log(&nursery.log(), resident, &mut times)?;
    for &count in &plan.crowds {
        let mut crowd = Crowd { pods: count, ebpf: Vec::new(), iptables: Vec::new(), nft: Vec::new() };
        let some = pods.get(..count).context("as many pods")?;
        for _ in 0..plan.rounds {
            signals::check()?;
            let run =
                |verb: &'static str| at_once(some, |pod| pod.run_plugin(&plugin, &agent, verb).map(drop));
            crowd.ebpf.push(microseconds(run("ADD")?));
            run("DEL")?;
            for (netfilter, times) in
                [(Netfilter::Iptables, &mut crowd.iptables), (Netfilter::Nft, &mut crowd.nft)]
            {
                times.push(microseconds(at_once(some, |pod| netfilter.apply(&pod.netns))?));
                at_once(some, |pod| netfilter.remove(&pod.netns))?;
            }
        }
        times.crowds.push(crowd);
    }
    resident.unenroll(&agent)?;
    for (resident, agent) in resident_of_the_other.iter().zip(&other) {
        resident.unenroll(agent)?;
    }
    Ok(times)
}

fn rules(pod: &BarePod, netfilter: Netfilter) -> Result<[f64; 2]> {
    let began = Instant::now();
    netfilter.apply(&pod.netns)?;
    let written = began.elapsed();
    let began = Instant::now();
    netfilter.remove(&pod.netns)?;
    Ok([written, began.elapsed()].map(microseconds))
}

/// The agent's measurements of each attempt: by request and by plugin in alternation.
fn read_log(log: &str, resident: &BarePod, times: &mut Enrollment) -> Result<()> {
    let uid = resident.uid();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    // Observing a pod that needs no repair takes no steps.
    let of_an_attempt = |line: &Value| line["uid"].is_string() && line["uid"] != uid && line["steps"] != 0;
    let lines: Vec<Value> = lines.filter(of_an_attempt).collect();
    let all = |message: &str, field: &str| -> Vec<f64> {
        let of = lines.iter().filter(|line| line["message"] == message);
        of.filter_map(|line| number(&line[field])).collect()
    };
    let attempts = times.request.len();
    // Each attempt enrolls twice.
    let share = |values: Vec<f64>, offset: usize| -> Result<Vec<f64>> {
        ensure!(
            values.len() == 2 * attempts,
            "the agent's log tells of {} of {attempts} attempts",
            values.len()
        );
        Ok(values.into_iter().skip(offset).step_by(2).collect())
    };
    times.proxy = share(all("pod enrolled", "proxy_microseconds"), 0)?;
    times.plugin_agent = share(all("pod enrolled", "microseconds"), 1)?;
    times.read = share(all("reconciling datapath", "read_microseconds"), 0)?;
    times.write = share(all("reconciling datapath", "write_microseconds"), 0)?;
    times.release_proxy = share(all("pod un-enrolled", "proxy_microseconds"), 0)?;
    Ok(())
}

/// A number in the log, which is a string if it has more than 64 bits.
fn number(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str()?.parse().ok())
}

fn microseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}
