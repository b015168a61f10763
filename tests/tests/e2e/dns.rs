//! DNS queries of enrolled pods go to the proxy's resolver, and applications see the servers that they queried.

mod capturing;
mod resolvers;
mod sockets;

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hickory_proto::rr::RecordType;
use libtest_mimic::Trial;
use redirect_ebpf::Family;
use redirect_tests::access_log::DnsEntry;
use redirect_tests::dns::{DnsServer, PORT, check_answer, question};
use redirect_tests::wait::{self, SOON};
use redirect_tests::{Families, Node, Pod, ProxyKind, Stack};
use socket2::{Socket, Type};

use redirect_protocol::placement::Placement;

use crate::context::Context;

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    [sockets::trials(context), capturing::trials(context), resolvers::trials(context)]
        .into_iter()
        .flatten()
        .collect()
}

/// A pod that sends queries, a server that it queries, and the proxy's upstream server.
struct Scene {
    stack: Stack,
    pod: Pod,
    upstream: Arc<DnsServer>,
    asked: DnsServer,
    /// The pod with the queried server.
    other: Pod,
}

impl Scene {
    fn new(node: &Arc<Node>, families: Families, stack: Stack) -> Result<Self> {
        let other = node.plain("server", Families::Dual)?;
        let asked = DnsServer::everywhere(other.netns())?;
        Ok(Self { stack, pod: node.enrolled("client", families)?, upstream: node.dns()?, asked, other })
    }

    /// The queried server's address.
    fn server(&self) -> Result<SocketAddr> {
        self.other.endpoint(self.stack.family(), PORT)
    }

    /// Three addresses: the queried server's, the gateway's, and one without a host (and without neighbor lookups).
    fn servers(&self) -> Result<[SocketAddr; 3]> {
        let node = self.pod.node();
        let nobody = match self.stack.family() {
            Family::Ipv4 => IpAddr::from([198, 51, 100, 53]),
            Family::Ipv6 => IpAddr::from([0x2001, 0xdb8, 0x53, 0, 0, 0, 0, 0x53]),
        };
        let at = |address| SocketAddr::new(address, PORT);
        Ok([self.server()?, at(node.gateway(self.stack.family())), at(nobody)])
    }

    /// A UDP socket of the pod.
    fn socket(&self) -> Result<UdpSocket> {
        let socket = self.pod.netns().run(|| Socket::new(self.stack.domain(), Type::DGRAM, None))??;
        socket.set_read_timeout(Some(wait::patient(SOON)))?;
        Ok(socket.into())
    }

    /// An address as the pod's sockets spell it.
    fn spell(&self, address: SocketAddr) -> SocketAddr {
        self.stack.spell(address)
    }

    /// Checks that the query was answered through the proxy only.
    fn was_resolved(&self, name: &str, transport: &str) -> Result<DnsEntry> {
        let pod = self.pod.identity().to_string();
        let entry = wait::until("access log entry of the question", SOON, || {
            let mut questions = self.pod.node().access_log().questions()?.into_iter();
            Ok(questions.find(|entry| entry.pod == pod && is_name(entry, name)))
        })?;
        ensure!(entry.uid == self.pod.identity().uid, "{entry:?}");
        if self.pod.node().session().binaries().kind == ProxyKind::Embedded {
            ensure!(entry.family.as_deref() == Some(self.stack.family().name()), "{entry:?}");
            ensure!(entry.transport.as_deref() == Some(transport), "{entry:?}");
            ensure!(entry.upstream.is_some(), "{entry:?}");
        }
        let heard = self.upstream.heard_of(name);
        ensure!(!heard.is_empty(), "the proxy's server heard nothing of {name}");
        let from_pod = heard.iter().all(|heard| self.pod.addresses().contains(&heard.from.ip()));
        let in_pod = self.pod.node().session().placement() == Placement::Pod;
        ensure!(from_pod == in_pod, "the proxy asks from where it is, not so: {heard:?}");
        self.server_heard_nothing()?;
        Ok(entry)
    }

    /// Checks that no query bypassed the proxy.
    fn server_heard_nothing(&self) -> Result<()> {
        ensure!(self.asked.heard().is_empty(), "the asked server heard {:?}", self.asked.heard());
        Ok(())
    }
}

fn is_name(entry: &DnsEntry, name: &str) -> bool {
    entry.name.as_deref().is_some_and(|found| found.eq_ignore_ascii_case(name))
}

/// A name that no other test queries.
fn fresh_name(label: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{label}-{}.test.", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A query for a name that no other test uses.
fn fresh_question(label: &str) -> Result<(String, Vec<u8>)> {
    let name = fresh_name(label);
    let bytes = question(&name, RecordType::A)?;
    Ok((name, bytes))
}

/// Waits for an answer and returns its sender.
fn answer_to(question: &[u8], socket: &UdpSocket) -> Result<SocketAddr> {
    let mut buffer = [0; 4096];
    loop {
        match socket.recv_from(&mut buffer) {
            // The kernel does not restart calls on sockets with a timeout.
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            received => {
                let (length, from) = received.context("no answer")?;
                check_answer(question, &buffer[..length])?;
                return Ok(from);
            }
        }
    }
}

/// The error of a socket that receives nothing.
fn no_answer(socket: &UdpSocket) -> Result<ErrorKind> {
    loop {
        match socket.recv(&mut [0; 512]).map_err(|error| error.kind()) {
            // The kernel does not restart calls on sockets with a timeout.
            Err(ErrorKind::Interrupted) => {}
            received => return received.err().context("an answer without a proxy"),
        }
    }
}

/// How long to wait for something that must not arrive.
const A_WHILE: Duration = Duration::from_millis(300);
