//! Connections that never leave the pod are left alone.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use redirect_tests::connection::dial_prepared;
use redirect_tests::stack::canonical;
use redirect_tests::wait::{self, SOON};
use redirect_tests::{Connection, Families, Pod, Stack};
use socket2::Socket;

use crate::context::{Context, for_every_kind};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_kind(context, "local::loopback", loopback);
    trials.extend(for_every_kind(context, "local::own_address", own_address));
    trials.extend(for_every_kind(context, "local::own_address_to_loopback", own_address_to_loopback));
    trials
}

fn loopback(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let pod = context.node()?.enrolled("pod", families)?;
    stays_inside(&pod, stack, stack.loopback())
}

fn own_address(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let pod = context.node()?.enrolled("pod", families)?;
    let address = pod.address(stack.family())?;
    stays_inside(&pod, stack, address)
}

fn own_address_to_loopback(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let pod = context.node()?.enrolled("pod", families)?;
    let listening = pod.listen(stack)?;
    let to = SocketAddr::new(stack.loopback(), listening.port());
    let from = SocketAddr::new(pod.address(stack.family())?, 0);
    let bind = |socket: &Socket| socket.bind(&stack.spell(from).into());
    let stream = pod.netns().run(|| dial_prepared(stack, to, wait::patient(SOON), bind))??;
    let connection = Connection::greeted(stream)?;
    ensure!(connection.heard.peer.ip() == from.ip(), "{:?}", connection.heard);
    ensure!(listening.accepted().len() == 1 && pod.proxied_at_all()?.is_empty());
    Ok(())
}

fn stays_inside(pod: &Pod, stack: Stack, address: IpAddr) -> Result<()> {
    let listening = pod.listen(stack)?;
    let to = (address, listening.port()).into();
    let mut connection = pod.connect(stack, to)?;
    connection.exchange("hello")?;
    // Including the port: a proxy in between would have another one.
    ensure!(connection.heard.peer == canonical(connection.local_name), "{:?}", connection.heard);
    ensure!(connection.heard.local == to, "{:?}", connection.heard);
    ensure!(listening.accepted().len() == 1);
    ensure!(pod.proxied_at_all()?.is_empty(), "{:#?}", pod.proxied_at_all()?);
    Ok(())
}
