//! TC programs on the interfaces of pods, as clsact filters or as tcx links.
//!
//! A tcx link (Linux 6.6) is the more robust attachment: nobody but its holder can remove it. But the kernel waits for an
//! RCU grace period under the rtnl lock whenever one is made or removed: 8 to 16 ms each, which nobody on the node can
//! make or change a device in. A pod needs four. A clsact filter takes some 50 µs and is what the agent uses unless it is
//! told otherwise (`--tc tcx`).

use std::collections::{HashMap, HashSet};

use anyhow::Context as _;
use aya::Ebpf;
use aya::programs::links::{Link as _, LinkOrder};
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType, tc};
use nix::sched::{CloneFlags, unshare};
use redirect_ebpf::Family;

use super::super::facts::{Fact, Hook, Interface};
use super::object::program;

pub(super) struct Tc {
    method: TcMethod,
    links: HashMap<Place, SchedClassifierLink>,
    /// The clsact qdiscs that we made, by namespace cookie and interface.
    qdiscs: HashSet<(u64, u32)>,
}

/// How TC programs are attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum TcMethod {
    /// Filters of a clsact qdisc.
    #[default]
    Clsact,
    /// tcx links. Needs Linux 6.6.
    Tcx,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Place {
    netns_cookie: u64,
    interface: u32,
    hook: Hook,
}

impl Tc {
    pub(super) fn load(programs: &mut Ebpf, method: TcMethod) -> anyhow::Result<Self> {
        for hook in Hook::ALL {
            let program: &mut SchedClassifier = program(programs, hook.program())?;
            program.load().with_context(|| format!("the kernel refuses program {}", hook.program()))?;
        }
        probe(programs, method)?;
        Ok(Self { method, links: HashMap::new(), qdiscs: HashSet::new() })
    }

    pub(super) fn uses_links(&self) -> bool {
        self.method == TcMethod::Tcx
    }

    /// How many times a program is attached.
    pub(super) fn attached(&self, hook: Hook) -> usize {
        self.links.keys().filter(|place| place.hook == hook).count()
    }

    /// In the namespace of the pod.
    pub(super) fn attach(
        &mut self,
        programs: &mut Ebpf,
        netns_cookie: u64,
        interface: &Interface,
        hook: Hook,
    ) -> anyhow::Result<()> {
        let program: &mut SchedClassifier = program(programs, hook.program())?;
        if self.method == TcMethod::Clsact && add_qdisc(&interface.name)? {
            self.qdiscs.insert((netns_cookie, interface.index));
        }
        let link = attach(program, &interface.name, hook, self.method)?;
        self.links.insert(Place { netns_cookie, interface: interface.index, hook }, link);
        Ok(())
    }

    /// In the namespace of the pod. Returns whether the interface is left with a clsact qdisc that we made and that no
    /// program of ours needs any more.
    pub(super) fn detach(&mut self, netns_cookie: u64, interface: u32, hook: Hook) -> anyhow::Result<bool> {
        if let Some(link) = self.links.remove(&Place { netns_cookie, interface, hook }) {
            link.detach()?;
        }
        let used =
            self.links.keys().any(|place| place.netns_cookie == netns_cookie && place.interface == interface);
        Ok(!used && self.qdiscs.remove(&(netns_cookie, interface)))
    }

    /// The attachments in a namespace, on interfaces that still exist.
    pub(super) fn facts(&mut self, netns_cookie: u64, interfaces: &[Interface]) -> Vec<Fact> {
        self.links.retain(|place, _| {
            place.netns_cookie != netns_cookie
                || interfaces.iter().any(|found| found.index == place.interface)
        });
        let place = |interface: &Interface, hook| Place { netns_cookie, interface: interface.index, hook };
        interfaces
            .iter()
            .flat_map(|interface| Hook::ALL.map(|hook| (interface, hook)))
            .filter(|(interface, hook)| self.links.contains_key(&place(interface, *hook)))
            .map(|(interface, hook)| match hook {
                Hook::Egress(family) => Fact::Guard { interface: interface.clone(), family },
                Hook::Loopback(_) | Hook::Inbound(_) | Hook::Virtual(_) => {
                    Fact::Program { interface: interface.clone(), hook }
                }
            })
            .collect()
    }
}

/// Finds out by trying, in a namespace of its own, whether the kernel can do it.
fn probe(programs: &mut Ebpf, method: TcMethod) -> anyhow::Result<()> {
    let hook = Hook::Loopback(Family::Ipv4);
    let program: &mut SchedClassifier = program(programs, hook.program())?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("a network namespace for probing can't be made")?;
            match method {
                TcMethod::Tcx => attach(program, "lo", hook, method)
                    .context("this kernel has no tcx links (Linux 6.6): use --tc clsact"),
                TcMethod::Clsact => {
                    add_qdisc("lo").and_then(|_| attach(program, "lo", hook, method)).context(
                        "this kernel can't attach TC programs: it needs cls_bpf and sch_ingress (clsact)",
                    )
                }
            }
            .map(drop)
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Returns whether there was none before.
fn add_qdisc(interface: &str) -> anyhow::Result<bool> {
    match tc::qdisc_add_clsact(interface) {
        Ok(()) => Ok(true),
        Err(TcError::AlreadyAttached) => Ok(false),
        Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        Err(error) => Err(error).with_context(|| format!("clsact qdisc on {interface}")),
    }
}

/// Attaches to an interface of the calling thread's namespace.
fn attach(
    program: &mut SchedClassifier,
    interface: &str,
    hook: Hook,
    method: TcMethod,
) -> anyhow::Result<SchedClassifierLink> {
    let options = match method {
        TcMethod::Tcx => TcAttachOptions::TcxOrder(LinkOrder::default()),
        TcMethod::Clsact => {
            // Two filters of one priority have to be of one protocol; ours look at the family themselves.
            let (Hook::Loopback(family)
            | Hook::Inbound(family)
            | Hook::Virtual(family)
            | Hook::Egress(family)) = hook;
            let priority = match family {
                Family::Ipv4 => 1,
                Family::Ipv6 => 2,
            };
            TcAttachOptions::Netlink(NlOptions { priority, ..NlOptions::default() })
        }
    };
    let side = match hook {
        Hook::Loopback(_) | Hook::Inbound(_) | Hook::Virtual(_) => TcAttachType::Ingress,
        Hook::Egress(_) => TcAttachType::Egress,
    };
    let link: Result<_, ProgramError> = (|| {
        let id = program.attach_with_options(interface, side, options)?;
        program.take_link(id)
    })();
    link.with_context(|| format!("{} on {interface}", hook.program()))
}
