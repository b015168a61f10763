//! The rules of an enrolled pod.

use std::io;
use std::net::{IpAddr, Ipv4Addr};

use redirect_ebpf::Family;
use redirect_ebpf::constants::{
    MARK_CAPTURE, MARK_DELIVERY, REPLY_TABLE, ROUTE_TABLE, RULE_PRIORITY_CAPTURE, RULE_PRIORITY_DELIVERY,
    RULE_PRIORITY_REFUSE, RULE_PRIORITY_SOURCE,
};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};

use super::raw::{self, Raw};
use super::{Netlink, rule_of};

/// One of our rules. Added in this order, no rule ever lacks one that it relies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rule {
    /// `fwmark DELIVERY`: replies to the proxy's deliveries.
    Delivery,
    /// `from 0.0.0.0 fwmark CAPTURE goto` past [`Rule::Capture`]. The kernel routes an IPv4 connection without a source
    /// twice: first to choose the source, then with it. The first time, the pod's own routes decide or refuse.
    Source,
    /// `fwmark CAPTURE unreachable`, after [`Rule::Capture`]. The kernel routes an IPv6 connection once, so its source comes from
    /// our mirror of the pod's routes. Where the pod has no route, the connection must not leave past the proxy.
    Refuse,
    /// `fwmark CAPTURE lookup ROUTE_TABLE`: captured connections.
    Capture,
    /// The IPv6 form of [`Rule::Delivery`] in builds with one table. The agent removes it.
    FormerDelivery,
}

impl Rule {
    /// The rules of a family.
    #[must_use]
    pub const fn of(family: Family) -> [Self; 3] {
        match family {
            Family::Ipv4 => [Self::Delivery, Self::Source, Self::Capture],
            Family::Ipv6 => [Self::Delivery, Self::Refuse, Self::Capture],
        }
    }

    /// The rules of a family, and those of other builds.
    fn known(family: Family) -> impl Iterator<Item = Self> {
        Self::of(family).into_iter().chain((family == Family::Ipv6).then_some(Self::FormerDelivery))
    }

    fn message(self, family: Family) -> RuleMessage {
        let delivery = |table| rule_of(family, MARK_DELIVERY, RULE_PRIORITY_DELIVERY, table);
        let capture = |priority| rule_of(family, MARK_CAPTURE, priority, ROUTE_TABLE);
        match (self, family) {
            (Self::Delivery, Family::Ipv6) => delivery(REPLY_TABLE),
            (Self::Delivery, Family::Ipv4) | (Self::FormerDelivery, _) => delivery(ROUTE_TABLE),
            (Self::Capture, _) => capture(RULE_PRIORITY_CAPTURE),
            (Self::Source, _) => {
                let mut rule = capture(RULE_PRIORITY_SOURCE);
                rule.header.action = RuleAction::Goto;
                rule.header.src_len = Ipv4Addr::BITS as u8;
                rule.attributes.retain(|attribute| !matches!(attribute, RuleAttribute::Table(_)));
                rule.attributes.extend([
                    RuleAttribute::Source(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
                    RuleAttribute::Goto(RULE_PRIORITY_DELIVERY),
                ]);
                rule
            }
            (Self::Refuse, _) => {
                let mut rule = capture(RULE_PRIORITY_REFUSE);
                rule.header.action = RuleAction::Unreachable;
                rule.attributes.retain(|attribute| !matches!(attribute, RuleAttribute::Table(_)));
                rule
            }
        }
    }

    /// Whether it is in the kernel's list.
    fn is_among(self, family: Family, all: &[Raw]) -> bool {
        // `struct fib_rule_hdr`, and the numbers of attributes.
        const SIZE: usize = 12;
        const SOURCE_LENGTH: usize = 2;
        const ACTION: usize = 7;
        const GOTO: u16 = 4;
        const PRIORITY: u16 = 6;
        const FWMARK: u16 = 10;
        const TABLE: u16 = 15;
        const FWMASK: u16 = 16;
        let wanted = self.message(family);
        all.iter().any(|found| {
            let same = |kind: u16, number: u32| {
                found.attributes(SIZE).any(|is| is.kind() == kind && raw::word(is.value()) == Some(number))
            };
            found.byte(ACTION) == u8::from(wanted.header.action)
                && found.byte(SOURCE_LENGTH) == wanted.header.src_len
                && wanted.attributes.iter().all(|attribute| match *attribute {
                    RuleAttribute::Priority(priority) => same(PRIORITY, priority),
                    RuleAttribute::FwMark(mark) => same(FWMARK, mark),
                    RuleAttribute::FwMask(mask) => same(FWMASK, mask),
                    RuleAttribute::Table(table) => same(TABLE, table),
                    RuleAttribute::Goto(priority) => same(GOTO, priority),
                    // The remaining attributes identify the rule as ours.
                    _ => true,
                })
        })
    }
}

impl Netlink {
    /// Our rules.
    pub fn rules(&mut self, family: Family) -> io::Result<Vec<Rule>> {
        let mut any = RuleMessage::default();
        any.header.family = super::address_family(family);
        let all = self.settled_list(RouteNetlinkMessage::GetRule(any), libc::RTM_NEWRULE)?;
        Ok(Rule::known(family).filter(|rule| rule.is_among(family, &all)).collect())
    }

    /// Adds one of our rules.
    pub fn add_rule(&mut self, family: Family, rule: Rule) -> io::Result<()> {
        self.change(RouteNetlinkMessage::NewRule(rule.message(family)), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Deletes one of our rules. A missing rule is no error.
    pub fn delete_rule(&mut self, family: Family, rule: Rule) -> io::Result<()> {
        match self.change(RouteNetlinkMessage::DelRule(rule.message(family)), 0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::sched::{CloneFlags, unshare};
    use redirect_testing::skip;

    use super::*;

    /// The kernel lists many rules in several packets and resumes by counting: if rules that it has listed are deleted meanwhile,
    /// it skips as many others.
    #[test]
    fn our_rules_are_found_although_others_go_meanwhile() {
        const OTHERS: u32 = 1000;
        if unshare(CloneFlags::CLONE_NEWNET).is_err() {
            return skip("our_rules_are_found_although_others_go_meanwhile", "needs root");
        }
        for family in Family::ALL {
            let mut netlink = Netlink::open().unwrap();
            let other = move |number| rule_of(family, number, number, ROUTE_TABLE);
            for number in 1..=OTHERS {
                netlink.change(RouteNetlinkMessage::NewRule(other(number)), NLM_F_CREATE).unwrap();
            }
            for rule in Rule::of(family) {
                netlink.add_rule(family, rule).unwrap();
            }
            let mut changes = Netlink::open().unwrap();
            netlink.0.after_first_packet(move || {
                for number in 1..=OTHERS {
                    changes.change(RouteNetlinkMessage::DelRule(other(number)), 0).unwrap();
                }
            });
            assert_eq!(netlink.rules(family).unwrap(), Rule::of(family), "{family}");
            for rule in Rule::of(family) {
                netlink.delete_rule(family, rule).unwrap();
            }
            assert_eq!(netlink.rules(family).unwrap(), [], "{family}");
        }
    }

    #[test]
    fn the_rule_of_a_former_build_is_found_beside_ours() {
        if unshare(CloneFlags::CLONE_NEWNET).is_err() {
            return skip("the_rule_of_a_former_build_is_found_beside_ours", "needs root");
        }
        let mut netlink = Netlink::open().unwrap();
        for rule in [Rule::FormerDelivery, Rule::Delivery] {
            netlink.add_rule(Family::Ipv6, rule).unwrap();
        }
        let both = [Rule::Delivery, Rule::FormerDelivery];
        assert_eq!(netlink.rules(Family::Ipv6).unwrap(), both);
        for (gone, left) in [(both[1], both[0]), (both[0], both[1])] {
            netlink.delete_rule(Family::Ipv6, gone).unwrap();
            assert_eq!(netlink.rules(Family::Ipv6).unwrap(), [left]);
            netlink.add_rule(Family::Ipv6, gone).unwrap();
        }
    }
}
