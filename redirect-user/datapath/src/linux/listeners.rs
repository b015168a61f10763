//! Which programs store the proxies' listeners for the socket lookup.

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
    /// Chooses by what the kernel allows.
    pub fn probe() -> anyhow::Result<Self> {
        let may =
            probe::tc_may_keep_sockets().context("cannot find out which programs may store listeners")?;
        Ok(if may { Self::Tc } else { Self::SockOps })
    }
}

/// The program on the root cgroup.
pub(super) const LISTENING: &str = "listening";
