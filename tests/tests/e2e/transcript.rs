//! The transcript in the documentation matches the commands' output.

use std::sync::Arc;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use redirect_tests::{ProxyKind, transcript};

use crate::context::{Context, trial};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    vec![trial(context, "transcript::is_what_the_commands_print", transcript)]
}

fn transcript(context: &Context) -> Result<()> {
    context.needs(ProxyKind::Embedded, "the pods have names that a ztunnel does not know")?;
    let written = include_str!("../../../deploy/docs/observe.md");
    let now = transcript::record(&context.session()?)?;
    let (written, shape) = (transcript::shape(written), transcript::shape(&now));
    let different = written.iter().zip(&shape).find(|(old, new)| old != new);
    ensure!(
        different.is_none() && written.len() == shape.len(),
        "deploy/docs/observe.md is not what the commands print now (`cargo xtask transcript` writes it anew); the first \
         difference is {different:#?}\n{now}"
    );
    Ok(())
}
