//! The proxy's ports on the host are reserved for the proxy if its cgroup is named.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::constants::{MARK_PROXY, PORT_INBOUND, PORT_OUTBOUND, PORT_TUNNEL};
use redirect_ebpf::count::Reason;
use redirect_ebpf::{Direction, Family};
use redirect_tests::wait;
use redirect_tests::{Families, Netns, Node, NodeOptions, Stack};
use socket2::{Socket, Type};

use crate::context::{Context, for_every_stack};
use crate::odd_sockets::dropped;
use crate::{inbound, outbound};

pub(super) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_stack(context, "ports::shared_with_nobody", shared_with_nobody);
    trials.extend(for_every_stack(context, "ports::of_a_proxy_in_a_new_cgroup", new_cgroup));
    trials
}

/// Service managers create a new cgroup with the same name for each start of a proxy.
fn new_cgroup(context: &Context, stack: Stack) -> Result<()> {
    let options = NodeOptions { agent: false, proxy: false, ..NodeOptions::default() };
    // It outlives the node.
    let mut cgroup;
    let node = Node::with(&context.session()?, options)?;
    let make = || node.session().cgroup().child(&format!("renewed-{}", node.netns().name()));
    cgroup = make()?;
    node.start_agent(&[format!("--proxy-cgroup={}", cgroup.path().display())])?;
    node.start_proxy_in(&cgroup)?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    for start in 0..3 {
        node.kill_proxy()?;
        drop(cgroup);
        cgroup = make()?;
        node.start_proxy_in(&cgroup).with_context(|| format!("start {start}"))?;
        outbound::passes_the_proxy_once(&pod, &other, stack)?;
        inbound::passes_the_proxy_once(other.netns(), &pod, stack)?;
    }
    Ok(())
}

/// A process of the node with `CAP_NET_RAW` creates a socket that looks like the proxy's and joins its listeners
/// (`SO_REUSEPORT`). The kernel would give it a share of their connections.
fn shared_with_nobody(context: &Context, stack: Stack) -> Result<()> {
    let options = NodeOptions { agent: false, proxy: false, ..NodeOptions::default() };
    // It outlives the node.
    let cgroup;
    let node = Node::with(&context.session()?, options)?;
    cgroup = node.session().cgroup().child(&format!("named-{}", node.netns().name()))?;
    node.start_agent(&[format!("--proxy-cgroup={}", cgroup.path().display())])?;
    node.start_proxy_in(&cgroup)?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let mut attempts = 0;
    for running in [true, false] {
        if !running {
            node.kill_proxy()?;
        }
        for port in [PORT_OUTBOUND, PORT_INBOUND, PORT_TUNNEL] {
            let error = join(node.netns(), stack, port)?.err();
            let error = error.with_context(|| format!("took port {port}, proxy running: {running}"))?;
            ensure!(error.kind() == io::ErrorKind::AddrInUse, "{error}");
            attempts += 1;
        }
    }
    let counted = dropped(&node, stack, Direction::Bind, Reason::ProxyPort)?;
    ensure!(counted == attempts, "{counted} of {attempts} attempts were counted");
    for (netns, port) in [(node.netns(), PORT_OUTBOUND - 1), (other.netns(), PORT_OUTBOUND)] {
        wait::until_bound(|| join(netns, stack, port))?.with_context(|| format!("port {port}"))?;
    }
    node.start_proxy_in(&cgroup)?;
    outbound::passes_the_proxy_once(&pod, &other, stack)?;
    inbound::passes_the_proxy_once(other.netns(), &pod, stack)
}

fn join(netns: &Netns, stack: Stack, port: u16) -> Result<io::Result<Socket>> {
    let address: IpAddr = match stack.family() {
        Family::Ipv4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::Ipv6 => Ipv6Addr::UNSPECIFIED.into(),
    };
    netns.run(|| {
        let socket = Socket::new(stack.domain(), Type::STREAM, None)?;
        socket.set_mark(MARK_PROXY)?;
        socket.set_reuse_port(true)?;
        if stack != Stack::V4 {
            socket.set_only_v6(false)?;
        }
        socket.bind(&stack.spell(SocketAddr::new(address, port)).into())?;
        socket.listen(16)?;
        Ok(socket)
    })
}
