//! Processes that connect to the agent as a node proxy, but are none or are faulty: the agent logs it, and the pods
//! continue.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket};
use redirect_tests::kernel::Footprint;
use redirect_tests::{Families, Node, NodeOptions, Stack, agent, wait};

use crate::context::{Context, trial};
use crate::{inbound, outbound, restarts};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    vec![
        trial(context, "faults::proxy_that_never_answers", never_answers),
        trial(context, "faults::nonsense_instead_of_a_proxy", nonsense),
    ]
}

/// `ZdsHello { version: V1 }`.
const HELLO: [u8; 2] = [0x08, 0x01];

/// A client of the agent's socket for node proxies.
struct Client(OwnedFd);

impl Client {
    fn connect(node: &Node) -> Result<Self> {
        let kind = (AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC);
        let socket = socket(kind.0, kind.1, kind.2, None)?;
        connect(socket.as_raw_fd(), &UnixAddr::new(&agent::zds_socket(node.dir()))?)?;
        Ok(Self(socket))
    }

    fn say(&self, packet: &[u8]) -> Result<()> {
        send(self.0.as_raw_fd(), packet, MsgFlags::MSG_NOSIGNAL).map(drop).context("send")
    }

    /// Waits for a packet from the agent.
    fn hear(&self) -> Result<usize> {
        let mut buffer = [0; 1024];
        wait::until("packet from the agent", wait::SOON, || {
            match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => Ok(Some(length)),
                Err(nix::errno::Errno::EAGAIN) => Ok(None),
                Err(error) => Err(error.into()),
            }
        })
    }
}

fn agent_says(node: &Node, what: &str) -> Result<()> {
    wait::until_true(&format!("line with {what:?} in the agent's log"), Duration::from_secs(10), || {
        let log = std::fs::read_to_string(node.dir().join("agent.log"))?;
        Ok(log.lines().any(|line| line.contains(what)))
    })
}

/// These tests are the proxies themselves: by cgroup, their clients would count as the proxy as well.
const IDENTITY: [&str; 2] = ["--proxy-identity", "mark"];

/// It sends a hello and then nothing: an enrollment fails in time and is undone; a working proxy replaces it.
fn never_answers(context: &Context) -> Result<()> {
    let agent_arguments = IDENTITY.map(str::to_owned).to_vec();
    let options = NodeOptions { agent_arguments, proxy: false, ..NodeOptions::default() };
    let node = Node::with(&context.session()?, options)?;
    let (pod, other) = (node.plain("pod", Families::Dual)?, node.plain("other", Families::Dual)?);
    let before = Footprint::of(pod.netns())?;
    let sleeper = Client::connect(&node)?;
    sleeper.say(&HELLO)?;
    ensure!(sleeper.hear()? > 0, "no snapshot");

    let text = restarts::message(pod.enroll())?;
    for wanted in ["proxy", &pod.identity().to_string()] {
        ensure!(text.contains(wanted), "{wanted} is not in {text:?}");
    }
    ensure!(Footprint::of(pod.netns())? == before, "something was left");
    agent_says(&node, "did not answer within")?;

    node.start_proxy()?;
    pod.enroll()?;
    for stack in Stack::ALL {
        outbound::passes_the_proxy_once(&pod, &other, stack)?;
    }
    Ok(())
}

/// Every kind of bad packet, while pods come and go.
fn nonsense(context: &Context) -> Result<()> {
    let node = Node::with_arguments(&context.session()?, &IDENTITY)?;
    let other = node.plain("other", Families::Dual)?;
    let first = node.enrolled("first", Families::Dual)?;

    let silent = Client::connect(&node)?;
    Client::connect(&node)?.say(&[0xff; 700])?;
    Client::connect(&node)?.say(&[])?;
    // Another version of the protocol, and a packet that exceeds every buffer.
    Client::connect(&node)?.say(&[0x08, 0x07])?;
    let talker = Client::connect(&node)?;
    talker.say(&[0x2a; 60_000])?;
    // A proxy by its hello, but with an invalid answer.
    let babbler = Client::connect(&node)?;
    babbler.say(&HELLO)?;
    ensure!(babbler.hear()? > 0, "no snapshot");
    babbler.say(&[0xff; 30])?;

    let second = node.enrolled("second", Families::Dual)?;
    for pod in [&first, &second] {
        for stack in Stack::ALL {
            outbound::passes_the_proxy_once(pod, &other, stack)?;
            inbound::passes_the_proxy_once(other.netns(), pod, stack)?;
        }
    }
    for what in ["it speaks version 7", "it said no hello", "closed the node proxy's connection"] {
        agent_says(&node, what)?;
    }
    drop(silent);
    let [proxy] = &node.status()?.proxies[..] else { anyhow::bail!("{:#?}", node.status()?.proxies) };
    ensure!(proxy.pid == node.proxy_pid()? && proxy.acknowledged == 2, "{proxy:#?}");
    Ok(())
}
