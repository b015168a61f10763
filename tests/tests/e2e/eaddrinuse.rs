//! Applications that bind their port again while proxied connections on it are open.
//!
//! The proxy's ends of connections have the pod's address and the application's port, or those of a server elsewhere;
//! neither may prevent an application's bind.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_tests::connection::dial;
use redirect_tests::wait::SOON;
use redirect_tests::{Direction, Families, Netns, Pod, Stack, wait};
use socket2::{Socket, Type};

use crate::context::{Context, for_every_kind};
use crate::inbound;

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (address, word) in [(Address::Any, "any_address"), (Address::Own, "own_address")] {
        for (reuse, option) in [(false, "without_reuseaddr"), (true, "with_reuseaddr")] {
            for (end, what) in [(End::Listener, "hand_over"), (End::Everything, "restart")] {
                let test = move |context: &Context, families: Families, stack: Stack| {
                    if !reuse {
                        context.needs_placement_pod(
                            "the connections on the port are the application's alone, as without a mesh",
                        )?;
                    }
                    restarts(context, families, stack, address, reuse, end)
                };
                let group = format!("eaddrinuse::{what}::{word}::{option}");
                trials.extend(for_every_kind(context, &group, test));
            }
        }
    }
    trials.extend(for_every_kind(context, "eaddrinuse::port_of_a_server_elsewhere", server_elsewhere));
    trials.extend(for_every_kind(context, "eaddrinuse::port_that_is_listened_on_is_refused", listened));
    trials
}

#[derive(Clone, Copy)]
enum Address {
    Any,
    Own,
}

impl Address {
    fn of(self, pod: &Pod, stack: Stack, port: u16) -> Result<SocketAddr> {
        let ip: IpAddr = match (self, stack) {
            (Self::Own, _) => pod.address(stack.family())?,
            (Self::Any, Stack::V4) => Ipv4Addr::UNSPECIFIED.into(),
            (Self::Any, Stack::V6 | Stack::Mapped) => Ipv6Addr::UNSPECIFIED.into(),
        };
        Ok(stack.spell((ip, port).into()))
    }
}

/// What ends of the old application before the new one starts.
#[derive(Clone, Copy)]
enum End {
    /// Its listener: an old process serves its connections to their end.
    Listener,
    /// Its connections as well; the client keeps them half open.
    Everything,
}

/// Binds and listens like an application that sets at most one option.
fn listen(netns: &Netns, stack: Stack, address: SocketAddr, reuse: bool) -> Result<io::Result<TcpListener>> {
    netns.run(|| {
        let socket = Socket::new(stack.domain(), Type::STREAM, None)?;
        if stack != Stack::V4 {
            socket.set_only_v6(stack == Stack::V6)?;
        }
        if reuse {
            socket.set_reuse_address(true)?;
        }
        socket.bind(&address.into())?;
        socket.listen(16)?;
        Ok(socket.into())
    })
}

fn restarts(
    context: &Context,
    families: Families,
    stack: Stack,
    address: Address,
    reuse: bool,
    end: End,
) -> Result<()> {
    const CONNECTIONS: usize = 3;
    let node = context.node()?;
    let (pod, client) = (node.enrolled("pod", families)?, node.plain("client", Families::Dual)?);
    let first = listen(pod.netns(), stack, address.of(&pod, stack, 0)?, reuse)??;
    let port = first.local_addr()?.port();
    let to = pod.endpoint(stack.family(), port)?;
    let mut alive = Vec::new();
    for _ in 0..CONNECTIONS {
        let near = client.netns().run(|| dial(stack, to, SOON))??;
        alive.push((near, first.accept()?.0));
    }
    pod.proxied_times(Direction::Inbound, to, CONNECTIONS)?;

    drop(first);
    match end {
        End::Listener => {}
        End::Everything => {
            // The client sees the end, so the proxy has finished the application's side.
            for (near, far) in std::mem::take(&mut alive) {
                drop(far);
                let mut near = near;
                let read = io::Read::read(&mut near, &mut [0])?;
                ensure!(read == 0);
                // Half open from here on.
                alive.push((near.try_clone()?, near));
            }
        }
    }
    let again = address.of(&pod, stack, port)?;
    let second = wait::until_bound(|| listen(pod.netns(), stack, again, reuse))?
        .with_context(|| format!("the port of {} living connections", alive.len()))?;
    let near = client.netns().run(|| dial(stack, to, SOON))??;
    let (_, peer) = second.accept()?;
    ensure!(peer.ip().to_canonical() == near.local_addr()?.ip().to_canonical(), "the application saw {peer}");
    pod.proxied_times(Direction::Inbound, to, CONNECTIONS + 1).map(drop)
}

/// An outbound connection's end at the proxy has the address of its server, in the client's namespace.
fn server_elsewhere(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (pod, server) = (node.enrolled("pod", families)?, node.plain("server", Families::Dual)?);
    let listening = server.listen(stack)?;
    let to = server.endpoint(stack.family(), listening.port())?;
    let mut connection = pod.connect(stack, to)?;
    pod.proxied_times(Direction::Outbound, to, 1)?;
    for address in [Address::Any, Address::Own] {
        for reuse in [false, true] {
            let address = address.of(&pod, stack, listening.port())?;
            wait::until_bound(|| listen(pod.netns(), stack, address, reuse))?
                .with_context(|| format!("{address}, reuse {reuse}"))?;
        }
    }
    connection.exchange("still here")
}

/// The exemption for the proxy's connections does not extend to a second application.
fn listened(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (pod, client) = (node.enrolled("pod", families)?, node.plain("client", Families::Dual)?);
    for held in [Address::Any, Address::Own] {
        for reuse in [false, true] {
            let first = listen(pod.netns(), stack, held.of(&pod, stack, 0)?, reuse)??;
            let port = first.local_addr()?.port();
            for wanted in [Address::Any, Address::Own] {
                let address = wanted.of(&pod, stack, port)?;
                let error = listen(pod.netns(), stack, address, reuse)?.err();
                let error = error.with_context(|| format!("{address} is listened on twice"))?;
                ensure!(error.kind() == io::ErrorKind::AddrInUse, "{error}");
            }
        }
    }
    inbound::passes_the_proxy_once(client.netns(), &pod, stack)
}
