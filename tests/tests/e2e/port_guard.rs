//! Only the proxy can use the proxy's ports.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::constants::{PORT_DNS, PORT_INBOUND, PORT_OUTBOUND, PORT_TUNNEL, PROXY_PORTS};
use redirect_ebpf::count::Reason;
use redirect_ebpf::{Direction, Family, Verdict};
use redirect_tests::kernel::Footprint;
use redirect_tests::{Families, Netns, Node, Pod, Stack, wait};
use socket2::{Socket, Type};

use crate::context::{Context, for_every_kind, for_every_stack, trial};
use crate::reports::counted;
use crate::{outbound, restarts};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_kind(context, "port_guard::application_is_kept_off", kept_off);
    trials.extend(for_every_stack(context, "port_guard::pod_that_is_not_enrolled_is_free", free));
    trials.extend(for_every_kind(context, "port_guard::pod_that_left_is_free", left));
    trials.extend(for_every_stack(context, "port_guard::squatter_fails_the_enrollment", squatter));
    trials.push(trial(context, "port_guard::reserved_ports_of_the_pod_stay", reserved_ports_stay));
    trials
}

/// A pod's own list of reserved ports, longer than a short read.
fn reserved_ports_stay(context: &Context) -> Result<()> {
    const NAME: &str = "net.ipv4.ip_local_reserved_ports";
    context.needs_placement_pod("the proxy listens on the host")?;
    let node = context.node()?;
    let pod = node.plain("pod", Families::Dual)?;
    let own: Vec<String> = (0..2_000).map(|number| (20_000 + 2 * number).to_string()).collect();
    pod.netns().set_sysctl(NAME, &own.join(","))?;
    pod.enroll()?;
    let list =
        || -> Result<Vec<String>> { Ok(pod.netns().sysctl(NAME)?.split(',').map(str::to_owned).collect()) };
    let proxys = PROXY_PORTS.map(|port| port.to_string());
    let mut expected = [&proxys[..], &own].concat();
    expected.sort_by_key(|port| port.parse::<u16>().ok());
    ensure!(list()? == expected, "enrolled: {:?}", list()?);
    pod.unenroll()?;
    ensure!(list()? == own, "un-enrolled: {:?}", list()?);
    Ok(())
}

/// Addresses that an application of the pod can bind, as the stack spells them.
fn addresses(pod: &Pod, stack: Stack) -> Result<Vec<IpAddr>> {
    let unspecified: IpAddr = match stack.family() {
        Family::Ipv4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::Ipv6 => Ipv6Addr::UNSPECIFIED.into(),
    };
    Ok(vec![unspecified, stack.loopback(), pod.address(stack.family())?])
}

fn bind(netns: &Netns, stack: Stack, kind: Type, address: SocketAddr) -> Result<io::Result<Socket>> {
    netns.run(|| {
        let socket = Socket::new(stack.domain(), kind, None)?;
        if stack != Stack::V4 {
            socket.set_only_v6(false)?;
        }
        socket.bind(&stack.spell(address).into())?;
        Ok(socket)
    })
}

fn can_bind(netns: &Netns, stack: Stack, kind: Type, address: SocketAddr) -> Result<Socket> {
    wait::until_bound(|| bind(netns, stack, kind, address))?
        .with_context(|| format!("{stack} {kind:?} {address}"))
}

fn is_refused(netns: &Netns, stack: Stack, kind: Type, address: SocketAddr) -> Result<()> {
    let error = bind(netns, stack, kind, address)?.err();
    let error = error.with_context(|| format!("{stack} {kind:?} could bind {address}"))?;
    ensure!(error.kind() == io::ErrorKind::AddrInUse, "{stack} {kind:?} {address}: {error}");
    Ok(())
}

fn kept_off(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let (pod, other) = (node.enrolled("pod", families)?, node.plain("other", Families::Dual)?);
    // The ports are free: only the guard refuses.
    node.kill_proxy()?;
    let netns = pod.netns();
    let before = node.status()?;
    let mut attempts = 0;
    for ip in addresses(&pod, stack)? {
        for port in PROXY_PORTS {
            is_refused(netns, stack, Type::STREAM, (ip, port).into())?;
            attempts += 1;
        }
        is_refused(netns, stack, Type::DGRAM, (ip, PORT_DNS).into())?;
        attempts += 1;
        for port in [PORT_OUTBOUND, PORT_INBOUND, PORT_TUNNEL] {
            can_bind(netns, stack, Type::DGRAM, (ip, port).into())?;
        }
        for port in [0, 15000, 15002, 15007, 15052] {
            can_bind(netns, stack, Type::STREAM, (ip, port).into())?;
        }
    }
    let after = node.status()?;
    let refused =
        |status| counted(status, stack.family(), Direction::Bind, Verdict::Dropped, Reason::ProxyPort);
    let grown = refused(&after) - refused(&before);
    ensure!(grown == attempts, "{attempts} attempts, {grown} of them counted: {:#?}", after.counters);
    if stack == Stack::V6 {
        // Both families at once, as most servers bind.
        is_refused(netns, stack, Type::STREAM, (Ipv6Addr::UNSPECIFIED, PORT_OUTBOUND).into())?;
    }

    // The proxy can.
    node.start_proxy()?;
    outbound::passes_the_proxy_once(&pod, &other, stack)
}

fn free(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (_enrolled, pod) = (node.enrolled("enrolled", Families::Dual)?, node.plain("pod", Families::Dual)?);
    can_bind_all(&pod, stack)
}

fn left(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let pod = node.enrolled("pod", families)?;
    is_refused(pod.netns(), stack, Type::STREAM, (pod.address(stack.family())?, PORT_INBOUND).into())?;
    pod.unenroll()?;
    can_bind_all(&pod, stack)
}

fn can_bind_all(pod: &Pod, stack: Stack) -> Result<()> {
    for ip in addresses(pod, stack)? {
        for port in PROXY_PORTS {
            for kind in [Type::STREAM, Type::DGRAM] {
                can_bind(pod.netns(), stack, kind, (ip, port).into())?;
            }
        }
    }
    Ok(())
}

/// An application has one of the ports when the pod is to be enrolled: the reason is reported, and nothing changes.
fn squatter(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let pod = node.plain("pod", Families::Dual)?;
    let before = Footprint::of(pod.netns())?;
    for port in [PORT_OUTBOUND, PORT_INBOUND] {
        let address = (pod.address(stack.family())?, port).into();
        let socket = can_bind(pod.netns(), stack, Type::STREAM, address)?;
        socket.listen(1)?;
        // A child that another test just forked may still hold a copy of the previous socket.
        let mut text = String::new();
        let told = wait::until_true("refusal with the port", wait::SOON, || {
            text = restarts::message(pod.enroll())?;
            Ok(text.contains(&port.to_string()))
        });
        told.with_context(|| text.clone())?;
        ensure!(text.contains(&pod.identity().to_string()), "{text:?}");
        let after = Footprint::of(pod.netns())?;
        ensure!(after == before, "before: {before:#?}\nafter: {after:#?}");
    }
    let mut outcome = Ok(());
    let enrolled = wait::until_true("enrollment with the ports free", wait::SOON, || {
        outcome = pod.enroll();
        Ok(outcome.is_ok())
    });
    outcome.and(enrolled)?;
    outbound::passes_the_proxy_once(&pod, &node.plain("other", Families::Dual)?, stack)
}
