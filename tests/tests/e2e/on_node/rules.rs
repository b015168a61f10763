//! The host's routing rules are shared with other software.

use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::Family;
use redirect_tests::kernel::Footprint;
use redirect_tests::{Families, Node, NodeOptions, Stack};

use crate::context::{Context, trial};
use crate::{inbound, outbound};

pub(super) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let trial = |family: Family| {
        let name = format!("rules::taken_priority_is_refused::{}", family.name().to_lowercase());
        trial(context, name, move |context| taken(context, family))
    };
    Family::ALL.into_iter().map(trial).collect()
}

fn taken(context: &Context, family: Family) -> Result<()> {
    let options = NodeOptions { agent: false, proxy: false, ..NodeOptions::default() };
    let node = Node::with(&context.session()?, options)?;
    let flag = if family == Family::Ipv4 { "-4" } else { "-6" };
    node.netns().ip(&format!("{flag} rule add pref 5 fwmark 0x77 lookup 200"))?;
    let before = Footprint::of(node.netns())?;
    let error = node.start_agent(&[]).err().context("the agent started")?;
    let text = format!("{error:#}");
    for word in [family.name(), "rule priority 5", "fwmark 0x77", "--rule-priority"] {
        ensure!(text.contains(word), "{word} is not in {text}");
    }
    ensure!(Footprint::of(node.netns())? == before, "{:#?}", Footprint::of(node.netns())?);

    node.start_agent(&["--rule-priority", "6"].map(str::to_owned))?;
    node.start_proxy()?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    for stack in Stack::ALL {
        outbound::passes_the_proxy_once(&pod, &other, stack)?;
        inbound::passes_the_proxy_once(other.netns(), &pod, stack)?;
    }
    drop((pod, other));
    node.stop_agent()?;
    let after = Footprint::of(node.netns())?;
    ensure!(after.rules == before.rules && after.sysctls == before.sysctls, "{after:#?}");
    Ok(())
}
