//! Data through the proxy arrives unchanged.

use std::sync::Arc;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use redirect_tests::{Direction, Families, Stack};

use crate::context::{Context, for_every_stack};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_stack(context, "streams::a_megabyte_both_ways", megabyte);
    trials.extend(for_every_stack(context, "streams::half_close", half_close));
    trials
}

fn megabyte(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (client, server) =
        (node.enrolled("client", Families::Dual)?, node.enrolled("server", Families::Dual)?);
    let listening = server.listen(stack)?;
    let to = server.endpoint(stack.family(), listening.port())?;
    let mut connection = client.connect(stack, to)?;
    let data = noise(1 << 20);
    ensure!(connection.transfer(&data)? == data, "the data came back changed");
    ensure!(connection.finish()? == data.len() as u64);
    for (pod, direction) in [(&client, Direction::Outbound), (&server, Direction::Inbound)] {
        ensure!(pod.proxied(direction, to)?.len() == 1);
    }
    Ok(())
}

/// The client ends its direction first; further data from the server must still arrive.
fn half_close(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (client, server) =
        (node.enrolled("client", Families::Dual)?, node.enrolled("server", Families::Dual)?);
    let listening = server.listen(stack)?;
    let to = server.endpoint(stack.family(), listening.port())?;
    let connection = client.connect(stack, to)?;
    ensure!(connection.finish()? == 0);
    ensure!(client.proxied(Direction::Outbound, to)?.len() == 1);
    Ok(())
}

/// Bytes without a period, so that swapped or repeated blocks show (xorshift).
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}
