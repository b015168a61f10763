//! Pods that send from addresses that are not theirs.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::Family;
use redirect_ebpf::count::{Direction, Reason, Verdict};
use redirect_tests::wait::{self, SOON};
use redirect_tests::{Families, Node, Stack};

use crate::context::{Context, trial};
use crate::reports::counted;
use crate::{outbound, raw};

pub(super) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    Family::ALL
        .into_iter()
        .flat_map(|family| {
            [(true, "are_dropped"), (false, "are_let_through_on_request")].map(|(verified, word)| {
                let name = format!("spoofed_sources::{word}::{}", family.name().to_lowercase());
                trial(context, name, move |context| spoofed(context, family, verified))
            })
        })
        .collect()
}

fn spoofed(context: &Context, family: Family, verified: bool) -> Result<()> {
    let node = Node::with_arguments(
        &context.session()?,
        &["--source-ip-verification", if verified { "true" } else { "false" }],
    )?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let neighbour = node.enrolled("neighbour", Families::Dual)?;
    let elsewhere = match family {
        Family::Ipv4 => IpAddr::from([198, 51, 100, 7]),
        Family::Ipv6 => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 7]),
    };
    // Another pod's address is no better than one of nobody.
    let sources = [elsewhere, neighbour.address(family)?];
    let to = other.endpoint(family, 7)?;
    for (number, source) in sources.into_iter().enumerate() {
        let syn = raw::syn(source, 1024 + number as u16, to, 1);
        pod.netns().run(|| -> Result<()> {
            raw::socket(to.ip())?.send_to(&syn, &SocketAddr::new(to.ip(), 0).into())?;
            Ok(())
        })??;
    }
    let (verdict, reason) =
        if verified { (Verdict::Dropped, Reason::Spoofed) } else { (Verdict::Steered, Reason::Enrolled) };
    let count = |family| anyhow::Ok(counted(&node.status()?, family, Direction::Outbound, verdict, reason));
    wait::until_true("count of the spoofed packets", SOON, || Ok(count(family)? == sources.len() as u64))?;
    for other in Family::ALL.into_iter().filter(|other| *other != family) {
        ensure!(count(other)? == 0, "{other}: {:#?}", node.status()?.counters);
    }
    for stack in Stack::ALL {
        outbound::passes_the_proxy_once(&pod, &other, stack)?;
    }
    Ok(())
}
