//! A node for enrollments: an agent, and a proxy that only acknowledges pods.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;

use super::proxies::{Redirection, Running, Serving, spawn};
use crate::cgroup::Cgroup;
use crate::{Node, NodeOptions, Session};

/// The node. Fields are dropped in this order.
#[derive(Debug)]
pub struct Nursery {
    _proxy: Running,
    node: Arc<Node>,
    _proxy_cgroup: Cgroup,
    _cgroup: Cgroup,
}

impl Nursery {
    /// Starts it in cgroups with this name. The agent's log has the duration of each part of an enrollment.
    pub fn start(session: &Arc<Session>, name: &str) -> Result<Self> {
        let cgroup = Cgroup::beside_this_process(name)?;
        let proxy_cgroup = cgroup.child("proxy")?;
        let log = "info,redirect_agent=debug,redirect_datapath=debug";
        let agent_arguments =
            ["--log", log, "--log-format", "json", "--cgroup", &cgroup.path().display().to_string()];
        let agent_arguments = agent_arguments.map(str::to_owned).to_vec();
        let node =
            Node::with(session, NodeOptions { proxy: false, agent_arguments, ..NodeOptions::default() })?;
        let proxy = spawn(Serving::Nothing, &[], &node, &proxy_cgroup, node.dir(), Redirection::Socket)?;
        node.with_agent(|agent| agent.wait_for_proxy(proxy.process()))?;
        Ok(Self { _proxy: proxy, node, _proxy_cgroup: proxy_cgroup, _cgroup: cgroup })
    }

    /// The agent's socket.
    #[must_use]
    pub fn agent_socket(&self) -> PathBuf {
        self.node.agent_socket()
    }

    /// The node.
    #[must_use]
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// The agent's log.
    #[must_use]
    pub fn log(&self) -> String {
        self.node.with_agent(|agent| Ok(agent.process().log())).unwrap_or_default()
    }
}
