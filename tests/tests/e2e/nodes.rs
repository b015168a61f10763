//! Two nodes, each with an agent and a proxy.

use std::sync::Arc;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use redirect_tests::{Families, Node, Stack};

use crate::context::{Context, trial};
use crate::{inbound, outbound};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    vec![
        trial(context, "nodes::enrolled_to_enrolled", enrolled_to_enrolled),
        trial(context, "nodes::enrolled_to_plain_and_back", enrolled_to_plain_and_back),
        trial(context, "nodes::end_of_one_spares_the_other", end_of_one_spares_the_other),
    ]
}

fn two(context: &Context) -> Result<(Arc<Node>, Arc<Node>)> {
    let (near, far) = (Node::start(&context.session()?)?, Node::start(&context.session()?)?);
    near.attach_node(&far)?;
    Ok((near, far))
}

fn enrolled_to_enrolled(context: &Context) -> Result<()> {
    let (near, far) = two(context)?;
    for families in Families::ALL {
        for stack in families.stacks() {
            let (client, server) = (near.enrolled("client", families)?, far.enrolled("server", families)?);
            inbound::passes_both_proxies_once(&client, &server, stack)?;
        }
    }
    Ok(())
}

fn enrolled_to_plain_and_back(context: &Context) -> Result<()> {
    let (near, far) = two(context)?;
    let (enrolled, plain) = (near.enrolled("enrolled", Families::Dual)?, far.plain("plain", Families::Dual)?);
    for stack in Stack::ALL {
        outbound::passes_the_proxy_once(&enrolled, &plain, stack)?;
        inbound::passes_the_proxy_once(plain.netns(), &enrolled, stack)?;
    }
    ensure!(far.access_log().entries()?.is_empty(), "the far proxy had nothing to do");
    Ok(())
}

/// Agents do not remove each other's state.
fn end_of_one_spares_the_other(context: &Context) -> Result<()> {
    let (near, far) = two(context)?;
    let server = far.enrolled("server", Families::Dual)?;
    near.stop_agent()?;
    for stack in Stack::ALL {
        inbound::passes_the_proxy_once(near.netns(), &server, stack)?;
    }
    Ok(())
}
