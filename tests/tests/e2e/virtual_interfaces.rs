//! Interfaces that a pod declares with `istio.io/reroute-virtual-interfaces`: connections from behind them count as the
//! pod's own.

use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use libtest_mimic::Trial;
use redirect_tests::stack::canonical;
use redirect_tests::{Cluster, Connection, Direction, Families, Pod, Stack, wait};

use crate::context::{Context, for_every_stack};
use crate::odd_sockets::nested::{Joint, address, behind};
use crate::{inbound, outbound};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_stack(context, "virtual_interfaces::there_at_enrollment", |context, stack| {
        declared(context, stack, Order::InterfaceFirst)
    });
    trials.extend(for_every_stack(context, "virtual_interfaces::made_later", |context, stack| {
        declared(context, stack, Order::EnrollmentFirst)
    }));
    trials
}

/// The name that [`behind`] gives the pod's device.
const ANNOTATION: [(&str, &str); 1] = [("istio.io/reroute-virtual-interfaces", "tap7, inner")];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    InterfaceFirst,
    EnrollmentFirst,
}

/// E.g. a virtual machine behind the pod.
fn declared(context: &Context, stack: Stack, order: Order) -> Result<()> {
    let cluster = Cluster::start(&context.session()?, &[])?;
    let (pod, other) =
        (cluster.node().plain("pod", Families::Dual)?, cluster.node().plain("other", Families::Dual)?);
    cluster.announce(&pod, &ANNOTATION);
    let machine = match order {
        Order::InterfaceFirst => {
            let machine = behind(&pod, Joint::Routed)?;
            pod.enroll()?;
            machine
        }
        Order::EnrollmentFirst => {
            pod.enroll()?;
            behind(&pod, Joint::Routed)?
        }
    };
    wait_for_the_interface(&pod)?;

    let listening = other.listen(stack)?;
    let to = other.endpoint(stack.family(), listening.port())?;
    let mut connection = Connection::open(&machine, stack, to)?;
    connection.exchange("hello")?;
    ensure!(connection.peer_name == stack.spell(to), "getpeername says {}", connection.peer_name);
    let source = canonical(connection.local_name);
    ensure!(source.ip() == address(stack.family(), 2), "the machine's own address is {source}");
    let entries = pod.proxied(Direction::Outbound, to)?;
    let [entry] = &entries[..] else { bail!("not one entry but {entries:#?}") };
    ensure!(entry.source == source && entry.is_of(stack.family()), "{entry:#?}");
    let heard = &connection.heard;
    ensure!(heard.peer.ip() == pod.address(stack.family())?, "the proxy came from {}", heard.peer);
    ensure!(pod.proxied_at_all()?.len() == 1, "{:#?}", pod.proxied_at_all()?);

    // The pod's own connections are unaffected.
    outbound::passes_the_proxy_once(&pod, &other, stack)?;
    inbound::passes_the_proxy_once(other.netns(), &pod, stack)
}

fn wait_for_the_interface(pod: &Pod) -> Result<()> {
    wait::until_true("program on the new device", wait::SOON, || {
        let report = pod.node().report(pod)?;
        Ok(report.is_some_and(|report| report.interfaces.iter().any(|name| name == "inner")))
    })
}
