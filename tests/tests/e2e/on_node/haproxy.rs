//! HAProxy as it comes from the distribution is the node proxy: it has never heard of us, sets no marks, and is known by its
//! cgroup.

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
    for_every_stack(context, "haproxy::is_the_node_proxy", is_the_node_proxy)
}

/// Everything that it is told. `*` as a server is where the client wanted to go.
const CONFIGURATION: &str = "
global
    log stdout format raw local0
defaults
    mode tcp
    log global
    timeout connect 5s
    timeout client 30s
    timeout server 30s
    log-format \"%ft %ci:%cp %fi:%fp\"
frontend outbound
    bind 0.0.0.0:15001 transparent
    bind :::15001 transparent v6only
    default_backend destination
frontend inbound
    bind 0.0.0.0:15006 transparent
    bind :::15006 transparent v6only
    default_backend destination
backend destination
    source 0.0.0.0 usesrc clientip
    server original *
";

/// A node whose proxy is HAProxy.
struct Scene {
    // Dropped in this order.
    haproxy: Process,
    node: Arc<Node>,
    _cgroup: Cgroup,
}

impl Scene {
    fn new(context: &Context) -> Result<Self> {
        let options = NodeOptions { agent: false, proxy: false, ..NodeOptions::default() };
        let node = Node::with(&context.session()?, options)?;
        let cgroup = node.session().cgroup().child(&format!("haproxy-of-{}", node.netns().name()))?;
        let path = cgroup.path().display().to_string();
        node.start_agent(&["--proxy-cgroup".into(), path])?;
        let configuration = node.dir().join("haproxy.cfg");
        fs::write(&configuration, CONFIGURATION)?;
        let mut command = Command::new("haproxy");
        command.arg("-db").arg("-f").arg(configuration);
        let haproxy =
            Process::spawn("haproxy", command, node.netns(), &cgroup, &node.dir().join("haproxy.log"))?;
        let pid = haproxy.pid();
        let ready = node.with_agent(|agent| agent.wait_for_proxy(pid));
        ready.with_context(|| format!("log of HAProxy:\n{}", haproxy.last_lines()))?;
        Ok(Self { haproxy, node, _cgroup: cgroup })
    }

    /// One connection that went through HAProxy once, in this direction; the ends see each other.
    fn passes(&self, way: &str, client: &Netns, server: &Pod, stack: Stack) -> Result<()> {
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
        self.logged(way, source, to)
    }

    /// HAProxy tells of a connection when it has ended.
    fn logged(&self, way: &str, source: SocketAddr, to: SocketAddr) -> Result<()> {
        // IPv6 addresses are without brackets there.
        let spell = |end: SocketAddr| format!("{}:{}", end.ip(), end.port());
        let line = format!("{way} {} {}", spell(source), spell(to));
        let count =
            || self.haproxy.log().replace("::ffff:", "").lines().filter(|found| *found == line).count();
        wait::until_true(&format!("line `{line}` of HAProxy"), SOON, || Ok(count() == 1))
            .with_context(|| self.haproxy.last_lines())
    }
}

fn is_the_node_proxy(context: &Context, stack: Stack) -> Result<()> {
    let scene = Scene::new(context)?;
    let outside = Netns::new("outside")?;
    scene.node.attach(&outside, "outside")?;
    let (pod, other) =
        (scene.node.enrolled("pod", Families::Dual)?, scene.node.plain("other", Families::Dual)?);
    scene.passes("outbound", pod.netns(), &other, stack).context("from the pod")?;
    for (client, who) in
        [(other.netns(), "another pod"), (&outside, "outside"), (scene.node.netns(), "the node")]
    {
        scene.passes("inbound", client, &pod, stack).with_context(|| format!("from {who}"))?;
    }
    // What HAProxy connects for one pod it does not tell from a delivery, so that it passes once.
    let neighbour = scene.node.enrolled("neighbour", Families::Dual)?;
    scene.passes("outbound", pod.netns(), &neighbour, stack).context("from pod to pod")?;
    // It would connect to itself again and again.
    for port in [PORT_OUTBOUND, PORT_INBOUND] {
        let to = SocketAddr::new(scene.node.gateway(stack.family()), port);
        for client in [&outside, other.netns(), scene.node.netns()] {
            let error = Connection::open(client, stack, to).err().context("HAProxy was dialled itself")?;
            ensure!(io_kind(&error) == Some(ErrorKind::ConnectionRefused), "{error:#}");
        }
    }
    // The client learns of it from HAProxy, which has accepted the connection by then.
    for (client, server) in [(&pod, &other), (&other, &pod)] {
        let to = server.endpoint(stack.family(), 9)?;
        ensure!(client.connect(stack, to).is_err(), "{to} answered");
    }
    Ok(())
}
