//! Listeners inside a pod's namespace: which sockets exist, and their lifetime.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use super::super::Direction;
use super::super::pods::Pods;
use super::super::sockets::Namespaces;
use super::namespace::{Logged, dial, fresh, occupy};
use super::{eventually, expect_reset};
use redirect_linux::netns::NetNs;
use redirect_zds::client::Workloads as _;
use redirect_zds::messages::WorkloadInfo;

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);
const MAPPED: IpAddr = IpAddr::V6(Ipv4Addr::LOCALHOST.to_ipv6_mapped());

const PORTS: [u16; 3] = [15001, 15006, 15053];

fn info() -> WorkloadInfo {
    WorkloadInfo { name: "cart".into(), namespace: "shop".into(), service_account: "cart".into() }
}

async fn add(pods: &mut Pods, uid: &str, netns: &NetNs) -> Result<(), String> {
    pods.add(uid.into(), info(), netns.clone()).await
}

async fn is_refused(namespaces: &Namespaces, netns: &NetNs, port: u16) -> bool {
    let result = dial(namespaces, netns, None, (Ipv4Addr::LOCALHOST, port).into()).await;
    result.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// The ports on which sockets of one family listen in the namespace.
fn listening(netns: &NetNs, table: &str) -> BTreeSet<u16> {
    let path = format!("/proc/thread-self/net/{table}");
    let text = netns.run(|| std::fs::read_to_string(path)).unwrap().unwrap_or_default();
    let listening = |line: &str| {
        let mut words = line.split_whitespace().skip(1);
        let (local, _, state) = (words.next()?, words.next()?, words.next()?);
        let port = u16::from_str_radix(local.rsplit_once(':')?.1, 16).ok()?;
        (state == "0A").then_some(port)
    };
    text.lines().filter_map(listening).collect()
}

#[tokio::test]
async fn listeners_serve_the_families_that_the_pod_has() {
    let both = ("tcp6", vec![V4, V6, MAPPED]);
    let only_v4 = ("tcp", vec![V4]);
    let cases = [
        ("both families", true, true, both),
        ("a pod without IPv6", false, true, only_v4.clone()),
        ("IPv6 switched off", true, false, only_v4),
    ];
    for (case, pod_ipv6, proxy_ipv6, (table, addresses)) in cases {
        let Some(netns) = fresh(&format!("listeners_serve_the_families_that_the_pod_has, {case}"), pod_ipv6)
        else {
            continue;
        };
        let (log, shared) = Logged::start(proxy_ipv6);
        let namespaces = shared.namespaces.clone();
        let mut pods = Pods::new(shared);
        add(&mut pods, "uid-1", &netns).await.unwrap();
        let other = if table == "tcp" { "tcp6" } else { "tcp" };
        assert_eq!(listening(&netns, table), BTreeSet::from(PORTS), "{case}");
        // Only the resolver has one socket per family.
        let resolver = if table == "tcp6" { BTreeSet::from([15053]) } else { BTreeSet::new() };
        assert_eq!(listening(&netns, other), resolver, "{case}");

        let mut expected = Vec::new();
        for direction in [Direction::Outbound, Direction::Inbound] {
            for &ip in &addresses {
                let to = SocketAddr::new(ip, direction.port());
                // Straight to the proxy, which must not dial itself in a loop.
                expect_reset(&mut dial(&namespaces, &netns, None, to).await.unwrap()).await;
                let family = if ip == V6 { "IPv6" } else { "IPv4" };
                let to = SocketAddr::new(ip.to_canonical(), direction.port()).to_string();
                let direction = if direction == Direction::Outbound { "outbound" } else { "inbound" };
                expected.push((direction.to_owned(), family.to_owned(), to));
            }
        }
        pods.drain(Duration::ZERO).await;
        let lines = log.lines();
        let (closed, opened): (Vec<_>, Vec<_>) = lines.iter().partition(|line| line["event"] == "close");
        assert_eq!((opened.len(), closed.len()), (expected.len(), expected.len()), "{case}");
        for (line, expected) in closed.into_iter().zip(expected) {
            let text = |field: &str| line[field].as_str().unwrap().to_owned();
            assert_eq!((text("direction"), text("family"), text("original_destination")), expected, "{case}");
            assert_eq!(
                (text("pod"), text("uid"), text("result")),
                ("shop/cart".into(), "uid-1".into(), "loop".into())
            );
        }
    }
}

#[tokio::test]
async fn a_port_in_use_is_named_and_tried_again() {
    let test = "a_port_in_use_is_named_and_tried_again";
    for (ipv6, squatter) in [
        (true, SocketAddr::from((Ipv6Addr::UNSPECIFIED, 15006))),
        (true, (Ipv4Addr::UNSPECIFIED, 15006).into()),
        (false, (Ipv4Addr::UNSPECIFIED, 15006).into()),
    ] {
        let Some(netns) = fresh(test, ipv6) else { return };
        let (_log, shared) = Logged::start(true);
        let namespaces = shared.namespaces.clone();
        let other = occupy(&namespaces, &netns, squatter).await;
        let mut pods = Pods::new(shared);
        for _ in 0..2 {
            let refusal = add(&mut pods, "uid-1", &netns).await.unwrap_err();
            assert!(refusal.contains("pod shop/cart") && refusal.contains("port 15006"), "{refusal}");
            assert!(refusal.contains("another process listens on it"), "{refusal}");
        }
        assert!(is_refused(&namespaces, &netns, 15001).await, "all listeners or none");
        drop(other);
        eventually("the pod is served", async || !is_refused(&namespaces, &netns, 15001).await).await;
        assert!(!is_refused(&namespaces, &netns, 15006).await);
        assert_eq!(add(&mut pods, "uid-1", &netns).await, Ok(()));
    }
}

#[tokio::test]
async fn pods_come_and_go() {
    let (Some(one), Some(other)) = (fresh("pods_come_and_go", true), fresh("pods_come_and_go", false)) else {
        return;
    };
    let (_log, shared) = Logged::start(true);
    let namespaces = shared.namespaces.clone();
    let refused = async |netns: &NetNs| is_refused(&namespaces, netns, 15001).await;
    let mut pods = Pods::new(shared);
    add(&mut pods, "a", &one).await.unwrap();
    add(&mut pods, "b", &other).await.unwrap();
    add(&mut pods, "a", &one).await.expect("known already");
    assert!(!refused(&one).await && !refused(&other).await);

    pods.remove("a").await;
    pods.remove("unknown").await;
    assert!(refused(&one).await && !refused(&other).await);

    // The agent's new request counts: the pod has another namespace now.
    add(&mut pods, "b", &one).await.unwrap();
    assert!(!refused(&one).await && refused(&other).await);
    pods.retain(&BTreeSet::from(["a".to_owned()])).await;
    assert!(refused(&one).await);
}

#[tokio::test]
async fn two_proxies_share_a_pod_while_one_takes_over() {
    let Some(netns) = fresh("two_proxies_share_a_pod_while_one_takes_over", true) else { return };
    let (_log, shared) = Logged::start(true);
    let namespaces = shared.namespaces.clone();
    let (mut old, mut new) = (Pods::new(shared.clone()), Pods::new(shared));
    add(&mut old, "a", &netns).await.unwrap();
    add(&mut new, "a", &netns).await.unwrap();
    old.drain(Duration::ZERO).await;
    for port in PORTS {
        assert!(!is_refused(&namespaces, &netns, port).await);
    }
    new.remove("a").await;
    assert!(is_refused(&namespaces, &netns, 15001).await);
}

#[tokio::test]
async fn what_is_no_namespace_is_refused() {
    let (_log, shared) = Logged::start(true);
    let file = NetNs::from_fd(tempfile::tempfile().unwrap().into());
    let refusal = add(&mut Pods::new(shared), "a", &file).await.unwrap_err();
    assert!(refusal.contains("pod shop/cart: its network namespace cannot be entered"), "{refusal}");
}

#[tokio::test]
async fn an_ended_pod_leaves_its_namespace() {
    let Some(netns) = fresh("an_ended_pod_leaves_its_namespace", true) else { return };
    let (_log, shared) = Logged::start(true);
    let namespaces = shared.namespaces.clone();
    let mut pods = Pods::new(shared);
    add(&mut pods, "a", &netns).await.unwrap();
    let home = NetNs::current().unwrap();
    // The thread last entered the pod's namespace; it must leave by itself.
    let last = namespaces.socket(&netns, socket2::Domain::IPV4, socket2::Type::STREAM).await.unwrap();
    drop(last);
    let inode = netns.inode().unwrap();
    assert_ne!(home.inode().unwrap(), inode);
    eventually("every thread is back", async || {
        let threads = std::fs::read_dir("/proc/self/task").unwrap();
        let inside = |thread: std::fs::DirEntry| {
            let link = std::fs::read_link(thread.path().join("ns/net"));
            link.is_ok_and(|link| link.to_string_lossy() == format!("net:[{inode}]"))
        };
        !threads.filter_map(Result::ok).any(inside)
    })
    .await;
}
