//! Addresses and ports that are used again while the proxy's end of the connection before is in TIME_WAIT.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use libtest_mimic::Trial;
use redirect_tests::connection::dial_prepared;
use redirect_tests::server::listen;
use redirect_tests::wait;
use redirect_tests::{Direction, Families, Netns, Pod, Stack};

use crate::context::{Context, for_every_kind};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (direction, word) in [(Direction::Outbound, "outbound"), (Direction::Inbound, "inbound")] {
        let test = move |context: &Context, families: Families, stack: Stack| {
            one_port(context, families, stack, direction)
        };
        trials.extend(for_every_kind(context, &format!("time_wait::one_source_port::{word}"), test));
    }
    trials
}

const CONNECTIONS: usize = 20;
const LIMIT: Duration = Duration::from_millis(500);

/// The server ends each connection first, and the client has its port for the next one at once.
fn one_port(context: &Context, families: Families, stack: Stack, direction: Direction) -> Result<()> {
    let node = context.node()?;
    let (pod, other) = (node.enrolled("pod", families)?, node.plain("other", Families::Dual)?);
    let (client, server) = match direction {
        Direction::Outbound => (&pod, &other),
        Direction::Inbound => (&other, &pod),
    };
    let any =
        stack.spell(SocketAddr::new(if stack == Stack::V4 { [0; 4].into() } else { [0; 16].into() }, 0));
    let listener = server.netns().run(|| listen(stack, any))??;
    let to = server.endpoint(stack.family(), listener.local_addr()?.port())?;
    let from = SocketAddr::new(client.address(stack.family())?, 23_456);
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
    for number in 0..CONNECTIONS {
        let start = Instant::now();
        call(client.netns(), stack, from, to).with_context(|| format!("connection {number} from {from}"))?;
        ensure!(
            start.elapsed() < wait::patient(LIMIT),
            "connection {number} only after {:?}",
            start.elapsed()
        );
        is_in_time_wait(&pod, from, to).with_context(|| format!("connection {number}"))?;
    }
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

/// Otherwise the test would show nothing.
fn is_in_time_wait(pod: &Pod, client: SocketAddr, server: SocketAddr) -> Result<()> {
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
