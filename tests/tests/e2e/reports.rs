//! `redirect status` and `redirect pods` agree with the kernel.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::constants::{RULE_PRIORITY_CAPTURE, RULE_PRIORITY_DELIVERY};
use redirect_ebpf::count::Reason;
use redirect_ebpf::{Direction, Family, Verdict};
use redirect_protocol::wire::{PodState, Status};
use redirect_tests::kernel::{Footprint, bpftool};
use redirect_tests::{Families, Node, Stack};
use serde_json::Value;

use crate::context::{Context, for_every_stack, trial};
use crate::{inbound, outbound};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    for_every_stack(context, "reports::connections_are_counted", counters)
}

pub(crate) fn trials_in_pods(context: &Arc<Context>) -> Vec<Trial> {
    vec![
        trial(context, "reports::status_agrees_with_the_kernel", status),
        trial(context, "reports::features_are_those_that_bpftool_finds", features),
        trial(context, "reports::pods_agree_with_the_kernel", pods),
        trial(context, "reports::an_absent_agent_is_an_error", absent_agent),
    ]
}

fn status(context: &Context) -> Result<()> {
    let session = context.session()?;
    let node = Node::start(&session)?;
    let _pods = [node.enrolled("one", Families::Dual)?, node.enrolled("two", Families::V6Only)?];
    let status = node.status()?;
    ensure!(node.with_agent(|agent| Ok(agent.process().pid()))? == status.pid);
    ensure!(status.cgroup == session.cgroup().path().display().to_string(), "{}", status.cgroup);
    ensure!(!status.programs.is_empty() && !status.maps.is_empty());

    let (programs, links, maps) = (bpftool("prog")?, bpftool("link")?, bpftool("map")?);
    for report in &status.programs {
        let program = programs.iter().find(|program| program["id"] == report.id);
        let program = program.with_context(|| format!("{report:?} is not in the kernel"))?;
        ensure!(program["name"] == report.name.as_str(), "{report:?} is {program}");
        let attached = links.iter().filter(|link| link["prog_id"] == report.id).count();
        // Without tcx, attachments are filters, not links.
        ensure!(attached == report.links || !status.tcx, "{attached} links of {report:?}");
    }
    let ids = node.with_agent(|agent| agent.objects())?.maps;
    for report in &status.maps {
        let found = maps.iter().any(|map| {
            map["id"].as_u64().is_some_and(|id| ids.iter().any(|&own| u64::from(own) == id))
                && map["name"].as_str().is_some_and(|name| report.name.starts_with(name))
                && map["max_entries"] == report.capacity
        });
        ensure!(found, "{report:?} is not in the kernel");
        ensure!(report.entries <= report.capacity as usize, "{report:?}");
    }
    let [proxy] = &status.proxies[..] else { anyhow::bail!("{:#?}", status.proxies) };
    ensure!(proxy.synced && proxy.acknowledged == 2 && proxy.refused.is_empty(), "{proxy:#?}");
    ensure!(proxy.cgroup.as_ref().is_some_and(|cgroup| cgroup.contains("/proxy-")), "{proxy:#?}");
    Ok(())
}

/// The hooks with their helpers, and the kinds of maps.
fn features(context: &Context) -> Result<()> {
    let node = context.node()?;
    let status = node.status()?;
    let output = Command::new("bpftool").args(["-j", "feature", "probe", "kernel"]).output()?;
    let probed: Value = serde_json::from_slice(&output.stdout).context("bpftool feature probe")?;
    let found = |name: &str| -> Result<Vec<&str>> {
        let feature = status.features.iter().find(|feature| feature.name == name);
        Ok(feature.with_context(|| format!("{name} is not told"))?.found.split(", ").collect())
    };
    for (name, kind) in [
        ("cgroup/connect4", "cgroup_sock_addr"),
        ("cgroup/connect6", "cgroup_sock_addr"),
        ("TC", "sched_cls"),
        ("sk_lookup", "sk_lookup"),
        ("sock_ops", "sock_ops"),
    ] {
        ensure!(probed["program_types"][format!("have_{kind}_prog_type")] == true, "{name}");
        let helpers = probed["helpers"][format!("{kind}_available_helpers")].as_array().context("helpers")?;
        for helper in found(name)? {
            ensure!(helpers.iter().any(|known| known == helper), "{name}: {helper} is not in {helpers:?}");
        }
    }
    let maps = found("maps")?;
    for (name, kind) in [("hash", "hash"), ("LPM trie", "lpm_trie"), ("socket storage", "sk_storage")] {
        ensure!(
            probed["map_types"][format!("have_{kind}_map_type")] == true && maps.contains(&name),
            "{maps:?}"
        );
    }
    ensure!(found("IPv6")? == ["on"] || !Path::new("/proc/net/if_inet6").exists());
    // The human-readable output has them as well, with the lost events.
    let mut command = Command::new(&node.session().binaries().redirect);
    let output = command.arg("status").arg("--socket").arg(node.agent_socket()).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for feature in &status.features {
        ensure!(
            text.contains(&feature.name) && text.contains(&feature.found),
            "{feature:?} is not in {text}"
        );
    }
    ensure!(
        text.contains("connection events: monitors ") && text.contains("; lost to the rate limit "),
        "{text}"
    );
    Ok(())
}

fn pods(context: &Context) -> Result<()> {
    let node = context.node()?;
    for families in Families::ALL {
        let pod = node.enrolled("pod", families)?;
        let report = node.report(&pod)?.context("the agent does not know the pod")?;
        ensure!(report.pod.to_string() == pod.identity().to_string());
        ensure!(report.addresses == pod.addresses(), "{:?}", report.addresses);
        ensure!(report.netns_cookie == pod.netns().cookie()?, "{}", report.netns_cookie);
        ensure!(report.interfaces == ["eth0"], "{:?}", report.interfaces);
        ensure!(report.proxy == Ok(()) && report.state == PodState::Captured, "{report:#?}");
        let names: Vec<_> = families.iter().map(|family| family.name().to_owned()).collect();
        ensure!(report.captured == names, "{:?}", report.captured);
        let [attachment] = &report.attachments[..] else { anyhow::bail!("{:?}", report.attachments) };
        ensure!(attachment.container_id == pod.sandbox().container_id && attachment.interface == "eth0");

        let footprint = Footprint::of(pod.netns())?;
        // Both families are captured, even one without an address of the pod.
        let caught = Family::ALL.len();
        for priority in [RULE_PRIORITY_CAPTURE, RULE_PRIORITY_DELIVERY] {
            let rules = footprint.rules.iter().filter(|rule| rule["priority"] == priority).count();
            ensure!(rules == caught, "{rules} rules of priority {priority} for {names:?}");
        }
        // And for sockets that are bound to eth0, if the pod has an address.
        ensure!(footprint.routes.len() == caught + names.len(), "{:#?}", footprint.routes);
    }
    Ok(())
}

fn absent_agent(context: &Context) -> Result<()> {
    let socket = std::env::temp_dir().join("no-such-directory/agent.sock");
    for what in ["status", "pods"] {
        let redirect = context.session()?.binaries().redirect.clone();
        let output = std::process::Command::new(redirect).arg(what).arg("--socket").arg(&socket).output()?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success(), "redirect {what} succeeded");
        ensure!(text.contains(&socket.display().to_string()), "the socket is not in {text:?}");
    }
    Ok(())
}

fn counters(context: &Context, stack: Stack) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let family = stack.family();
    let before = node.status()?;
    outbound::passes_the_proxy_once(&pod, &other, stack)?;
    inbound::passes_the_proxy_once(other.netns(), &pod, stack)?;
    let after = node.status()?;
    for direction in [Direction::Outbound, Direction::Inbound] {
        let grown = captured(&after, family, direction) - captured(&before, family, direction);
        ensure!(grown == 1, "{family} {} grew by {grown}: {:#?}", direction.label(), after.counters);
    }
    let other = if family == Family::Ipv4 { Family::Ipv6 } else { Family::Ipv4 };
    ensure!(captured(&after, other, Direction::Outbound) == 0, "{:#?}", after.counters);
    Ok(())
}

fn captured(status: &Status, family: Family, direction: Direction) -> u64 {
    counted(status, family, direction, Verdict::Captured, Reason::Enrolled)
}

/// The agent's counter for these connections.
pub(crate) fn counted(
    status: &Status,
    family: Family,
    direction: Direction,
    verdict: Verdict,
    reason: Reason,
) -> u64 {
    let counts = status.counters.iter().filter(|counter| {
        counter.family == family.name()
            && counter.direction == direction.label()
            && counter.verdict == verdict.label()
            && counter.reason == reason.label()
    });
    counts.map(|counter| counter.connections).sum()
}
