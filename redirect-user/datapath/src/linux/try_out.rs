//! Loads the programs without attaching them, to check that the kernel accepts them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use redirect_ebpf::flow::FlowLimits;

use super::object::{self, Programs};
use super::tc::{Tc, TcMethod};
use super::{Capacities, NotedBy, ProxyIdentity, Settings, placed};
use redirect_protocol::placement::Placement;

/// Loads and unloads all programs that this kernel may need. Returns their number.
pub fn try_out(tc: TcMethod) -> anyhow::Result<usize> {
    let settings = Settings {
        cgroup: PathBuf::new(),
        host_cookie: 0,
        capacities: Capacities { pods: 1, addresses: 1, exclusions: 1 },
        tc,
        refuse: false,
        link_local: false,
        exclusions: BTreeSet::new(),
        proxy_identity: ProxyIdentity::default(),
        proxy_cgroups: BTreeMap::new(),
        flows: FlowLimits::default(),
        diagnostics: false,
        object: None,
        placement: Placement::Pod,
        rule_priority: 0,
        noted_by: NotedBy::probe()?,
    };
    let mut object = object::load(&settings)?;
    let programs = Programs::load(&mut object, &Placement::ALL.map(placed), settings.noted_by)?;
    Tc::new(&programs, tc, placed(Placement::Pod).hooks())?;
    Ok(programs.iter().count())
}
