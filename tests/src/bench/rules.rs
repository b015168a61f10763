//! The iptables and nftables rules that a mesh's agent writes into a pod to redirect its traffic, as Istio ambient does:
//! the same ports, marks and exceptions.
//!
//! | traffic | what becomes of it |
//! |---|---|
//! | TCP from an application, not to loopback, not through `lo` | REDIRECT to 15001 |
//! | DNS from an application | REDIRECT to 15053 |
//! | TCP from elsewhere, not to 15008 | REDIRECT to 15006 |
//! | the host's probes, by the address that the agent gives them as their source | left alone |
//! | deliveries (mark `0x539` that arrives on `lo`) | their connections are marked `0x111`, so that replies return by `lo` |

use std::process::Command;

use anyhow::{Context, Result};
use clap::ValueEnum;
use redirect_ebpf::Family;
use serde::{Deserialize, Serialize};

use crate::netns::Netns;

/// The table of the route by which replies to deliveries return.
const TABLE: u32 = 100;

/// How the rules are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Netfilter {
    /// iptables and ip6tables.
    Iptables,
    /// nftables.
    Nft,
}

impl Netfilter {
    /// Writes netfilter rules, routing rules and routes, as an agent does for each pod: two runs of iptables-restore or
    /// one of nft, and two of ip.
    pub fn apply(self, netns: &Netns) -> Result<()> {
        match self {
            Self::Iptables => {
                for family in Family::ALL {
                    let mut restore = Command::new(program(family, "restore"));
                    restore.args(["--noflush", "--wait"]);
                    netns.output(restore, iptables(family).as_bytes())?;
                }
            }
            Self::Nft => nft(netns, &nftables())?,
        }
        routes(netns, "add")
    }

    /// Makes new connections skip the rules. Connections that were redirected before continue, and would break
    /// without the rules: their addresses are translated for as long as the table exists.
    pub fn retire(self, netns: &Netns) -> Result<()> {
        match self {
            Self::Iptables => {
                for family in Family::ALL {
                    let mut restore = Command::new(program(family, "restore"));
                    restore.args(["--noflush", "--wait"]);
                    netns.output(restore, b"*nat\n-I PREROUTING -j ACCEPT\n-I OUTPUT -j ACCEPT\nCOMMIT\n")?;
                }
                Ok(())
            }
            Self::Nft => {
                nft(netns, "insert rule inet mesh inbound accept\ninsert rule inet mesh outbound accept\n")
            }
        }
    }

    /// Removes them.
    pub fn remove(self, netns: &Netns) -> Result<()> {
        match self {
            Self::Iptables => {
                for family in Family::ALL {
                    let mut restore = Command::new(program(family, "restore"));
                    restore.arg("--wait");
                    netns.output(restore, b"*mangle\nCOMMIT\n*nat\nCOMMIT\n")?;
                }
            }
            Self::Nft => nft(netns, "delete table inet mesh\n")?,
        }
        routes(netns, "delete")
    }

    /// The number of redirected connections so far to a port of the proxy, in a family.
    pub fn redirected(self, netns: &Netns, family: Family, port: u16) -> Result<u64> {
        match self {
            Self::Iptables => {
                let mut save = Command::new(program(family, "save"));
                save.args(["--counters", "--table", "nat"]);
                let listing = String::from_utf8(netns.output(save, b"")?)?;
                counted(&listing, &format!("--to-ports {port}"))
            }
            Self::Nft => {
                let listing = netns.output(listing(), b"")?;
                let (loopback, _) = exceptions(family);
                let loopback = loopback.split('/').next().unwrap_or(loopback);
                let listing = String::from_utf8(listing)?;
                counted_by_nft(&listing, &format!(" {loopback} "), &format!("redirect to :{port}"))
            }
        }
    }
}

fn listing() -> Command {
    let mut command = Command::new("nft");
    command.args(["list", "table", "inet", "mesh"]);
    command
}

fn nft(netns: &Netns, text: &str) -> Result<()> {
    let mut command = Command::new("nft");
    command.args(["-f", "-"]);
    netns.output(command, text.as_bytes()).map(drop)
}

fn routes(netns: &Netns, verb: &str) -> Result<()> {
    for (family, everything) in [("-4", "0.0.0.0/0"), ("-6", "::/0")] {
        let mut command = Command::new("ip");
        command.args([family, "-batch", "-"]);
        let lines = [
            format!("rule {verb} fwmark 0x111/0xfff priority 32764 lookup {TABLE}"),
            format!("route {verb} local {everything} dev lo table {TABLE}"),
        ];
        netns.output(command, lines.join("\n").as_bytes())?;
    }
    Ok(())
}

fn program(family: Family, what: &str) -> String {
    match family {
        Family::Ipv4 => format!("iptables-{what}"),
        Family::Ipv6 => format!("ip6tables-{what}"),
    }
}

/// Loopback, and the source of the host's probes.
fn exceptions(family: Family) -> (&'static str, &'static str) {
    match family {
        Family::Ipv4 => ("127.0.0.1/32", "169.254.7.127/32"),
        Family::Ipv6 => ("::1/128", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff/128"),
    }
}

/// The rules of a family, for iptables-restore.
#[must_use]
pub fn iptables(family: Family) -> String {
    let (loopback, probes) = exceptions(family);
    format!(
        "*mangle\n\
         :MESH_IN - [0:0]\n\
         :MESH_OUT - [0:0]\n\
         -A PREROUTING -j MESH_IN\n\
         -A OUTPUT -j MESH_OUT\n\
         -A MESH_IN -m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff\n\
         -A MESH_OUT -m connmark --mark 0x111/0xfff -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff\n\
         COMMIT\n\
         *nat\n\
         :MESH_IN - [0:0]\n\
         :MESH_OUT - [0:0]\n\
         -A PREROUTING -j MESH_IN\n\
         -A OUTPUT -j MESH_OUT\n\
         -A MESH_IN -s {probes} -p tcp -j ACCEPT\n\
         -A MESH_IN ! -d {loopback} -p tcp -m tcp ! --dport 15008 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15006\n\
         -A MESH_OUT -d {probes} -p tcp -j ACCEPT\n\
         -A MESH_OUT ! -o lo -p udp -m udp --dport 53 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15053\n\
         -A MESH_OUT ! -d {loopback} -p tcp -m tcp --dport 53 -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15053\n\
         -A MESH_OUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT\n\
         -A MESH_OUT ! -d {loopback} -o lo -j ACCEPT\n\
         -A MESH_OUT ! -d {loopback} -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001\n\
         COMMIT\n"
    )
}

/// The rules of both families for nft, with counters.
#[must_use]
pub fn nftables() -> String {
    let per_family = |rule: &dyn Fn(&str, &str, &str, &str) -> String| -> String {
        Family::ALL
            .into_iter()
            .map(|family| {
                let (loopback, probes) = exceptions(family);
                let (match_family, ip) = match family {
                    Family::Ipv4 => ("meta nfproto ipv4", "ip"),
                    Family::Ipv6 => ("meta nfproto ipv6", "ip6"),
                };
                rule(match_family, ip, loopback, probes)
            })
            .collect()
    };
    let inbound = per_family(&|family, ip, loopback, probes| {
        format!(
            "  {ip} saddr {probes} meta l4proto tcp accept\n\
             \x20 {family} {ip} daddr != {loopback} tcp dport != 15008 meta mark & 0xfff != 0x539 counter redirect to :15006\n"
        )
    });
    let outbound = per_family(&|family, ip, loopback, probes| {
        format!(
            "  {ip} daddr {probes} meta l4proto tcp accept\n\
             \x20 {family} oifname != lo udp dport 53 meta mark & 0xfff != 0x539 counter redirect to :15053\n\
             \x20 {family} {ip} daddr != {loopback} tcp dport 53 meta mark & 0xfff != 0x539 counter redirect to :15053\n\
             \x20 {family} meta l4proto tcp meta mark & 0xfff == 0x111 accept\n\
             \x20 {family} {ip} daddr != {loopback} oifname lo accept\n\
             \x20 {family} {ip} daddr != {loopback} meta l4proto tcp meta mark & 0xfff != 0x539 counter redirect to :15001\n"
        )
    });
    format!(
        "table inet mesh {{\n\
         \x20chain mark_in {{\n  type filter hook prerouting priority mangle; policy accept;\n\
         \x20 meta mark & 0xfff == 0x539 ct mark set ct mark & 0xfffff000 | 0x111\n }}\n\
         \x20chain mark_out {{\n  type route hook output priority mangle; policy accept;\n\
         \x20 ct mark & 0xfff == 0x111 meta mark set ct mark\n }}\n\
         \x20chain inbound {{\n  type nat hook prerouting priority dstnat; policy accept;\n{inbound} }}\n\
         \x20chain outbound {{\n  type nat hook output priority -100; policy accept;\n{outbound} }}\n\
         }}\n"
    )
}

/// Packets counted by the rules of a listing of iptables-save (`[packets:bytes] -A …`) that contain a text.
fn counted(listing: &str, rule: &str) -> Result<u64> {
    let found = listing.lines().find(|line| line.contains(rule));
    let found = found.with_context(|| format!("no rule with {rule} in:\n{listing}"))?;
    let packets = found.strip_prefix('[').and_then(|rest| rest.split_once(':'));
    let (packets, _) = packets.with_context(|| format!("no counter: {found}"))?;
    Ok(packets.parse()?)
}

/// The same of a listing of nft (`… counter packets N bytes M …`).
fn counted_by_nft(listing: &str, loopback: &str, rule: &str) -> Result<u64> {
    let found = listing.lines().find(|line| line.contains(loopback) && line.contains(rule));
    let found = found.with_context(|| format!("no rule with {loopback} and {rule} in:\n{listing}"))?;
    let (_, packets) =
        found.split_once("counter packets ").with_context(|| format!("no counter: {found}"))?;
    Ok(packets.split(' ').next().unwrap_or_default().parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_families_have_the_same_rules() {
        let [ipv4, ipv6] = Family::ALL.map(|family| {
            let (loopback, probes) = exceptions(family);
            iptables(family).replace(loopback, "LOOPBACK").replace(probes, "PROBES")
        });
        assert_eq!(ipv4, ipv6);
    }

    #[test]
    fn counters_are_read() {
        let listing = "*nat\n:MESH_OUT - [0:0]\n[12:720] -A MESH_OUT -j REDIRECT --to-ports 15053\n\
                       [7:420] -A MESH_OUT -p tcp -j REDIRECT --to-ports 15001\nCOMMIT\n";
        assert_eq!(counted(listing, "--to-ports 15001").expect("a counter"), 7);
        assert!(counted(listing, "--to-ports 15006").is_err());
        let listing = "  ip daddr != 127.0.0.1 counter packets 3 bytes 180 redirect to :15001\n\
                       \x20 ip6 daddr != ::1 counter packets 5 bytes 400 redirect to :15001\n";
        let count = |loopback| counted_by_nft(listing, loopback, "redirect to :15001");
        assert_eq!(count(" 127.0.0.1 ").expect("a counter"), 3);
        assert_eq!(count(" ::1 ").expect("a counter"), 5);
        assert!(count(" ::2 ").is_err());
    }
}
