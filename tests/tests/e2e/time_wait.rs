//! Addresses and ports that are reused while the proxy's end of the previous connection is in TIME_WAIT.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use libtest_mimic::Trial;
use redirect_tests::connection::dial_prepared;
use redirect_tests::server::listen;
use redirect_tests::wait;
use redirect_tests::{Direction, Families, Netns, Node, Pod, Stack};

use crate::context::{Context, for_every_kind, for_every_stack};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (direction, word) in DIRECTIONS {
        let test = move |context: &Context, families: Families, stack: Stack| {
            one_port(&context.node()?, families, stack, direction)
        };
        trials.extend(for_every_kind(context, &format!("time_wait::one_source_port::{word}"), test));
    }
    trials.extend(for_every_stack(context, "time_wait::noted_when_they_listen", noted_when_they_listen));
    trials
}

pub(crate) const DIRECTIONS: [(Direction, &str); 2] =
    [(Direction::Outbound, "outbound"), (Direction::Inbound, "inbound")];

/// As on kernels whose TC programs may not store the proxy's listeners.
pub(crate) const BY_SOCK_OPS: [&str; 2] = ["--listeners-noted-by", "sock-ops"];

fn noted_when_they_listen(context: &Context, stack: Stack) -> Result<()> {
    let node = Node::with_arguments(&context.session()?, &BY_SOCK_OPS)?;
    DIRECTIONS.into_iter().try_for_each(|(direction, _)| one_port(&node, Families::Dual, stack, direction))
}

const CONNECTIONS: usize = 8;
const LIMIT: Duration = Duration::from_millis(500);

fn one_port(node: &Arc<Node>, families: Families, stack: Stack, direction: Direction) -> Result<()> {
    let (pod, other) = (node.enrolled("pod", families)?, node.plain("other", Families::Dual)?);
    let inside = (pod.netns(), pod.address(stack.family())?);
    let outside = (other.netns(), other.address(stack.family())?);
    one_source_port(&pod, stack, direction, inside, outside)
}

/// The server closes each connection first, and the client reuses its port at once. The pod's end is `inside`.
pub(crate) fn one_source_port(
    pod: &Pod,
    stack: Stack,
    direction: Direction,
    inside: (&Netns, IpAddr),
    outside: (&Netns, IpAddr),
) -> Result<()> {
    let [(client, client_address), (server, server_address)] = match direction {
        Direction::Outbound => [inside, outside],
        Direction::Inbound => [outside, inside],
    };
    let any =
        stack.spell(SocketAddr::new(if stack == Stack::V4 { [0; 4].into() } else { [0; 16].into() }, 0));
    let listener = server.run(|| listen(stack, any))??;
    let to = SocketAddr::new(server_address, listener.local_addr()?.port());
    let from = SocketAddr::new(client_address, 23_456);
    let serving = thread::spawn(move || -> std::io::Result<()> {
        for _ in 0..CONNECTIONS {
            let (mut stream, _) = listener.accept()?;
            stream.write_all(b"bye")?;
            stream.shutdown(Shutdown::Write)?;
            // The client's end, so that nothing is reset.
            stream.read_to_end(&mut Vec::new())?;
        }
        Ok(())
    });
    // A SYN that finds no listener is not lost either: the kernel answers it for the previous connection, and it is
    // retransmitted, every time. On a slow machine this may happen occasionally.
    let sent_again = || client.statistic("netstat", "TcpExt", "TCPSynRetrans");
    let before = sent_again()?;
    for number in 0..CONNECTIONS {
        let start = Instant::now();
        call(client, stack, from, to).with_context(|| format!("connection {number} from {from}"))?;
        ensure!(
            start.elapsed() < wait::patient(LIMIT),
            "connection {number} only after {:?}",
            start.elapsed()
        );
        is_in_time_wait(pod, from, to).with_context(|| format!("connection {number}"))?;
    }
    let again = sent_again()? - before;
    ensure!(again < CONNECTIONS as u64 / 2, "{again} SYNs were sent again");
    serving.join().map_err(|_| anyhow!("the server panicked"))??;
    let entries = pod.proxied_times(direction, to, CONNECTIONS)?;
    ensure!(entries.iter().all(|entry| entry.source == from), "{entries:#?}");
    Ok(())
}

fn call(client: &Netns, stack: Stack, from: SocketAddr, to: SocketAddr) -> Result<()> {
    let heard = client.run(|| -> std::io::Result<Vec<u8>> {
        let prepare = |socket: &socket2::Socket| {
            socket.set_reuse_address(true)?;
            socket.bind(&stack.spell(from).into())
        };
        let mut stream = dial_prepared(stack, to, Duration::from_secs(5), prepare)?;
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard)?;
        Ok(heard)
    })??;
    ensure!(heard == b"bye", "heard {:?}", String::from_utf8_lossy(&heard));
    Ok(())
}

/// Otherwise the test would prove nothing.
pub(crate) fn is_in_time_wait(pod: &Pod, client: SocketAddr, server: SocketAddr) -> Result<()> {
    redirect_tests::wait::until_true("TIME_WAIT of the proxy's end", Duration::from_secs(2), || {
        let sockets = pod
            .proxy_netns()
            .run(|| std::process::Command::new("ss").args(["-Htn", "state", "time-wait"]).output())??;
        // The proxy's sockets are IPv6 ones.
        let text = String::from_utf8(sockets.stdout)?.replace("::ffff:", "").replace(['[', ']'], "");
        let plain = |address: SocketAddr| format!("{}:{}", address.ip(), address.port());
        Ok(text.lines().any(|line| line.contains(&plain(client)) && line.contains(&plain(server))))
    })
}
