//! Large numbers of pods: namespaces with an interface, enrolled by requests to the agent, without a CNI
//! chain.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use redirect_protocol::pod::PodIdentity;
use redirect_protocol::wire::{Attachment, Reply, Request, client};
use serde_json::json;

use super::sink::CROWD;
use crate::netns::Netns;
use crate::signals;

/// The deadline for an answer of the agent.
const PATIENCE: Duration = Duration::from_secs(30);

/// A namespace that looks like a pod's.
#[derive(Debug)]
pub struct BarePod {
    number: u16,
    /// The namespace.
    pub netns: Netns,
    /// The other end of its interface, as a pod's is on its node.
    _trunk: Arc<Netns>,
}

impl BarePod {
    fn new(number: u16, trunk: &Arc<Netns>) -> Result<Self> {
        let netns = Netns::new(&format!("crowd-{number}"))?;
        let pod = Self { number, netns, _trunk: Arc::clone(trunk) };
        let [ipv4, ipv6] = pod.addresses();
        pod.netns.ip_batch(&[
            format!("link add eth0 type veth peer name pod{number} netns {}", trunk.path().display()),
            format!("address add {ipv4}/32 dev eth0"),
            format!("address add {ipv6}/128 dev eth0 nodad"),
            "link set eth0 up".to_owned(),
            "route add default dev eth0".to_owned(),
            "route add ::/0 dev eth0".to_owned(),
        ])?;
        Ok(pod)
    }

    fn addresses(&self) -> [IpAddr; 2] {
        let [high, low] = self.number.to_be_bytes();
        [
            Ipv4Addr::new(10, 254, high, low).into(),
            Ipv6Addr::new(0xfd00, 0xfe, 0, 0, 0, 0, 0, self.number).into(),
        ]
    }

    /// Its UID in the agent's log.
    #[must_use]
    pub fn uid(&self) -> String {
        format!("crowd-uid-{}", self.number)
    }

    fn attachment(&self) -> Attachment {
        Attachment { container_id: format!("crowd-{}", self.number), interface: "eth0".into() }
    }

    /// Asks the agent to capture it. Returns how long that took.
    pub fn enroll(&self, agent: &Path) -> Result<Duration> {
        let pod = PodIdentity {
            uid: self.uid(),
            namespace: CROWD.into(),
            name: format!("pod-{}", self.number),
            service_account: String::new(),
        };
        let (attachment, addresses) = (self.attachment(), self.addresses().to_vec());
        let request = Request::Add { attachment, pod, addresses, netns_path: Some(self.netns.path()) };
        let began = Instant::now();
        let replies = client::call(agent, &request, Some(self.netns.descriptor().as_fd()), PATIENCE)?;
        let took = began.elapsed();
        match replies.as_slice() {
            [Reply::Added { enrolled: true }] => Ok(took),
            other => bail!("the agent answers {other:?}"),
        }
    }

    /// Asks the agent to let go of it.
    pub fn unenroll(&self, agent: &Path) -> Result<Duration> {
        let request = Request::Del { attachment: self.attachment() };
        let began = Instant::now();
        client::call_done(agent, &request, None, PATIENCE)?;
        Ok(began.elapsed())
    }

    /// Runs the CNI plugin for it, as a container runtime does. Returns the time from start to exit.
    pub fn run_plugin(&self, plugin: &Path, agent: &Path, verb: &str) -> Result<Duration> {
        let ips: Vec<_> = self
            .addresses()
            .iter()
            .map(|address| json!({"address": format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 })}))
            .collect();
        let config = json!({
            "cniVersion": "1.0.0", "name": "crowd", "type": "redirect-cni", "agentSocket": agent,
            "prevResult": {"cniVersion": "1.0.0", "ips": ips},
        });
        let config = serde_json::to_vec(&config)?;
        let mut command = Command::new(plugin);
        command.env_clear().env("CNI_COMMAND", verb).env("CNI_PATH", "/opt/cni/bin");
        command.env("CNI_CONTAINERID", self.attachment().container_id).env("CNI_IFNAME", "eth0");
        command.env("CNI_NETNS", self.netns.path());
        command.env(
            "CNI_ARGS",
            format!(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE={CROWD};K8S_POD_NAME=pod-{};K8S_POD_UID={}",
                self.number,
                self.uid()
            ),
        );
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let began = Instant::now();
        let mut child = command.spawn().context("start of the plugin")?;
        if let Some(mut stdin) = child.stdin.take() {
            std::io::Write::write_all(&mut stdin, &config)?;
        }
        let output = child.wait_with_output()?;
        let took = began.elapsed();
        if !output.status.success() {
            bail!("plugin {verb}: {}", String::from_utf8_lossy(&output.stdout));
        }
        Ok(took)
    }
}

/// Makes pods, their numbers from `first` on.
pub fn gather(first: usize, count: usize) -> Result<Vec<BarePod>> {
    const THREADS: usize = 4;
    let trunk = Arc::new(Netns::new("trunk")?);
    let next = AtomicUsize::new(first);
    let make = || -> Result<Vec<BarePod>> {
        let mut made = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= first + count {
                return Ok(made);
            }
            signals::check()?;
            made.push(BarePod::new(u16::try_from(number)?, &trunk)?);
        }
    };
    let mut pods = Vec::new();
    thread::scope(|scope| -> Result<()> {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(make)).collect();
        for thread in threads {
            pods.extend(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(())
    })?;
    pods.sort_by_key(|pod| pod.number);
    Ok(pods)
}

/// Runs `act` for all of them concurrently. Returns the time until the last one is done.
pub fn at_once(pods: &[BarePod], act: impl Fn(&BarePod) -> Result<()> + Sync) -> Result<Duration> {
    let barrier = std::sync::Barrier::new(pods.len() + 1);
    thread::scope(|scope| {
        let threads: Vec<_> = pods
            .iter()
            .map(|pod| {
                let (act, barrier) = (&act, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    act(pod)
                })
            })
            .collect();
        barrier.wait();
        let began = Instant::now();
        for thread in threads {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(began.elapsed())
    })
}
