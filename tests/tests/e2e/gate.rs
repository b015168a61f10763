//! The way into an enrolled pod for frames that no kernel would send, from a neighbour on the pod's own link.
//!
//! The application's listener answers with a TTL of its own, so that a single SYN that reaches it shows, without a handshake.

use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, bail, ensure};
use libtest_mimic::Trial;
use redirect_ebpf::constants::{PORT_DNS, PORT_INBOUND, PORT_OUTBOUND, PORT_TUNNEL};
use redirect_ebpf::packet::{ACK, RST, SYN};
use redirect_ebpf::{Direction as Way, Family, Reason};
use redirect_tests::server::{Server, listen};
use redirect_tests::{Connection, Families, Netns, Pod, Stack, wait};
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, SockRef, Socket, Type};

use crate::context::{Context, for_every_stack};
use crate::odd_sockets::dropped;
use crate::{inbound, raw};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = for_every_stack(context, "gate::tagged_frames", tagged_frames);
    trials.extend(for_every_stack(context, "gate::fuzzed_frames", fuzzed_frames));
    trials
}

/// What concerns the pod's own listeners.
pub(crate) fn trials_in_pods(context: &Arc<Context>) -> Vec<Trial> {
    for_every_stack(context, "gate::tunnel_port_of_the_application", tunnel_port)
}

/// The application's, for IPv4 and IPv6. Nothing else on these links has it.
const TTL: u8 = 200;

/// A pod whose application answers with [`TTL`], and a neighbour.
struct Link {
    neighbour: Pod,
    target: Pod,
    stack: Stack,
    listener: TcpListener,
    wire: Socket,
    /// Both link addresses and nothing else.
    ethernet: Vec<u8>,
}

impl Link {
    fn new(neighbour: Pod, target: Pod, stack: Stack) -> Result<Self> {
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
        let wire = neighbour.netns().run(wire)??;
        let ethernet = [link_address(target.netns())?, link_address(neighbour.netns())?].concat();
        Ok(Self { neighbour, target, stack, listener, wire, ethernet })
    }

    fn ends(&self) -> Result<(IpAddr, SocketAddr)> {
        let family = self.stack.family();
        let to = SocketAddr::new(self.target.address(family)?, self.listener.local_addr()?.port());
        Ok((self.neighbour.address(family)?, to))
    }

    /// Sends an IP packet behind tags.
    fn send(&self, tags: &[u16], packet: &[u8]) -> Result<()> {
        let mut frame = self.ethernet.clone();
        for tag in tags {
            frame.extend(tag.to_be_bytes());
            frame.extend([0, 0]);
        }
        frame.extend(if self.stack.family() == Family::Ipv4 { [0x08, 0x00] } else { [0x86, 0xdd] });
        frame.extend(packet);
        loop {
            match self.wire.send(&frame) {
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                sent => return Ok(sent.map(drop)?),
            }
        }
    }

    /// How many answers of the application came back so far.
    fn answers(&self) -> Result<u64> {
        let mut buffer = [MaybeUninit::uninit(); 128];
        let mut answers = 0;
        loop {
            let length = match self.wire.recv(&mut buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(answers),
                Err(error) => return Err(error.into()),
            };
            // SAFETY: the kernel has written them.
            let frame = unsafe { buffer[..length].assume_init_ref() };
            let (ttl, protocol, flags) = match frame.get(12..14) {
                Some([0x08, 0x00]) => (22, 23, 47),
                Some([0x86, 0xdd]) => (21, 20, 67),
                _ => continue,
            };
            let is = |place: usize, value: u8| frame.get(place) == Some(&value);
            answers += u64::from(is(ttl, TTL) && is(protocol, 6) && is(flags, SYN | ACK));
        }
    }

    fn answers_soon(&self) -> Result<u64> {
        std::thread::sleep(Duration::from_millis(100));
        self.answers()
    }
}

/// A socket for whole frames of `eth0` in the namespace of the calling thread, which sees what comes in.
fn wire() -> Result<Socket> {
    const PACKET_IGNORE_OUTGOING: libc::c_int = 23;
    let everything = (libc::ETH_P_ALL as u16).to_be();
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(i32::from(everything))))?;
    let index = nix::net::if_::if_nametoindex("eth0")?;
    let link = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: everything,
        sll_ifindex: index as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: it is a socket's address.
    *unsafe { storage.view_as::<libc::sockaddr_ll>() } = link;
    // SAFETY: the storage has an address of this length.
    let address = unsafe { SockAddr::new(storage, size_of::<libc::sockaddr_ll>() as u32) };
    socket.bind(&address)?;
    let on: libc::c_int = 1;
    // SAFETY: the option is an int.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            PACKET_IGNORE_OUTGOING,
            (&raw const on).cast(),
            size_of::<libc::c_int>() as u32,
        )
    };
    nix::errno::Errno::result(result)?;
    socket.set_recv_buffer_size(8 << 20)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn link_address(netns: &Netns) -> Result<Vec<u8>> {
    let links = netns.json("ip -j link show dev eth0")?;
    let text = links[0]["address"].as_str().context("a link address")?;
    Ok(text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>()?)
}

/// The kernel takes off any number of priority tags.
fn tagged_frames(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let plain =
        Link::new(node.plain("neighbour", Families::Dual)?, node.plain("plain", Families::Dual)?, stack)?;
    let enrolled =
        Link::new(node.plain("neighbour", Families::Dual)?, node.enrolled("pod", Families::Dual)?, stack)?;
    // Neighbours know each other, so that nothing else can lose the answers.
    let listening = plain.target.listen(stack)?;
    drop(plain.neighbour.connect(stack, plain.target.endpoint(stack.family(), listening.port())?)?);
    inbound::passes_the_proxy_once(enrolled.neighbour.netns(), &enrolled.target, stack)?;
    for tags in 0..8 {
        for kind in [0x8100, 0x88a8] {
            let mut answers = [0; 2];
            for (link, answers) in [&plain, &enrolled].into_iter().zip(&mut answers) {
                let (source, to) = link.ends()?;
                let syn = raw::filled(raw::syn(source, 30_000 + tags, to, 1));
                link.send(&vec![kind; tags.into()], &syn)?;
                *answers = link.answers_soon()?;
            }
            ensure!(
                answers[0] > 0,
                "{tags} tags {kind:#x}: the plain pod did not answer, the test shows nothing"
            );
            ensure!(answers[1] == 0, "{tags} tags {kind:#x} lead to the application");
        }
    }
    inbound::passes_the_proxy_once(enrolled.neighbour.netns(), &enrolled.target, stack)
}

/// Frames at most, and time at most.
const FRAMES: u64 = 1_000_000;
const TIME: Duration = Duration::from_secs(6);

fn fuzzed_frames(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let control =
        Link::new(node.plain("neighbour", Families::Dual)?, node.plain("plain", Families::Dual)?, stack)?;
    let link =
        Link::new(node.plain("neighbour", Families::Dual)?, node.enrolled("pod", Families::Dual)?, stack)?;
    let listening = control.target.listen(stack)?;
    drop(control.neighbour.connect(stack, control.target.endpoint(stack.family(), listening.port())?)?);
    inbound::passes_the_proxy_once(link.neighbour.netns(), &link.target, stack)?;
    let seed = match std::env::var("REDIRECT_FUZZ_SEED") {
        Ok(seed) => seed.parse()?,
        Err(_) => SystemTime::UNIX_EPOCH.elapsed()?.as_nanos() as u64 | 1,
    };
    let (sent, reached) = fuzz(&control, seed, 20_000, TIME)?;
    ensure!(
        reached > 100,
        "of {sent} frames {reached} reach the application of a pod that is not enrolled: too few"
    );
    let (sent, reached) = fuzz(&link, seed, FRAMES, TIME)?;
    println!("{stack}: {sent} frames, seed {seed}");
    ensure!(reached == 0, "{reached} of {sent} frames reached the application: REDIRECT_FUZZ_SEED={seed}");
    ensure!(link.listener_is_silent()?, "the application accepted a connection: REDIRECT_FUZZ_SEED={seed}");
    inbound::passes_the_proxy_once(link.neighbour.netns(), &link.target, stack)
}

impl Link {
    fn listener_is_silent(&self) -> Result<bool> {
        self.listener.set_nonblocking(true)?;
        match self.listener.accept() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(true),
            Err(error) => Err(error.into()),
            Ok(_) => Ok(false),
        }
    }
}

fn fuzz(link: &Link, seed: u64, limit: u64, time: Duration) -> Result<(u64, u64)> {
    let (source, to) = link.ends()?;
    let (mut noise, began) = (Noise(seed), Instant::now());
    let (mut sent, mut reached) = (0, 0);
    while sent < limit && began.elapsed() < time {
        // A burst: the receiver may take it as one batch.
        for _ in 0..1 + noise.below(64) {
            let (tags, packet) = noise.packet(source, to);
            // A frame that is too long for the device says nothing.
            if packet.len() < 1400 {
                link.send(&tags, &packet)?;
                sent += 1;
            }
        }
        reached += link.answers()?;
    }
    Ok((sent, reached + link.answers_soon()?))
}

/// Pseudo-random numbers (xorshift), and packets that are made of them.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 16) as usize % limit
    }

    fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())]
    }

    /// Tags, and an IP packet to the pod.
    fn packet(&mut self, source: IpAddr, to: SocketAddr) -> (Vec<u16>, Vec<u8>) {
        let tags = if self.below(3) == 0 { self.below(7) } else { 0 };
        let tags = (0..tags).map(|_| self.one_of(&[0x8100, 0x88a8])).collect();
        let ports = [PORT_OUTBOUND, PORT_INBOUND, PORT_TUNNEL, PORT_DNS, self.next() as u16];
        let port = if self.below(4) == 0 { self.one_of(&ports) } else { to.port() };
        // Few of them, so that they meet what is left of earlier ones.
        let source_port = if self.below(100) == 0 { 0 } else { 20_000 + self.below(64) as u16 };
        let flags = match self.below(10) {
            0 => RST,
            1 => ACK,
            2 => self.next() as u8,
            _ => SYN,
        };
        let options = 4 * self.below(11);
        let mut segment = Vec::new();
        segment.extend(source_port.to_be_bytes());
        segment.extend(port.to_be_bytes());
        segment.extend((self.next() as u32).to_be_bytes());
        segment.extend([0; 4]);
        segment.extend([(((20 + options) / 4) << 4) as u8, flags, 0xff, 0xff, 0, 0, 0, 0]);
        segment.extend(std::iter::repeat_n(1, options));
        let payload = if self.below(4) == 0 { self.below(64) } else { 0 };
        segment.extend((0..payload).map(|_| self.next() as u8));
        let checksum = raw::checksum(source, to.ip(), &segment);
        segment[16..18].copy_from_slice(&checksum.to_be_bytes());
        let mut packet = match to.ip() {
            IpAddr::V4(_) => {
                let options = if self.below(3) == 0 { self.below(11) } else { 0 };
                raw::ipv4_with_options(source, to.ip(), options, &segment)
            }
            IpAddr::V6(_) => {
                let headers = if self.below(3) == 0 { self.below(11) } else { 0 };
                let kinds: Vec<u8> = (0..headers).map(|_| self.one_of(&[60, 60, 43, 44, 51, 0])).collect();
                raw::ipv6_with_extensions(source, to.ip(), &kinds, &segment)
            }
        };
        if self.below(10) == 0 {
            let place = self.below(packet.len());
            packet[place] = self.next() as u8;
        }
        (tags, packet)
    }
}

/// Port 15008 leads to the proxy's listener, and to no other that has the port from before.
fn tunnel_port(context: &Context, stack: Stack) -> Result<()> {
    let node = context.node()?;
    let (client, pod) = (node.plain("client", Families::Dual)?, node.plain("pod", Families::Dual)?);
    let application = Server::start(pod.netns(), stack, PORT_TUNNEL, "application")?;
    let to = pod.endpoint(stack.family(), PORT_TUNNEL)?;
    drop(client.connect(stack, to)?);
    ensure!(application.accepted().len() == 1, "not even before enrolment");
    pod.enrol()?;
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
