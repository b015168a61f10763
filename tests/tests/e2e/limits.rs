//! Many pods, and more pods than the maps can hold.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use libtest_mimic::Trial;
use redirect_tests::{Families, Node, NodeOptions, Pod, Stack, cni};

use crate::context::{Context, trial};
use crate::{exclusions, inbound, outbound, restarts};

pub(crate) fn trials(context: &Arc<Context>) -> Vec<Trial> {
    vec![
        trial(context, "limits::full_map_names_the_pod", full_map),
        trial(context, "limits::two_hundred_pods", two_hundred_pods),
        trial(context, "limits::gc_of_a_large_node", gc_of_a_large_node),
    ]
}

fn full_map(context: &Context) -> Result<()> {
    let agent_arguments = vec!["--max-pods".to_owned(), "2".to_owned()];
    let node = Node::with(&context.session()?, NodeOptions { agent_arguments, ..NodeOptions::default() })?;
    let (first, second) = (node.enrolled("first", Families::Dual)?, node.enrolled("second", Families::Dual)?);
    let third = node.plain("third", Families::Dual)?;
    let text = restarts::message(third.enroll())?;
    for wanted in [third.identity().to_string().as_str(), "2"] {
        ensure!(text.contains(wanted), "{wanted} is not in {text:?}");
    }
    for stack in Stack::ALL {
        for pod in [&first, &second] {
            outbound::passes_the_proxy_once(pod, &third, stack)?;
            inbound::passes_the_proxy_once(third.netns(), pod, stack)?;
        }
    }
    first.unenroll()?;
    third.enroll().context("with room again")?;
    for stack in Stack::ALL {
        outbound::passes_the_proxy_once(&third, &first, stack)?;
    }
    Ok(())
}

/// The runtime's list of valid attachments may be as long as a node can have pods.
fn gc_of_a_large_node(context: &Context) -> Result<()> {
    const VALID: usize = 5_000;
    let node = Node::start(&context.session()?)?;
    let (stays, goes) = (node.enrolled("stays", Families::Dual)?, node.enrolled("goes", Families::Dual)?);
    let others: Vec<String> = (1..VALID).map(|number| format!("{number:064x}")).collect();
    let mut valid: Vec<(&str, &str)> = others.iter().map(|id| (id.as_str(), "eth0")).collect();
    valid.push((&stays.sandbox().container_id, &stays.sandbox().interface));
    node.chain(Families::Dual, &[]).gc(cni::REDIRECT, node.netns(), &valid)?;
    ensure!(node.report(&goes)?.is_none(), "{:?}", node.report(&goes)?);
    let (status, text) = exclusions::refused(context, &["--max-pods", "65537"])?;
    ensure!(status.code() == Some(2) && text.contains("65536"), "{status}: {text}");
    stays.check()?;
    for stack in Stack::ALL {
        outbound::passes_the_proxy_once(&stays, &goes, stack)?;
        inbound::passes_the_proxy_once(goes.netns(), &stays, stack)?;
    }
    Ok(())
}

fn two_hundred_pods(context: &Context) -> Result<()> {
    const PODS: usize = 200;
    const AT_ONCE: usize = 4;
    let node = Node::start(&context.session()?)?;
    let pods = at_once(AT_ONCE, (0..PODS).collect(), |_| node.plain("pod", Families::Dual))?;

    let start = Instant::now();
    let mut times = at_once(AT_ONCE, pods.iter().collect(), |pod| timed(|| pod.enroll()))?;
    let enrolled = start.elapsed();
    times.sort_unstable();
    println!(
        "{PODS} pods enrolled in {enrolled:?}, {AT_ONCE} at a time; ADD of redirect-cni: median {:?}, slowest {:?}",
        times[PODS / 2],
        times[PODS - 1],
    );
    ensure!(node.with_agent(|agent| agent.pods())?.len() == PODS);
    let status = node.status()?;
    ensure!(status.proxies.iter().any(|proxy| proxy.acknowledged == PODS), "{:#?}", status.proxies);
    for (client, server) in [(&pods[0], &pods[PODS - 1]), (&pods[PODS - 1], &pods[PODS / 2])] {
        for stack in Stack::ALL {
            let listening = server.listen(stack)?;
            let to = server.endpoint(stack.family(), listening.port())?;
            client.connect(stack, to)?.exchange("hello")?;
            ensure!(client.proxied(redirect_tests::Direction::Outbound, to)?.len() == 1);
            ensure!(server.proxied(redirect_tests::Direction::Inbound, to)?.len() == 1);
        }
    }

    let start = Instant::now();
    at_once(AT_ONCE, pods.iter().collect(), |pod: &Pod| pod.unenroll())?;
    println!("{PODS} pods un-enrolled in {:?}", start.elapsed());
    ensure!(node.with_agent(|agent| agent.pods())?.is_empty());
    // Each one has a device to remove, which the kernel does one after the other unless they are removed
    // concurrently.
    at_once(AT_ONCE, pods, |mut pod| pod.delete())?;
    Ok(())
}

pub(crate) fn timed(act: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let start = Instant::now();
    act()?;
    Ok(start.elapsed())
}

/// Runs `work` for every item, several at a time.
pub(crate) fn at_once<I: Send, T: Send>(
    threads: usize,
    items: Vec<I>,
    act: impl Fn(I) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let queue = std::sync::Mutex::new(items.into_iter());
    let next = || queue.lock().ok().and_then(|mut items| items.next());
    thread::scope(|scope| {
        let worker = || -> Result<Vec<T>> { std::iter::from_fn(next).map(&act).collect() };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        let mut done = Vec::new();
        for worker in workers {
            done.extend(worker.join().map_err(|_| anyhow!("a worker panicked"))??);
        }
        Ok(done)
    })
}
