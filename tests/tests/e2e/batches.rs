//! Packets that a pod's device receives in one batch: the kernel runs TC for all of them before the stack has the first.
//!
//! A veth pair forms batches with GRO on at the receiver and segmentation offload off at the sender. A separate thread polls the
//! device, on the CPU of the sender, which does not yield before it has sent everything.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::process::Command;
use std::sync::Arc;
use std::{fs, io, thread};

use anyhow::{Context as _, Result, bail, ensure};
use libtest_mimic::Trial;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use redirect_ebpf::packet::{RST, SYN};
use redirect_ebpf::{Direction as Way, Reason};
use redirect_tests::server::listen;
use redirect_tests::stack::canonical;
use redirect_tests::wait::{self, SOON};
use redirect_tests::{Direction, Families, Netns, Node, Pod, Stack};
use socket2::{Protocol, SockRef, Socket, Type};

use crate::context::{Context, for_every_stack_in_pods};
use crate::gate::{Answers, Link};
use crate::host_gate::end_on_host;
use crate::odd_sockets::dropped;
use crate::raw;
use crate::time_wait::is_in_time_wait;

const ELSEWHERE: &str = "nothing is in the pod";

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    type Test = fn(&Context, Stack) -> Result<()>;
    let tests: [(&str, Test); 3] = [
        ("ports_in_time_wait", ports_in_time_wait),
        ("refused_without_a_proxy", refused_without_a_proxy),
        ("reset_before_syn", reset_before_syn),
    ];
    tests
        .into_iter()
        .flat_map(|(name, test)| {
            for_every_stack_in_pods(context, &format!("batches::{name}"), ELSEWHERE, test)
        })
        .collect()
}

/// Makes a pod receive packets that are sent together as one batch.
struct Batches {
    processor: CpuSet,
}

impl Batches {
    fn to(node: &Node, pod: &Pod) -> Result<Self> {
        let end = end_on_host(node, pod)?;
        // `ethtool -K`: TSO, GSO; GRO.
        node.netns()
            .run(|| [0x1f, 0x24].into_iter().try_for_each(|command| offload(&end, command, false)))??;
        pod.netns().run(|| offload("eth0", 0x2c, true))??;
        let before = pollers()?;
        let mut threaded = Command::new("unshare");
        threaded.args(["--mount", "sh", "-c"]);
        threaded.arg("mount -t sysfs sysfs /sys && echo 1 > /sys/class/net/eth0/threaded");
        pod.netns().output(threaded, b"")?;
        let mut processor = CpuSet::new();
        processor.set(0)?;
        // Pods of other tests may start at the same time: their pollers do no harm there.
        let new: Vec<_> = pollers()?.difference(&before).copied().collect();
        ensure!(!new.is_empty(), "no thread polls eth0");
        for poller in new {
            match sched_setaffinity(Pid::from_raw(poller), &processor) {
                Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Self { processor })
    }

    /// Runs code in a namespace on the receiver's CPU, which cannot run meanwhile.
    fn at_once<T: Send>(&self, netns: &Netns, send: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        netns.run(|| {
            sched_setaffinity(Pid::from_raw(0), &self.processor)?;
            let first = libc::sched_param { sched_priority: 1 };
            // SAFETY: the parameters live for the length of the call; the thread ends with the code.
            let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const first) };
            nix::errno::Errno::result(result)?;
            send()
        })?
    }
}

/// The threads that poll a device `eth0`.
fn pollers() -> Result<BTreeSet<i32>> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if fs::read_to_string(entry.path().join("comm")).is_ok_and(|name| name.starts_with("napi/eth0-")) {
            found.insert(pid);
        }
    }
    Ok(found)
}

/// Turns an offload of a device on or off.
fn offload(device: &str, command: u32, on: bool) -> io::Result<()> {
    const SIOCETHTOOL: libc::c_ulong = 0x8946;
    let mut value = [command, on.into()];
    // SAFETY: integers and pointers only: zero is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(device.bytes()) {
        *place = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_data = value.as_mut_ptr().cast();
    let socket = Socket::new(socket2::Domain::IPV4, Type::DGRAM, None)?;
    // SAFETY: the request, and what it points to, live for the length of the call.
    nix::errno::Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) })?;
    Ok(())
}

const AT_ONCE: u16 = 4;
const ROUNDS: usize = 10;

/// Opens connections from these ports, all at once.
fn begin(
    batches: &Batches,
    client: &Pod,
    stack: Stack,
    ports: &[u16],
    to: SocketAddr,
) -> Result<Vec<Socket>> {
    let address = client.address(stack.family())?;
    batches.at_once(client.netns(), || {
        let bound = |port: &u16| -> io::Result<Socket> {
            let socket = Socket::new(stack.domain(), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_reuse_address(true)?;
            socket.bind(&stack.spell(SocketAddr::new(address, *port)).into())?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        };
        let sockets = ports.iter().map(bound).collect::<io::Result<Vec<_>>>()?;
        for socket in &sockets {
            match socket.connect(&stack.spell(to).into()) {
                Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error.into()),
                _ => {}
            }
        }
        Ok(sockets)
    })
}

/// The proxy's ends are in TIME_WAIT when their clients reuse their ports: such a connection can't be assigned to the proxy's
/// listener, only noted.
fn ports_in_time_wait(context: &Context, stack: Stack) -> Result<()> {
    let node = Node::start(&context.session()?)?;
    let (client, pod) = (node.plain("client", Families::Dual)?, node.enrolled("pod", Families::Dual)?);
    let batches = Batches::to(&node, &pod)?;
    let any =
        stack.spell(SocketAddr::new(if stack == Stack::V4 { [0; 4].into() } else { [0; 16].into() }, 0));
    let listener = pod.netns().run(|| listen(stack, any))??;
    let to = pod.endpoint(stack.family(), listener.local_addr()?.port())?;
    let total = ROUNDS * usize::from(AT_ONCE);
    let serving = thread::spawn(move || -> Result<Vec<SocketAddr>> {
        let mut peers = Vec::new();
        for _ in 0..total {
            // The server closes first.
            let (_, peer) = listener.accept()?;
            peers.push(canonical(peer));
        }
        Ok(peers)
    });
    let ports: Vec<u16> = (24_000..24_000 + AT_ONCE).collect();
    let address = client.address(stack.family())?;
    for round in 0..ROUNDS {
        for socket in begin(&batches, &client, stack, &ports, to)? {
            wait::until_true("connection", SOON, || {
                let error = socket.take_error()?;
                error.map_or(Ok(socket.peer_addr().is_ok()), |error| Err(error.into()))
            })
            .with_context(|| format!("round {round}"))?;
            socket.set_nonblocking(false)?;
            socket.set_read_timeout(Some(wait::patient(SOON)))?;
            io::Read::read_to_end(&mut &socket, &mut Vec::new()).with_context(|| format!("round {round}"))?;
        }
        for port in &ports {
            is_in_time_wait(&pod, SocketAddr::new(address, *port), to)?;
        }
    }
    let peers = serving.join().map_err(|_| anyhow::anyhow!("the server panicked"))??;
    let direct = peers.iter().filter(|peer| ports.contains(&peer.port())).count();
    ensure!(direct == 0, "{direct} of {total} connections reached the application past the proxy");
    pod.proxied_times(Direction::Inbound, to, total).map(drop)
}

/// A note that refuses one connection must not affect another.
fn refused_without_a_proxy(context: &Context, stack: Stack) -> Result<()> {
    let node = Node::with_arguments(&context.session()?, &["--without-proxy", "refuse"])?;
    let (client, pod) = (node.plain("client", Families::Dual)?, node.enrolled("pod", Families::Dual)?);
    node.kill_proxy()?;
    let batches = Batches::to(&node, &pod)?;
    let listening = pod.listen(stack)?;
    let to = pod.endpoint(stack.family(), listening.port())?;
    for round in 0..ROUNDS as u16 {
        let first = 25_000 + round * AT_ONCE;
        let ports: Vec<u16> = (first..first + AT_ONCE).collect();
        for socket in begin(&batches, &client, stack, &ports, to)? {
            let mut outcome = None;
            wait::until_true("answer", SOON, || {
                outcome = socket.take_error()?;
                Ok(outcome.is_some() || socket.peer_addr().is_ok())
            })?;
            let refused = outcome.is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
            ensure!(
                refused,
                "round {round}: not refused; the application accepted {:?}",
                listening.accepted()
            );
        }
    }
    ensure!(listening.accepted().is_empty(), "{:?}", listening.accepted());
    let counted = dropped(&node, stack, Way::Inbound, Reason::NoListener)?;
    ensure!(counted >= ROUNDS as u64 * u64::from(AT_ONCE), "{counted} were counted");
    Ok(())
}

/// A connection exists at TC, but a reset ahead of the SYN in the batch ends it before the stack has the SYN.
fn reset_before_syn(context: &Context, stack: Stack) -> Result<()> {
    const TIMES: u64 = 12;
    let node = Node::start(&context.session()?)?;
    let link =
        Link::new(node.plain("client", Families::Dual)?, node.enrolled("pod", Families::Dual)?, stack)?;
    let (client, pod) = (&link.sender, &link.target);
    // Otherwise the stack looks up the SYN's connection before it has processed the reset.
    pod.netns().set_sysctl("net.ipv4.tcp_early_demux", "0")?;
    let batches = Batches::to(&node, pod)?;
    let (source, to) = link.ends()?;
    let mut answers = Answers::default();
    for _ in 0..TIMES {
        let (port, next) = forgotten(client, stack, to)?;
        link.answers()?;
        let segment = |flags, sequence| raw::filled(raw::segment(source, port, to, flags, sequence));
        let reset = link.frame(&[], &segment(RST, next));
        // With a new sequence number, as in a new connection.
        let syn = link.frame(&[], &segment(SYN, next.wrapping_add(1 << 20)));
        batches.at_once(client.netns(), || link.send(&[reset, syn]))?;
        let mut these = Answers::default();
        wait::until_true("answer to the SYN", SOON, || {
            let more = link.answers()?;
            these.application += more.application;
            these.others += more.others;
            Ok(these != Answers::default())
        })?;
        answers.application += these.application.min(1);
        answers.others += these.others.min(1);
    }
    ensure!(answers.application == 0, "the application answered {} of {TIMES} SYNs", answers.application);
    ensure!(answers.others == TIMES, "{answers:?}");
    Ok(())
}

/// A connection through the proxy that the client's kernel has forgotten: the client's port and next sequence number.
fn forgotten(client: &Pod, stack: Stack, to: SocketAddr) -> Result<(u16, u32)> {
    const TCP_REPAIR: libc::c_int = 19;
    const TCP_REPAIR_QUEUE: libc::c_int = 20;
    const TCP_QUEUE_SEQ: libc::c_int = 21;
    let socket = client.netns().run(|| -> io::Result<Socket> {
        let socket = Socket::new(stack.domain(), Type::STREAM, Some(Protocol::TCP))?;
        socket.connect_timeout(&stack.spell(to).into(), wait::patient(SOON))?;
        Ok(socket)
    })??;
    let Some(local) = socket.local_addr()?.as_socket() else { bail!("no address") };
    let option = SockRef::from(&socket);
    option.set(TCP_REPAIR, 1)?;
    option.set(TCP_REPAIR_QUEUE, 2)?;
    let next = option.get(TCP_QUEUE_SEQ)?;
    // In this mode it closes silently.
    drop(socket);
    Ok((local.port(), next))
}

/// TCP's own options, as numbers.
trait TcpOption {
    fn set(&self, option: libc::c_int, value: u32) -> Result<()>;
    fn get(&self, option: libc::c_int) -> Result<u32>;
}

impl TcpOption for SockRef<'_> {
    fn set(&self, option: libc::c_int, value: u32) -> Result<()> {
        let (place, size) = ((&raw const value).cast(), size_of_val(&value) as u32);
        // SAFETY: the option's value lives for the length of the call, and its size is right.
        let result = unsafe { libc::setsockopt(self.as_raw_fd(), libc::IPPROTO_TCP, option, place, size) };
        ensure!(result == 0, "TCP option {option}: {}", io::Error::last_os_error());
        Ok(())
    }

    fn get(&self, option: libc::c_int) -> Result<u32> {
        let (mut value, mut size) = (0u32, 4);
        let place = (&raw mut value).cast();
        // SAFETY: the option's place lives for the length of the call, and its size is right.
        let result =
            unsafe { libc::getsockopt(self.as_raw_fd(), libc::IPPROTO_TCP, option, place, &raw mut size) };
        ensure!(result == 0, "TCP option {option}: {}", io::Error::last_os_error());
        Ok(value)
    }
}
