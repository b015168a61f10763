//! The ways into and out of an enrolled pod for frames that no kernel would send, between neighbors on one link.
//!
//! The application's listener answers with a distinctive TTL, so that a single SYN that reaches it shows, without a
//! handshake.

use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use fastrand::Rng;
use libtest_mimic::Trial;
use redirect_ebpf::constants::{PORT_DNS, PORT_INBOUND, PORT_OUTBOUND, PORT_TUNNEL};
use redirect_ebpf::packet::{ACK, RST, SYN};
use redirect_ebpf::{Direction as Way, Family, Reason};
use redirect_tests::server::{Server, listen};
use redirect_tests::{Connection, Families, Pod, Stack, wait};
use socket2::{Protocol, SockRef, Socket, Type};

use crate::context::{Context, for_every_stack};
use crate::odd_sockets::dropped;
use crate::wire::{Frame, Wire, link_address};
use crate::{inbound, load, outbound, raw};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_stack(context, "gate::tagged_frames", tagged_frames);
    trials.extend(for_every_stack(context, "gate::fuzzed_frames", fuzzed_frames));
    for (name, past_qdisc) in [("from_inside", false), ("past_the_qdisc", true)] {
        trials.extend(for_every_stack(
            context,
            &format!("gate::fuzzed_frames_{name}"),
            move |context, stack| fuzzed_frames_from_inside(context, stack, past_qdisc),
        ));
    }
    trials
}

/// Tests of the pod's own listeners.
pub(crate) fn trials_in_pods(context: &Arc<Context>) -> Vec<Trial> {
    for_every_stack(context, "gate::tunnel_port_of_the_application", tunnel_port)
}

/// The application's TTL, for IPv4 and IPv6. Nothing else on these links uses it.
const TTL: u8 = 200;

/// A pod whose application answers with [`TTL`], and a sender.
pub(crate) struct Link {
    pub(crate) sender: Pod,
    pub(crate) target: Pod,
    stack: Stack,
    listener: TcpListener,
    wire: Wire,
    /// Both link addresses only.
    ethernet: Vec<u8>,
}

impl Link {
    pub(crate) fn new(sender: Pod, target: Pod, stack: Stack) -> Result<Self> {
        let any: IpAddr = if stack == Stack::V4 { [0; 4].into() } else { [0; 16].into() };
        let listener = target.netns().run(|| -> io::Result<TcpListener> {
            let listener = listen(stack, SocketAddr::new(any, 0))?;
            let socket = SockRef::from(&listener);
            if stack.family() == Family::Ipv4 {
                socket.set_ttl_v4(TTL.into())?;
            } else {
                socket.set_unicast_hops_v6(TTL.into())?;
            }
            Ok(listener)
        })??;
        let wire = Wire::of(sender.netns())?;
        let ethernet = [link_address(target.netns())?, link_address(sender.netns())?].concat();
        Ok(Self { sender, target, stack, listener, wire, ethernet })
    }

    /// From here on, sent frames skip the sender's TC programs.
    fn past_qdisc(self) -> Result<Self> {
        Ok(Self { wire: self.wire.past_qdisc()?, ..self })
    }

    pub(crate) fn ends(&self) -> Result<(IpAddr, SocketAddr)> {
        let family = self.stack.family();
        let to = SocketAddr::new(self.target.address(family)?, self.listener.local_addr()?.port());
        Ok((self.sender.address(family)?, to))
    }

    /// An IP packet behind tags.
    pub(crate) fn frame(&self, tags: &[u16], packet: &[u8]) -> Frame {
        let mut bytes = self.ethernet.clone();
        for tag in tags {
            bytes.extend(tag.to_be_bytes());
            bytes.extend([0, 0]);
        }
        let kind: u16 = if self.stack.family() == Family::Ipv4 { 0x0800 } else { 0x86dd };
        bytes.extend(kind.to_be_bytes());
        bytes.extend(packet);
        Frame { bytes, protocol: tags.first().copied().unwrap_or(kind) }
    }

    pub(crate) fn send(&self, frames: &[Frame]) -> Result<()> {
        self.wire.send(frames)
    }

    /// The number of answers so far: the application's, and others.
    pub(crate) fn answers(&self) -> Result<Answers> {
        let mut buffer = [MaybeUninit::uninit(); 128];
        let mut answers = Answers::default();
        while let Some(frame) = self.wire.receive(&mut buffer)? {
            let (ttl, protocol, flags) = match frame.get(12..14) {
                Some([0x08, 0x00]) => (22, 23, 47),
                Some([0x86, 0xdd]) => (21, 20, 67),
                _ => continue,
            };
            let is = |place: usize, value: u8| frame.get(place) == Some(&value);
            if is(protocol, 6) && is(flags, SYN | ACK) {
                *(if is(ttl, TTL) { &mut answers.application } else { &mut answers.others }) += 1;
            }
        }
        Ok(answers)
    }

    pub(crate) fn answers_soon(&self) -> Result<Answers> {
        std::thread::sleep(Duration::from_millis(100));
        self.answers()
    }

    pub(crate) fn listener_is_silent(&self) -> Result<bool> {
        self.listener.set_nonblocking(true)?;
        match self.listener.accept() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(true),
            Err(error) => Err(error.into()),
            Ok(_) => Ok(false),
        }
    }
}

/// The answers to SYNs, by sender.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Answers {
    pub(crate) application: u64,
    /// From the proxy.
    pub(crate) others: u64,
}

/// The kernel strips any number of priority tags.
fn tagged_frames(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let plain =
        Link::new(node.plain("neighbour", Families::Dual)?, node.plain("plain", Families::Dual)?, stack)?;
    let enrolled =
        Link::new(node.plain("neighbour", Families::Dual)?, node.enrolled("pod", Families::Dual)?, stack)?;
    // Resolves the neighbors first, so that no answer is lost for another reason.
    let listening = plain.target.listen(stack)?;
    drop(plain.sender.connect(stack, plain.target.endpoint(stack.family(), listening.port())?)?);
    inbound::passes_the_proxy_once(enrolled.sender.netns(), &enrolled.target, stack)?;
    for tags in 0..8 {
        for kind in [0x8100, 0x88a8] {
            let mut answers = [0; 2];
            for (link, answers) in [&plain, &enrolled].into_iter().zip(&mut answers) {
                let (source, to) = link.ends()?;
                let syn = raw::filled(raw::syn(source, 30_000 + tags, to, 1));
                link.send(&[link.frame(&vec![kind; tags.into()], &syn)])?;
                *answers = link.answers_soon()?.application;
            }
            ensure!(
                answers[0] > 0,
                "{tags} tags {kind:#x}: the plain pod did not answer, the test shows nothing"
            );
            ensure!(answers[1] == 0, "{tags} tags {kind:#x} lead to the application");
        }
    }
    inbound::passes_the_proxy_once(enrolled.sender.netns(), &enrolled.target, stack)
}

/// The maximum number of frames per direction.
const FRAMES: u64 = 1_000_000;

/// Unlimited with `cargo xtask test --load`.
fn time() -> Duration {
    if load::is_full() { Duration::MAX } else { Duration::from_secs(6) }
}

fn seed() -> Result<u64> {
    match std::env::var("REDIRECT_FUZZ_SEED") {
        Ok(seed) => Ok(seed.parse()?),
        Err(_) => Ok(fastrand::u64(..)),
    }
}

/// From a neighbor to a pod.
fn fuzzed_frames(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let pod = |name, enrolled| {
        if enrolled { node.enrolled(name, Families::Dual) } else { node.plain(name, Families::Dual) }
    };
    let link = |enrolled| Link::new(pod("neighbour", false)?, pod("pod", enrolled)?, stack);
    let (control, link) = (link(false)?, link(true)?);
    let seed = seed()?;
    reaches(&control, seed)?;
    inbound::passes_the_proxy_once(link.sender.netns(), &link.target, stack)?;
    never_reaches(&link, seed)?;
    inbound::passes_the_proxy_once(link.sender.netns(), &link.target, stack)
}

/// From a pod to a neighbor, past the pod's sockets: `CAP_NET_RAW`.
fn fuzzed_frames_from_inside(context: &Context, stack: Stack, past_qdisc: bool) -> Result<()> {
    let node = context.node()?;
    let link = |sender: Pod| -> Result<Link> {
        let link = Link::new(sender, node.plain("neighbour", Families::Dual)?, stack)?;
        if past_qdisc { link.past_qdisc() } else { Ok(link) }
    };
    let control = link(node.plain("plain", Families::Dual)?)?;
    let link = link(node.enrolled("pod", Families::Dual)?)?;
    let seed = seed()?;
    reaches(&control, seed)?;
    outbound::passes_the_proxy_once(&link.sender, &link.target, stack)?;
    never_reaches(&link, seed)?;
    outbound::passes_the_proxy_once(&link.sender, &link.target, stack)
}

/// Control: without a gate, many frames reach the application.
fn reaches(control: &Link, seed: u64) -> Result<()> {
    // Resolves the neighbors first, so that no answer is lost for another reason.
    let listening = control.target.listen(control.stack)?;
    let to = control.target.endpoint(control.stack.family(), listening.port())?;
    drop(control.sender.connect(control.stack, to)?);
    let (sent, reached) = fuzz(control, seed, 20_000, Duration::from_secs(6))?;
    ensure!(
        reached > 100,
        "of {sent} frames {reached} reach the application of a pod that is not enrolled: too few"
    );
    Ok(())
}

fn never_reaches(link: &Link, seed: u64) -> Result<()> {
    let began = Instant::now();
    let (sent, reached) = fuzz(link, seed, FRAMES, time())?;
    println!("{}: {sent} frames in {:?}, seed {seed}", link.stack, began.elapsed());
    ensure!(reached == 0, "{reached} of {sent} frames reached the application: REDIRECT_FUZZ_SEED={seed}");
    ensure!(link.listener_is_silent()?, "the application accepted a connection: REDIRECT_FUZZ_SEED={seed}");
    Ok(())
}

fn fuzz(link: &Link, seed: u64, limit: u64, time: Duration) -> Result<(u64, u64)> {
    let (source, to) = link.ends()?;
    let (mut random, began) = (Rng::with_seed(seed), Instant::now());
    let (mut sent, mut reached) = (0, 0);
    let mut frames = Vec::new();
    while sent < limit && began.elapsed() < time {
        // A burst, which the receiver may process as one batch.
        frames.clear();
        for _ in 0..random.usize(1..=64) {
            let (tags, packet) = packet(&mut random, source, to);
            // A frame that exceeds the device's MTU proves nothing.
            if packet.len() < 1400 {
                let mut frame = link.frame(&tags, &packet);
                if random.u8(..8) == 0 {
                    frame.protocol =
                        random.choice([0x0800, 0x86dd, 0x0806, 0x8100, 0x88a8]).expect("one of them");
                }
                frames.push(frame);
            }
        }
        link.send(&frames)?;
        sent += frames.len() as u64;
        reached += link.answers()?.application;
    }
    Ok((sent, reached + link.answers_soon()?.application))
}

/// Tags, and an IP packet to the pod.
fn packet(random: &mut Rng, source: IpAddr, to: SocketAddr) -> (Vec<u16>, Vec<u8>) {
    let tags = if random.u8(..3) == 0 { random.usize(..7) } else { 0 };
    let tags = (0..tags).map(|_| if random.bool() { 0x8100 } else { 0x88a8 }).collect();
    let ports = [PORT_OUTBOUND, PORT_INBOUND, PORT_TUNNEL, PORT_DNS, random.u16(..)];
    let port = if random.u8(..4) == 0 { ports[random.usize(..ports.len())] } else { to.port() };
    // Few ports, so that frames meet the remains of earlier ones.
    let source_port = if random.u8(..100) == 0 { 0 } else { random.u16(20_000..20_064) };
    let flags = match random.u8(..10) {
        0 => RST,
        1 => ACK,
        2 => random.u8(..),
        _ => SYN,
    };
    let options = 4 * random.usize(..11);
    let mut segment = Vec::new();
    segment.extend(source_port.to_be_bytes());
    segment.extend(port.to_be_bytes());
    segment.extend(random.u32(..).to_be_bytes());
    segment.extend([0; 4]);
    segment.extend([(((20 + options) / 4) << 4) as u8, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(std::iter::repeat_n(1, options));
    let payload = if random.u8(..4) == 0 { random.usize(..64) } else { 0 };
    segment.extend((0..payload).map(|_| random.u8(..)));
    let checksum = raw::checksum(source, to.ip(), &segment);
    segment[16..18].copy_from_slice(&checksum.to_be_bytes());
    let mut packet = match to.ip() {
        IpAddr::V4(_) => {
            let options = if random.u8(..3) == 0 { random.usize(..11) } else { 0 };
            raw::ipv4_with_options(source, to.ip(), options, &segment)
        }
        IpAddr::V6(_) => {
            let headers = if random.u8(..3) == 0 { random.usize(..11) } else { 0 };
            let kinds: Vec<u8> = (0..headers).map(|_| [60, 60, 43, 44, 51, 0][random.usize(..6)]).collect();
            raw::ipv6_with_extensions(source, to.ip(), &kinds, &segment)
        }
    };
    if random.u8(..10) == 0 {
        let place = random.usize(..packet.len());
        packet[place] = random.u8(..);
    }
    (tags, packet)
}

/// Port 15008 leads to the proxy's listener only, not to an application that already listens on it.
fn tunnel_port(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (client, pod) = (node.plain("client", Families::Dual)?, node.plain("pod", Families::Dual)?);
    let application = Server::start(pod.netns(), stack, PORT_TUNNEL, "application")?;
    let to = pod.endpoint(stack.family(), PORT_TUNNEL)?;
    drop(client.connect(stack, to)?);
    ensure!(application.accepted().len() == 1, "not even before enrollment");
    pod.enroll()?;
    let before = dropped(&node, stack, Way::Inbound, Reason::NoListener)?;
    let refused = client.netns().run(|| -> Result<()> {
        let socket = Socket::new(stack.domain(), Type::STREAM, Some(Protocol::TCP))?;
        match socket.connect_timeout(&stack.spell(to).into(), Duration::from_millis(300)) {
            Err(_) => Ok(()),
            Ok(()) => bail!("the application's listener took it"),
        }
    })?;
    refused?;
    ensure!(application.accepted().len() == 1, "{:?}", application.accepted());
    ensure!(dropped(&node, stack, Way::Inbound, Reason::NoListener)? > before);
    // Inside the pod it is the application's own.
    let own: Connection = pod.connect(stack, to)?;
    drop(own);
    ensure!(wait::for_cleanup(wait::SOON, || application.accepted().len() == 2));
    Ok(())
}
