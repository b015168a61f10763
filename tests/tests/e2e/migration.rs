//! From the rules of the mesh's own agent to ours, in a running pod with a running proxy.

use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::constants::{PORT_INBOUND, PORT_OUTBOUND};
use redirect_tests::bench::mesh::Mesh;
use redirect_tests::bench::rules::Netfilter;
use redirect_tests::load::{self, Target};
use redirect_tests::process::Process;
use redirect_tests::{Cluster, Families, Stack, agent};

use crate::context::{Context, for_every_stack};
use crate::running_pods::{AMBIENT, Running, becomes};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let kinds = [("iptables", Netfilter::Iptables), ("nftables", Netfilter::Nft)];
    let trials = kinds.map(|(name, rules)| {
        let test = move |context: &Context, stack: Stack| migrates(context, stack, rules);
        for_every_stack(context, &format!("migration::from_{name}"), test)
    });
    trials.into_iter().flatten().collect()
}

/// Longer than any connection of the load lasts.
const A_WHILE: Duration = Duration::from_millis(500);

/// The mesh's agent ends, ours starts and adopts the pod next to the rules. Then new connections skip the rules, which are
/// removed with the last connection that they redirect: none fails, and none bypasses the proxy.
fn migrates(context: &Context, stack: Stack, rules: Netfilter) -> Result<()> {
    const LIMIT: Duration = Duration::from_secs(5);
    let session = context.session()?;
    let cgroup = session.cgroup().child(&format!("migrating-proxy-{rules:?}-{}", stack.label()))?;
    let cluster = Cluster::without_agent(&session)?;
    let node = cluster.node();
    let mesh = Mesh::start(node.dir())?;
    let mut command = Command::new(&session.binaries().redirect);
    command.args(["proxy", "--drain", "0", "--original-destination", "conntrack", "--zds-socket"]);
    command.arg(agent::zds_socket(node.dir()));
    let log = node.dir().join("migrating-proxy.log");
    let proxy = Process::spawn("migrating proxy", command, node.netns(), &cgroup, &log)?;
    mesh.wait_for_proxy(proxy.pid())?;

    let other = node.plain("other", Families::Dual)?;
    let Running { pod, .. } = &Running::new(&cluster, Families::Dual)?;
    mesh.add(pod)?;
    rules.apply(pod.netns())?;
    let family = stack.family();
    let (outside, inside) = (other.listen(stack)?, pod.listen(stack)?);
    let targets = [
        Target { from: pod.netns(), stack, to: other.endpoint(family, outside.port())? },
        Target { from: other.netns(), stack, to: pod.endpoint(family, inside.port())? },
    ];
    let tally = load::during(&targets, LIMIT, || {
        thread::sleep(A_WHILE);
        for port in [PORT_OUTBOUND, PORT_INBOUND] {
            ensure!(rules.redirected(pod.netns(), family, port)? > 0, "the rules do nothing for {port}");
        }
        drop(mesh);
        cluster.announce_running(pod, &AMBIENT);
        cluster.start_agent(&[])?;
        node.with_agent(|agent| agent.wait_for_proxy(proxy.pid()))?;
        becomes(&cluster, pod, Some("enabled"))?;
        rules.retire(pod.netns())?;
        thread::sleep(2 * A_WHILE);
        rules.remove(pod.netns())?;
        thread::sleep(2 * A_WHILE);
        Ok(())
    })?;
    println!("migration::from_{rules:?}::{}: {tally}", stack.label());
    ensure!(tally.failed.is_empty() && tally.bypassed == 0, "{tally}: {:?}", tally.failed);
    ensure!(tally.succeeded() > 100, "{tally}");
    let last = pod.connect(stack, targets[0].to).context("without the rules")?;
    ensure!(!last.is_direct(), "past the proxy: {:?}", last.heard);
    Ok(())
}
