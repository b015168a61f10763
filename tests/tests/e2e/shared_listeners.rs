//! Listeners with `SO_REUSEPORT`, as used by proxies that replace each other. Before Linux 6.6 no TC program can assign one.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::constants::{PORT_INBOUND, PORT_OUTBOUND};
use redirect_tests::process::descriptor_of;
use redirect_tests::{Families, Pod, Stack};
use socket2::Socket;

use crate::context::{Context, for_every_stack};
use crate::{inbound, outbound};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    for_every_stack(context, "shared_listeners::both_ways", both_ways)
}

fn both_ways(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (pod, other) = (node.enrolled("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    for listener in listeners(&pod, node.proxy_pid()?)? {
        ensure!(listener.reuse_port()?, "{:?} is not shared", listener.local_addr());
    }
    outbound::passes_the_proxy_once(&pod, &other, stack)?;
    inbound::passes_the_proxy_once(other.netns(), &pod, stack)
}

/// The proxy's listeners for connections of this pod: one for each direction.
fn listeners(pod: &Pod, proxy: u32) -> Result<[Socket; 2]> {
    let table = pod.proxy_netns().run(|| fs::read_to_string("/proc/thread-self/net/tcp6"))??;
    let find = |port| -> Result<Socket> {
        let inode = inode(&table, port).with_context(|| format!("nobody listens at {port}: {table}"))?;
        let link = PathBuf::from(format!("socket:[{inode}]"));
        for entry in fs::read_dir(format!("/proc/{proxy}/fd"))? {
            let path = entry?.path();
            // Other descriptors may be closed by now.
            if fs::read_link(&path).is_ok_and(|target| target == link) {
                let number = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().parse()?;
                return Ok(descriptor_of(proxy as i32, number)?.into());
            }
        }
        bail!("it is not the proxy that listens at {port}")
    };
    Ok([find(PORT_OUTBOUND)?, find(PORT_INBOUND)?])
}

/// The listener on a port in a table like `/proc/net/tcp`.
fn inode(table: &str, port: u16) -> Option<&str> {
    let end = format!(":{port:04X}");
    table.lines().find_map(|line| {
        // "sl: local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode …"
        let fields: Vec<&str> = line.split_whitespace().collect();
        (fields.get(1)?.ends_with(&end) && *fields.get(3)? == "0A").then(|| fields.get(9).copied())?
    })
}
