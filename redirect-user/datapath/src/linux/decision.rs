//! Computes the kernel side's decision on a connection with the same code and maps.

use std::cell::RefCell;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use redirect_ebpf::decide::{self, Connect, Outbound, Protocol};
use redirect_ebpf::family::{Ip, Ipv4, Ipv6};
use redirect_ebpf::maps::{Pod, PodFlags};
use redirect_ebpf::{Direction, Reason};

use super::Linux;
use super::maps::Maps;
use redirect_protocol::wire::Step;

/// A decision, and the lookups that led to it.
#[derive(Clone, Debug)]
pub struct Decision {
    /// The decision.
    pub outbound: Outbound,
    /// The lookups and their results, in order.
    pub steps: Vec<Step>,
}

impl Linux {
    /// Decides on an application's connection. `None` if the kernel side does not know the pod.
    pub fn decide(
        &self,
        netns_cookie: u64,
        to: SocketAddr,
        protocol: Protocol,
    ) -> anyhow::Result<Option<Decision>> {
        let maps = &self.maps;
        let Some(pod) = maps.pod(netns_cookie)? else { return Ok(None) };
        let asked = Asked { maps, netns_cookie, pod, port: to.port(), protocol };
        match to.ip().to_canonical() {
            IpAddr::V4(address) => {
                asked.decide::<Ipv4>(address.octets(), |octets| Ipv4Addr::from(octets).into())
            }
            IpAddr::V6(address) => {
                asked.decide::<Ipv6>(address.octets(), |octets| Ipv6Addr::from(octets).into())
            }
        }
        .map(Some)
    }
}

struct Asked<'a> {
    maps: &'a Maps,
    netns_cookie: u64,
    pod: Pod,
    port: u16,
    protocol: Protocol,
}

impl Asked<'_> {
    fn decide<I: Ip<Address: Default>>(
        &self,
        destination: I::Address,
        address: impl Fn(I::Address) -> IpAddr,
    ) -> anyhow::Result<Decision> {
        let flags = PodFlags(self.pod.flags);
        let steps = RefCell::new(Vec::new());
        let failed = RefCell::new(None);
        let ask = |question: String, answer: bool| {
            steps.borrow_mut().push(Step { question, answer });
            answer
        };
        ask("the pod is in the kernel's map of pods".into(), true);
        if flags.contains(PodFlags::RELEASED) {
            ask("the pod leaves the mesh".into(), true);
            return Ok(Decision {
                outbound: Outbound::Pass(Reason::OtherTraffic),
                steps: steps.into_inner(),
            });
        }
        if self.port == redirect_ebpf::constants::PORT_DOMAIN {
            ask("the pod's DNS queries go to the proxy".into(), flags.contains(PodFlags::DNS));
        }
        ask("the destination is 127.0.0.1 or ::1".into(), I::is_loopback(destination));
        let connect = Connect {
            protocol: self.protocol,
            destination,
            port: self.port,
            proxy: false,
            source: I::Address::default(),
            flags,
            link_local: self.maps.lets_link_local_pass(),
        };
        let own = |of: I::Address| {
            let owner = self.maps.owner(address(of)).unwrap_or_else(|error| {
                *failed.borrow_mut() = Some(error.into());
                None
            });
            let owned = owner == Some(self.netns_cookie);
            ask(format!("{} is an address of the pod", address(of)), owned)
        };
        let excluded = || {
            let excluded = self.maps.is_excluded(
                self.netns_cookie,
                flags,
                Direction::Outbound,
                address(destination),
                self.port,
            );
            let excluded = excluded.unwrap_or_else(|error| {
                *failed.borrow_mut() = Some(error);
                false
            });
            ask("an exclusion of the node or the pod covers it".into(), excluded)
        };
        let outbound = decide::outbound::<I>(&connect, own, excluded);
        if let Some(error) = failed.into_inner() {
            return Err(error);
        }
        if matches!(outbound, Outbound::Capture | Outbound::Refuse(_) | Outbound::Pass(Reason::LinkScoped)) {
            ask("the destination is link-local (IPv6)".into(), I::is_link_local(destination));
            ask("the destination is a group".into(), I::is_group(destination));
        }
        Ok(Decision { outbound, steps: steps.into_inner() })
    }
}
