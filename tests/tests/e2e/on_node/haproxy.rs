//! The distribution's unmodified HAProxy is the node proxy: it sets no marks, and is identified by its cgroup, or by two.

use std::fs;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::constants::{PORT_INBOUND, PORT_OUTBOUND};
use redirect_tests::cgroup::Cgroup;
use redirect_tests::connection::io_kind;
use redirect_tests::process::Process;
use redirect_tests::stack::canonical;
use redirect_tests::wait::{self, SOON};
use redirect_tests::{Connection, Families, Netns, Node, NodeOptions, Pod, Stack};

use crate::context::{Context, for_every_stack};

pub(super) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    [("is_the_node_proxy", Parts::One), ("in_two_parts_is_the_node_proxy", Parts::Two)]
        .into_iter()
        .flat_map(|(name, parts)| {
            let test = move |context: &Context, stack: Stack| is_the_node_proxy(context, stack, parts);
            for_every_stack(context, &format!("haproxy::{name}"), test)
        })
        .collect()
}

/// The number of HAProxies.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Parts {
    /// One for everything.
    One,
    /// One for connections from pods, another one for those to pods.
    Two,
}

/// The common configuration. `*` as a server means the client's original destination.
const COMMON: &str = "
global
    log stdout format raw local0
defaults
    mode tcp
    log global
    timeout connect 5s
    timeout client 30s
    timeout server 30s
    log-format \"%ft %ci:%cp %fi:%fp\"
backend destination
    source 0.0.0.0 usesrc clientip
    server original *
";
const OUTBOUND: &str = "
frontend outbound
    bind 0.0.0.0:15001 transparent
    bind :::15001 transparent v6only
    default_backend destination
";
const INBOUND: &str = "
frontend inbound
    bind 0.0.0.0:15006 transparent
    bind :::15006 transparent v6only
    default_backend destination
";

/// A node whose proxy is HAProxy.
struct Scene {
    // Dropped in this order.
    haproxies: Vec<Process>,
    node: Arc<Node>,
    _cgroups: Vec<Cgroup>,
}

impl Scene {
    fn new(context: &Context, parts: Parts) -> Result<Self> {
        let options = NodeOptions { agent: false, proxy: false, ..NodeOptions::default() };
        let node = Node::with(&context.session()?, options)?;
        let parts = match parts {
            Parts::One => vec![("--proxy-cgroup", "haproxy", format!("{COMMON}{OUTBOUND}{INBOUND}"))],
            Parts::Two => vec![
                ("--proxy-cgroup", "haproxy-inbound", format!("{COMMON}{INBOUND}")),
                ("--outbound-proxy-cgroup", "haproxy-outbound", format!("{COMMON}{OUTBOUND}")),
            ],
        };
        let (mut arguments, mut cgroups, mut haproxies) = (Vec::new(), Vec::new(), Vec::new());
        for (option, name, _) in &parts {
            let cgroup = node.session().cgroup().child(&format!("{name}-of-{}", node.netns().name()))?;
            arguments.push(format!("{option}={}", cgroup.path().display()));
            cgroups.push(cgroup);
        }
        node.start_agent(&arguments)?;
        for ((_, name, configuration), cgroup) in parts.iter().zip(&cgroups) {
            let file = node.dir().join(format!("{name}.cfg"));
            fs::write(&file, configuration)?;
            let mut command = Command::new("haproxy");
            command.arg("-db").arg("-f").arg(file);
            let log = node.dir().join(format!("{name}.log"));
            haproxies.push(Process::spawn(name, command, node.netns(), cgroup, &log)?);
        }
        let scene = Self { haproxies, node, _cgroups: cgroups };
        let pid = scene.haproxies[0].pid();
        let ready = scene.node.with_agent(|agent| agent.wait_for_proxy(pid));
        ready.with_context(|| scene.last_lines())?;
        Ok(scene)
    }

    fn last_lines(&self) -> String {
        let logs = self.haproxies.iter().map(|haproxy| format!("log of HAProxy:\n{}", haproxy.last_lines()));
        logs.collect::<Vec<_>>().join("\n")
    }

    /// One connection that passes HAProxy once in each of these directions; the ends see each other.
    fn passes(&self, ways: &[&str], client: &Netns, server: &Pod, stack: Stack) -> Result<()> {
        let listening = server.listen(stack)?;
        let to = server.endpoint(stack.family(), listening.port())?;
        let mut connection = Connection::open(client, stack, to)?;
        connection.exchange("hello")?;
        ensure!(connection.peer_name == stack.spell(to), "getpeername says {}", connection.peer_name);
        let source = canonical(connection.local_name);
        ensure!(connection.heard.peer.ip() == source.ip(), "{source} came as {:?}", connection.heard);
        ensure!(!connection.is_direct(), "{source} came itself");
        ensure!(connection.heard.local == to, "the application is at {}", connection.heard.local);
        connection.finish()?;
        self.logged(ways, source, to)
    }

    /// HAProxy logs a connection when it has ended: first the one that was opened last.
    fn logged(&self, ways: &[&str], source: SocketAddr, to: SocketAddr) -> Result<()> {
        // It logs IPv6 addresses without brackets. Only the first HAProxy sees the client's own port.
        let spell = |end: SocketAddr| format!("{}:{}", end.ip(), end.port());
        let (from, to) = (format!(" {}:", source.ip()), format!(" {}", spell(to)));
        let first = format!(" {}{to}", spell(source));
        let seen = || -> Vec<String> {
            let logs = self.haproxies.iter().map(|haproxy| haproxy.log().replace("::ffff:", ""));
            let lines = logs.flat_map(|log| log.lines().map(str::to_owned).collect::<Vec<_>>());
            lines.filter(|line| line.contains(&from) && line.ends_with(&to)).collect()
        };
        wait::until_true(&format!("{ways:?} from {source} to{to}"), SOON, || Ok(seen().len() >= ways.len()))
            .with_context(|| self.last_lines())?;
        let seen = seen();
        ensure!(seen.len() == ways.len(), "not once each of {ways:?} but {seen:#?}");
        for way in ways {
            ensure!(seen.iter().any(|line| line.starts_with(way)), "no {way} in {seen:#?}");
        }
        ensure!(seen.iter().any(|line| line.ends_with(&first) && line.starts_with(ways[0])), "{seen:#?}");
        Ok(())
    }
}

fn is_the_node_proxy(context: &Context, stack: Stack, parts: Parts) -> Result<()> {
    let scene = Scene::new(context, parts)?;
    let outside = Netns::new("outside")?;
    scene.node.attach(&outside, "outside")?;
    let (pod, other) =
        (scene.node.enrolled("pod", Families::Dual)?, scene.node.plain("other", Families::Dual)?);
    scene.passes(&["outbound"], pod.netns(), &other, stack).context("from the pod")?;
    for (client, who) in
        [(other.netns(), "another pod"), (&outside, "outside"), (scene.node.netns(), "the node")]
    {
        scene.passes(&["inbound"], client, &pod, stack).with_context(|| format!("from {who}"))?;
    }
    // The connections of a single HAProxy for a pod can't be distinguished from deliveries, so the connection
    // passes once.
    let ways = if parts == Parts::Two { &["outbound", "inbound"][..] } else { &["outbound"] };
    let neighbour = scene.node.enrolled("neighbour", Families::Dual)?;
    scene.passes(ways, pod.netns(), &neighbour, stack).context("from pod to pod")?;
    // It would connect to itself in a loop.
    for port in [PORT_OUTBOUND, PORT_INBOUND] {
        let to = SocketAddr::new(scene.node.gateway(stack.family()), port);
        for client in [&outside, other.netns(), scene.node.netns()] {
            let error = Connection::open(client, stack, to).err().context("HAProxy was dialled itself")?;
            ensure!(io_kind(&error) == Some(ErrorKind::ConnectionRefused), "{error:#}");
        }
    }
    // The client gets the error from HAProxy, which has accepted the connection by then.
    for (client, server) in [(&pod, &other), (&other, &pod)] {
        let to = server.endpoint(stack.family(), 9)?;
        ensure!(client.connect(stack, to).is_err(), "{to} answered");
    }
    Ok(())
}
