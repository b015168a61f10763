//! One pod's DNS resolver, on port 15053 of the loopback addresses, to which the kernel side sends the pod's queries. In
//! placement `node` it is the resolver of all pods, on every address of the host and of others.
//!
//! It only forwards: a query goes unchanged to the upstream servers, from the pod's namespace and with the proxy's mark,
//! and the answer comes back unchanged. There is no cache and no recursion. Every query that can be parsed is answered,
//! with an error if need be: the application must not wait for a resolver that has given up.
//!
//! | file | |
//! |---|---|
//! | `datagrams` | questions and answers over UDP |
//! | `message` | what has to be known of a message. Pure |
//! | `upstreams` | which servers are asked |
//! | `exchange` | one question to one upstream server |

mod datagrams;
mod exchange;
mod message;
mod upstreams;

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hickory_proto::op::ResponseCode;
use redirect_ebpf::constants::PORT_DNS;
use socket2::{Domain, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::Transport;
use super::access_log::{DnsLine, Line};
use super::context::Context;
use super::quotas::{Asker, Quotas};
use super::sockets::{self, OpenError};
use datagrams::Datagrams;
use message::{Answer, Question, Received};
use redirect_protocol::placement::Placement;

pub(super) use upstreams::{Upstreams, parse_upstream};

/// How many queries of one pod may wait for an upstream server at once. Further ones are answered with an
/// error.
const IN_FLIGHT: usize = 256;

/// The same for all pods of the node together, in placement `node`.
const IN_FLIGHT_ON_NODE: usize = 4096;

/// How many TCP connections of one pod may be open at once. In placement `pod` further ones wait to be accepted; in placement
/// `node` they are closed, because they would delay those of other pods.
const CONNECTIONS: usize = 64;

/// The same for all pods of the node together, in placement `node`. Further ones wait to be accepted.
const CONNECTIONS_ON_NODE: usize = 1024;

/// The longest query over UDP: a name and EDNS with its options need far less.
const LONGEST_DATAGRAM: usize = 4096;

/// How long a TCP connection may be silent, or not take its answer.
const IDLE: Duration = Duration::from_secs(10);

/// The pause before the next receive or accept after the kernel refused one.
const PAUSE: Duration = Duration::from_millis(50);

/// The sockets of a pod's resolver.
#[derive(Debug)]
pub(super) struct Resolver {
    datagrams: Vec<Datagrams>,
    listeners: Vec<TcpListener>,
}

impl Resolver {
    /// Opens the sockets in the pod's namespace.
    pub(super) async fn open(context: &Context, ipv6: bool) -> Result<Self, OpenError> {
        let (ipv4, v6) = match context.shared.placement {
            Placement::Pod => (Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST),
            Placement::Node => (Ipv4Addr::UNSPECIFIED, Ipv6Addr::UNSPECIFIED),
        };
        let mut addresses = vec![SocketAddr::from((ipv4, PORT_DNS))];
        if ipv6 {
            addresses.push((v6, PORT_DNS).into());
        }
        let mut resolver = Self { datagrams: Vec::new(), listeners: Vec::new() };
        for address in addresses {
            match resolver.open_at(context, address).await {
                // A pod may have removed the address from its lo: it then has no resolver in this family.
                Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => tracing::warn!(
                    "pod {}: no DNS over {}: the pod's lo lacks {}",
                    context.identity.name,
                    if address.is_ipv4() { "IPv4" } else { "IPv6" },
                    address.ip()
                ),
                opened => opened.map_err(|error| OpenError::of(PORT_DNS, error))?,
            }
        }
        Ok(resolver)
    }

    async fn open_at(&mut self, context: &Context, address: SocketAddr) -> io::Result<()> {
        let namespaces = &context.shared.namespaces;
        let domain = Domain::for_address(address);
        let socket = namespaces.socket(&context.netns, domain, Type::DGRAM).await?;
        sockets::bind_resolver(&socket, address)?;
        self.datagrams.push(Datagrams::new(socket, address)?);
        let socket = namespaces.socket(&context.netns, domain, Type::STREAM).await?;
        sockets::bind_resolver(&socket, address)?;
        sockets::start_listening(&socket)?;
        self.listeners.push(TcpListener::from_std(socket.into())?);
        Ok(())
    }

    /// Answers until dropped, which cancels queries in flight.
    ///
    /// There is no draining: as long as a socket exists, the kernel gives it queries that should go to the proxy that
    /// takes over.
    pub(super) async fn serve(self, context: Arc<Context>) {
        let (in_flight, connections) = match context.shared.placement {
            Placement::Pod => (IN_FLIGHT, CONNECTIONS),
            Placement::Node => (IN_FLIGHT_ON_NODE, CONNECTIONS_ON_NODE),
        };
        let desk = Arc::new(Desk {
            context,
            in_flight: Semaphore::new(in_flight),
            questions: Quotas::new(IN_FLIGHT),
            warned: AtomicBool::new(false),
        });
        let mut tasks = JoinSet::new();
        for socket in self.datagrams {
            tasks.spawn(answer_datagrams(Arc::clone(&desk), Arc::new(socket)));
        }
        let places = Places { all: Arc::new(Semaphore::new(connections)), each: Quotas::new(CONNECTIONS) };
        for listener in self.listeners {
            tasks.spawn(accept(Arc::clone(&desk), listener, places.clone()));
        }
        while tasks.join_next().await.is_some() {}
    }
}

async fn answer_datagrams(desk: Arc<Desk>, socket: Arc<Datagrams>) {
    let mut buffer = vec![0; LONGEST_DATAGRAM];
    let mut tasks = JoinSet::new();
    loop {
        let (length, ends) = match socket.receive(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                tracing::debug!("pod {}: DNS over UDP: {error}", desk.context.identity.name);
                sleep(PAUSE).await;
                continue;
            }
        };
        while tasks.try_join_next().is_some() {}
        let (desk, socket) = (Arc::clone(&desk), Arc::clone(&socket));
        let bytes = buffer.get(..length).unwrap_or_default().to_vec();
        tasks.spawn(async move {
            let Some(answer) = desk.answer(bytes, Transport::Udp, ends.client).await else { return };
            if let Err(error) = socket.answer(&answer, ends).await {
                tracing::debug!("pod {}: DNS answer to {}: {error}", desk.context.identity.name, ends.client);
            }
        });
    }
}

/// Limits of connections.
#[derive(Clone)]
struct Places {
    all: Arc<Semaphore>,
    each: Arc<Quotas>,
}

async fn accept(desk: Arc<Desk>, listener: TcpListener, places: Places) {
    let mut tasks = JoinSet::new();
    loop {
        // The semaphore is never closed.
        let Ok(place) = Arc::clone(&places.all).acquire_owned().await else { return };
        while tasks.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, source)) => {
                let Some(own) = places.each.take(desk.asker(source)) else {
                    tracing::debug!(
                        "pod {}: too many DNS connections from {source}",
                        desk.context.identity.name
                    );
                    continue;
                };
                let desk = Arc::clone(&desk);
                tasks.spawn(async move {
                    if let Err(error) = connection(&desk, stream, source).await {
                        tracing::debug!("pod {}: DNS over TCP: {error}", desk.context.identity.name);
                    }
                    drop((place, own));
                });
            }
            Err(error) => {
                tracing::debug!("pod {}: DNS over TCP: {error}", desk.context.identity.name);
                sleep(PAUSE).await;
            }
        }
    }
}

/// Answers the queries of one connection, one after the other.
async fn connection(desk: &Desk, mut stream: TcpStream, source: SocketAddr) -> io::Result<()> {
    loop {
        let Some(bytes) = timeout(IDLE, exchange::read_framed(&mut stream)).await?? else { return Ok(()) };
        // A message that can't be answered closes the connection.
        let Some(answer) = desk.answer(bytes, Transport::Tcp, source).await else { return Ok(()) };
        timeout(IDLE, exchange::write_framed(&mut stream, &answer)).await??;
    }
}

/// Answers the queries of a pod.
struct Desk {
    context: Arc<Context>,
    in_flight: Semaphore,
    questions: Arc<Quotas>,
    /// Whether a warning was logged that no upstream server answers.
    warned: AtomicBool,
}

impl Desk {
    /// The answer to a message; `None` if the message is not a query.
    async fn answer(&self, bytes: Vec<u8>, transport: Transport, source: SocketAddr) -> Option<Vec<u8>> {
        let began = Instant::now();
        let question = match message::receive(bytes) {
            Received::Question(question) => question,
            Received::Unanswerable => return None,
            Received::Rejected { answer, code } => {
                self.log(Entry { transport, source, question: None, upstream: None, code, began });
                return Some(answer);
            }
        };
        let answered = match (self.questions.take(self.asker(source)), self.in_flight.try_acquire()) {
            (Some(_own), Ok(_permit)) => self.forward(&question, transport).await,
            _ => None,
        };
        let entry = Entry {
            transport,
            source,
            question: Some(&question),
            upstream: None,
            code: ResponseCode::ServFail,
            began,
        };
        let Some((upstream, answer)) = answered else {
            self.log(entry);
            return Some(question.failure(ResponseCode::ServFail));
        };
        self.log(Entry { upstream: Some(upstream), code: answer.code, ..entry });
        Some(match transport {
            Transport::Udp => question.fit(answer.bytes),
            Transport::Tcp => answer.bytes,
        })
    }

    fn asker(&self, source: SocketAddr) -> Asker {
        Asker::of(self.context.shared.placement, source)
    }

    /// Queries one upstream server after the other. A server's error counts only if no other server gives a better
    /// answer.
    async fn forward(&self, question: &Question, transport: Transport) -> Option<(SocketAddr, Answer)> {
        let upstreams = self.context.shared.upstreams.current();
        let mut poor = None;
        // A single server gets a second attempt, because a datagram may be lost.
        let attempts = upstreams.len().max(2);
        for &upstream in upstreams.iter().cycle().take(attempts) {
            match exchange::ask(&self.context, upstream, question, transport).await {
                Ok(answer) if answer.is_poor() => poor = poor.or(Some((upstream, answer))),
                Ok(answer) => return Some((upstream, answer)),
                Err(error) => {
                    tracing::debug!("pod {}: DNS server {upstream}: {error}", self.context.identity.name);
                }
            }
        }
        if poor.is_none() && !self.warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "pod {}: none of the DNS servers {upstreams:?} answers over {}: they must be reachable \
                 from the pod in one of its families; see --dns-upstream",
                self.context.identity.name,
                if upstreams.iter().all(SocketAddr::is_ipv4) { "IPv4" } else { "IPv4 and IPv6" },
            );
        }
        poor
    }

    fn log(&self, entry: Entry<'_>) {
        let Some(log) = &self.context.shared.access_log else { return };
        log.write(Line::Dns(DnsLine {
            event: "dns",
            pod: self.context.pod(entry.source),
            uid: Arc::clone(&self.context.identity.uid),
            family: if entry.source.is_ipv4() { "IPv4" } else { "IPv6" },
            transport: entry.transport,
            source: entry.source,
            name: entry.question.map(Question::name),
            kind: entry.question.map(Question::kind),
            upstream: entry.upstream,
            rcode: format!("{:?}", entry.code).to_uppercase(),
            duration_ms: entry.began.elapsed().as_millis().try_into().unwrap_or(u64::MAX),
        }));
    }
}

/// The fields of an access log line.
struct Entry<'a> {
    transport: Transport,
    source: SocketAddr,
    question: Option<&'a Question>,
    upstream: Option<SocketAddr>,
    code: ResponseCode,
    began: Instant,
}
