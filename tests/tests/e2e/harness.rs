//! The harness itself, without agent and proxy: its results for direct connections must be right, or those for proxied
//! ones prove nothing.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_tests::cni::{REDIRECT, Sandbox};
use redirect_tests::kernel::Footprint;
use redirect_tests::stack::canonical;
use redirect_tests::{Families, Netns, Node, NodeOptions, PodSpec, Stack};

use crate::context::{Context, Needs, trial_that_needs};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = Vec::new();
    for families in Families::ALL {
        for stack in families.stacks() {
            let name = format!("harness::direct::{}::{}", families.label(), stack.label());
            trials.push(trial_that_needs(Needs::Root, context, name, move |context| {
                direct(context, families, stack)
            }));
        }
    }
    type Test = fn(&Context) -> Result<()>;
    let others: [(&str, Test); 6] = [
        ("failing_plugin_undoes_the_chain", failing_plugin_undoes_the_chain),
        ("outside", outside),
        ("two_nodes", two_nodes),
        ("addresses_can_be_chosen", addresses_can_be_chosen),
        ("namespaces_end_with_their_guard", namespaces_end_with_their_guard),
        ("footprints_compare", footprints_compare),
    ];
    for (name, test) in others {
        trials.push(trial_that_needs(Needs::Root, context, format!("harness::{name}"), test));
    }
    trials
}

fn bare(context: &Context) -> Result<Arc<Node>> {
    Node::with(&context.session()?, NodeOptions { agent: false, proxy: false, ..Default::default() })
}

fn direct(context: &Context, families: Families, stack: Stack) -> Result<()> {
    let node = bare(context)?;
    let (client, server) = (node.plain("client", families)?, node.plain("server", families)?);
    let listening = server.listen(stack)?;
    let to = server.endpoint(stack.family(), listening.port())?;
    let mut connection = client.connect(stack, to)?;
    ensure!(connection.peer_name == stack.spell(to), "getpeername says {}", connection.peer_name);
    ensure!(connection.local_name.ip().to_canonical() == client.address(stack.family())?);
    ensure!(connection.heard.peer == canonical(connection.local_name), "{:?}", connection.heard);
    ensure!(connection.heard.local == to, "{:?}", connection.heard);
    ensure!(listening.accepted() == [connection.heard.clone()]);
    connection.exchange("hello")?;
    let data = vec![7; 300_000];
    ensure!(connection.transfer(&data)? == data);
    ensure!(connection.finish()? == 300_006);
    Ok(())
}

fn outside(context: &Context) -> Result<()> {
    let node = bare(context)?;
    let outside = Netns::new("outside")?;
    node.attach(&outside, "outside")?;
    let pod = node.plain("server", Families::Dual)?;
    for stack in Stack::ALL {
        let listening = pod.listen(stack)?;
        let to = pod.endpoint(stack.family(), listening.port())?;
        let connection = redirect_tests::Connection::open(&outside, stack, to)?;
        ensure!(connection.heard.peer.ip() == node.attached(stack.family()), "{:?}", connection.heard);
        let connection = redirect_tests::Connection::open(node.netns(), stack, to)?;
        ensure!(connection.heard.peer.ip() == node.gateway(stack.family()), "{:?}", connection.heard);
    }
    Ok(())
}

fn two_nodes(context: &Context) -> Result<()> {
    let (near, far) = (bare(context)?, bare(context)?);
    near.attach_node(&far)?;
    let (client, server) = (near.plain("client", Families::Dual)?, far.plain("server", Families::Dual)?);
    for stack in Stack::ALL {
        let listening = server.listen(stack)?;
        let connection = client.connect(stack, server.endpoint(stack.family(), listening.port())?)?;
        ensure!(connection.heard.peer.ip() == client.address(stack.family())?, "{:?}", connection.heard);
    }
    Ok(())
}

fn addresses_can_be_chosen(context: &Context) -> Result<()> {
    let node = bare(context)?;
    let wanted = node.to_choose(7);
    for _ in 0..2 {
        let spec = PodSpec::new("pod", Families::Dual).not_enrolled().with_addresses(&wanted);
        let pod = redirect_tests::Pod::start(&node, spec)?;
        ensure!(pod.addresses() == wanted, "{:?}", pod.addresses());
    }
    Ok(())
}

fn failing_plugin_undoes_the_chain(context: &Context) -> Result<()> {
    const PLUGIN: &str = r#"#!/bin/sh
        cat > /dev/null
        [ "$CNI_COMMAND" = DEL ] && exit 0
        echo '{"cniVersion": "1.0.0", "code": 11, "msg": "not today", "details": "by design"}'
        exit 1
    "#;
    let directory = tempfile::tempdir()?;
    let plugin = directory.path().join(REDIRECT);
    fs::write(&plugin, PLUGIN)?;
    fs::set_permissions(&plugin, fs::Permissions::from_mode(0o755))?;

    let node = bare(context)?;
    let pod = Netns::new("pod")?;
    let sandbox = Sandbox {
        container_id: "sandbox".to_owned(),
        netns: Some(pod.path()),
        interface: "eth0".to_owned(),
        arguments: String::new(),
    };
    let chain = node.chain(Families::Dual, &[]).searching_first(directory.path());
    let error = chain.add(node.netns(), &sandbox, None).err().context("the chain succeeded")?;
    let text = format!("{error:#}");
    ensure!(text.contains("redirect-cni ADD: code 11: not today: by design"), "{text}");
    let links = node.netns().json("ip -j link show type veth")?;
    ensure!(links.as_array().is_some_and(Vec::is_empty), "left on the node: {links:#}");
    let book = node.dir().join("host-local").join("test-dual");
    let reserved =
        fs::read_dir(book)?.flatten().filter(|entry| entry.file_name().to_string_lossy().contains("10."));
    ensure!(reserved.count() == 0, "an address is still reserved");
    Ok(())
}

fn namespaces_end_with_their_guard(_: &Context) -> Result<()> {
    let (one, other) = (Netns::new("one")?, Netns::new("other")?);
    one.ip(&format!("link add probe type veth peer name probe netns {}", other.path().display()))?;
    drop(other);
    // The peer is removed with its namespace.
    redirect_tests::wait::until_true("end of the namespace", redirect_tests::wait::SOON, || {
        Ok(one.json("ip -j link show")?.as_array().is_some_and(|links| links.len() == 1))
    })
}

fn footprints_compare(_: &Context) -> Result<()> {
    let netns = Netns::new("pod")?;
    let before = Footprint::of(&netns)?;
    ensure!(before == Footprint::of(&netns)?);
    for family in ["-4", "-6"] {
        netns.ip(&format!("{family} rule add pref 15001 fwmark 0x112/0xfff lookup 15001"))?;
        let with_rule = Footprint::of(&netns)?;
        ensure!(with_rule.rules.len() == before.rules.len() + 1);
        netns.ip(&format!("{family} route add local default dev lo table 15001"))?;
        ensure!(Footprint::of(&netns)?.routes.len() == before.routes.len() + 1);
        netns.ip(&format!("{family} route flush table 15001"))?;
        netns.ip(&format!("{family} rule del pref 15001"))?;
        ensure!(before == Footprint::of(&netns)?);
    }
    Ok(())
}
