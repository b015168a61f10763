//! How the socket lookup comes to know the proxies' listeners.

use anyhow::Context as _;

use redirect_linux::probe;

/// Who notes listeners in the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum NotedBy {
    /// TC programs, at the first connection that needs one: up to Linux 7.2.
    Tc,
    /// A program of the root cgroup, when they begin to listen.
    SockOps,
}

impl NotedBy {
    /// As the kernel allows it.
    pub fn probe() -> anyhow::Result<Self> {
        let may = probe::tc_may_keep_sockets().context("it can't be found out who may note listeners")?;
        Ok(if may { Self::Tc } else { Self::SockOps })
    }
}

/// The program of the root cgroup.
pub(super) const LISTENING: &str = "listening";
