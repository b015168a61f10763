//! Connection events: on while a monitor is attached, and read from the kernel's ring buffer once for all monitors.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use aya::maps::{MapData, RingBuf};
use futures::stream::{self, BoxStream, StreamExt as _};
use nix::time::{ClockId, clock_gettime};
use redirect_ebpf::flow::Flow;
use redirect_ebpf::{Direction, Family, Reason, Verdict};
use tokio::io::unix::AsyncFd;
use tokio::sync::{broadcast, watch};

use super::pods::Pods;
use redirect_datapath::handle::DatapathHandle;
use redirect_datapath::linux::Linux;
use redirect_protocol::pod::PodIdentity;
use redirect_protocol::wire::{Error, ErrorKind, FlowFilter, FlowReport, Reply};

/// How many events a monitor may be behind before it loses some.
const BACKLOG: usize = 8192;

/// Events per packet: each takes up to about 1,100 bytes.
const PACKET: usize = 50;

const MAX_LISTENERS: usize = 32;

/// The path of events from the kernel to monitors.
pub(super) struct Flows {
    events: broadcast::Sender<Arc<FlowReport>>,
    /// The number of monitors.
    listeners: watch::Sender<usize>,
    /// Whether the kernel side reports events.
    on: watch::Receiver<bool>,
    stopped: watch::Receiver<bool>,
    /// Events lost because a monitor was too slow.
    slow: Arc<AtomicU64>,
}

impl Flows {
    /// Reads events while there are monitors, until `stopped`. The reader ends when events are turned off.
    pub(super) async fn start(
        kernel: DatapathHandle<Linux>,
        pods: Arc<Pods<Linux>>,
        stopped: watch::Receiver<bool>,
    ) -> anyhow::Result<(Self, impl Future<Output = anyhow::Result<()>> + use<>)> {
        let ring = kernel.run(Linux::take_flows).await?.context("connection events already have a reader")?;
        let (events, _) = broadcast::channel(BACKLOG);
        let (listeners, wanted) = watch::channel(0);
        let (switch, on) = watch::channel(false);
        // SAFETY: the ring buffer's descriptor never changes, and stays open as long as the buffer exists.
        let ring = unsafe { AsyncFd::register(ring) }?;
        let mut reader = Reader {
            ring,
            kernel,
            events: events.clone(),
            wanted,
            switch,
            names: Names { pods, known: HashMap::new() },
        };
        let mut until = stopped.clone();
        let reading = async move {
            let outcome = tokio::select! {
                _ = until.wait_for(|stop| *stop) => Ok(()),
                outcome = reader.run() => outcome,
            };
            reader.turn(false).await;
            outcome
        };
        Ok((Self { events, listeners, on, stopped, slow: Arc::default() }, reading))
    }

    pub(super) fn listeners(&self) -> usize {
        *self.listeners.borrow()
    }

    pub(super) fn lost_by_listeners(&self) -> u64 {
        self.slow.load(Ordering::Relaxed)
    }

    /// The events that match a filter, in packets; an empty one first, as soon as the kernel side reports
    /// events.
    pub(super) async fn listen(&self, filter: FlowFilter) -> Result<BoxStream<'static, Reply>, Error> {
        let mut place = None;
        self.listeners.send_if_modified(|listeners| {
            if *listeners < MAX_LISTENERS {
                *listeners += 1;
                place = Some(Place(self.listeners.clone()));
            }
            place.is_some()
        });
        let Some(place) = place else {
            let message = format!("{MAX_LISTENERS} others listen already: end some of them");
            return Err(Error::new(ErrorKind::TryAgain, message));
        };
        let (events, mut on) = (self.events.subscribe(), self.on.clone());
        if on.wait_for(|on| *on).await.is_err() {
            return Err(Error::new(
                ErrorKind::Internal,
                "events of connections can't be read; see the agent's log",
            ));
        }
        let listener = Listener {
            events,
            filter,
            stopped: self.stopped.clone(),
            slow: Arc::clone(&self.slow),
            _place: place,
        };
        let begun = Reply::Flows { flows: Vec::new(), lost: 0 };
        Ok(stream::once(async { begun }).chain(stream::unfold(listener, Listener::next)).boxed())
    }
}

/// Counts a monitor while it is attached.
struct Place(watch::Sender<usize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.send_modify(|listeners| *listeners -= 1);
    }
}

struct Listener {
    events: broadcast::Receiver<Arc<FlowReport>>,
    filter: FlowFilter,
    stopped: watch::Receiver<bool>,
    slow: Arc<AtomicU64>,
    _place: Place,
}

impl Listener {
    /// Waits for an event, and returns it with those that are already queued. `None` when the agent ends.
    async fn next(mut self) -> Option<(Reply, Self)> {
        let (mut flows, mut lost) = (Vec::new(), 0);
        while flows.is_empty() && lost == 0 {
            let received = tokio::select! {
                _ = self.stopped.wait_for(|stop| *stop) => return None,
                received = self.events.recv() => received,
            };
            match received {
                Ok(flow) => self.take(&flow, &mut flows),
                Err(broadcast::error::RecvError::Lagged(missed)) => lost += missed,
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
        while flows.len() < PACKET {
            match self.events.try_recv() {
                Ok(flow) => self.take(&flow, &mut flows),
                Err(broadcast::error::TryRecvError::Lagged(missed)) => lost += missed,
                Err(_) => break,
            }
        }
        self.slow.fetch_add(lost, Ordering::Relaxed);
        Some((Reply::Flows { flows, lost }, self))
    }

    fn take(&self, flow: &Arc<FlowReport>, flows: &mut Vec<FlowReport>) {
        if self.filter.wants(flow) {
            flows.push(FlowReport::clone(flow));
        }
    }
}

struct Reader {
    ring: AsyncFd<RingBuf<MapData>>,
    kernel: DatapathHandle<Linux>,
    events: broadcast::Sender<Arc<FlowReport>>,
    wanted: watch::Receiver<usize>,
    switch: watch::Sender<bool>,
    names: Names,
}

impl Reader {
    /// Runs until an error occurs.
    async fn run(&mut self) -> anyhow::Result<()> {
        loop {
            self.wanted.wait_for(|listeners| *listeners > 0).await?;
            // Events that a previous agent did not read.
            while self.ring.get_mut().next().is_some() {}
            self.kernel.run(|linux| linux.tell_flows(true)).await??;
            self.switch.send_replace(true);
            loop {
                let deserted = tokio::select! {
                    none = self.wanted.wait_for(|listeners| *listeners == 0) => none.map(|_| true)?,
                    ready = self.ring.readable_mut() => {
                        ready?.clear_ready();
                        false
                    }
                };
                if deserted {
                    // New monitors wait until events are on again.
                    self.switch.send_replace(false);
                    if *self.wanted.borrow() == 0 {
                        break;
                    }
                    self.switch.send_replace(true);
                }
                self.read();
            }
            self.turn(false).await;
            self.names.known.clear();
        }
    }

    async fn turn(&self, on: bool) {
        self.switch.send_replace(on);
        match self.kernel.run(move |linux| linux.tell_flows(on)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(error = format!("{error:#}"), "cannot switch connection events on or off");
            }
            Err(error) => tracing::warn!(%error, "cannot switch connection events on or off"),
        }
    }

    /// Forwards all available events.
    fn read(&mut self) {
        let began = since_boot();
        let now = jiff::Timestamp::now();
        while let Some(flow) = self.ring.get_mut().next().and_then(|event| flow(&event)) {
            let pod = self.names.of(flow.netns_cookie);
            let ago = jiff::SignedDuration::from_nanos(began.cast_signed() - flow.time.cast_signed());
            let time = now.checked_sub(ago).unwrap_or(now);
            // An error means that no monitor is attached any more.
            let _ = self.events.send(Arc::new(report(&flow, pod, time)));
        }
    }
}

/// The pods by the cookies of their namespaces.
struct Names {
    pods: Arc<Pods<Linux>>,
    /// Pods of earlier events, for the last events of pods that are gone.
    known: HashMap<u64, PodIdentity>,
}

impl Names {
    fn of(&mut self, netns_cookie: u64) -> Option<PodIdentity> {
        if let Some(pod) = self.pods.owner(netns_cookie) {
            self.known.insert(netns_cookie, pod);
        }
        self.known.get(&netns_cookie).cloned()
    }
}

/// Nanoseconds of the kernel side's clock.
fn since_boot() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |time| Duration::from(time).as_nanos().try_into().unwrap_or(u64::MAX))
}

fn flow(event: &[u8]) -> Option<Flow> {
    let event: &[u8; size_of::<Flow>()] = event.try_into().ok()?;
    // SAFETY: the sizes are the same, and every bit pattern is valid.
    Some(unsafe { event.as_ptr().cast::<Flow>().read_unaligned() })
}

fn report(flow: &Flow, pod: Option<PodIdentity>, time: jiff::Timestamp) -> FlowReport {
    let family = if flow.family == Family::Ipv4 as u8 { Family::Ipv4 } else { Family::Ipv6 };
    let tuple = &flow.tuple;
    FlowReport {
        time,
        pod,
        family: family.to_string(),
        direction: label(Direction::ALL, Direction::label, flow.direction),
        source: end(family, tuple.source, tuple.source_port),
        destination: end(family, tuple.destination, tuple.destination_port),
        verdict: label(Verdict::ALL, Verdict::label, flow.verdict),
        reason: label(Reason::ALL, Reason::label, flow.reason),
        socket_cookie: (flow.socket_cookie != 0).then_some(flow.socket_cookie),
    }
}

fn label<T: Copy>(all: &[T], label: impl Fn(T) -> &'static str, number: u8) -> String {
    all.get(usize::from(number)).map_or("unknown", |value| label(*value)).into()
}

/// `None`: neither address nor port is known.
fn end(family: Family, address: [u8; 16], port: [u8; 2]) -> Option<SocketAddr> {
    let [.., a, b, c, d] = address;
    let address = match family {
        Family::Ipv4 => IpAddr::from([a, b, c, d]),
        Family::Ipv6 => Ipv6Addr::from(address).into(),
    };
    let port = u16::from_be_bytes(port);
    (!address.is_unspecified() || port != 0).then_some(SocketAddr::new(address, port))
}

#[cfg(test)]
mod tests {
    use redirect_ebpf::maps::Tuple;

    use super::*;

    fn event(family: Family, source: [u8; 16], source_port: u16) -> Flow {
        let destination = Ipv6Addr::from(0xffff_c000_0201).octets();
        let tuple = Tuple {
            source,
            destination,
            source_port: source_port.to_be_bytes(),
            destination_port: 80u16.to_be_bytes(),
        };
        Flow {
            time: 5,
            netns_cookie: 1,
            socket_cookie: 0,
            tuple,
            family: family as u8,
            direction: Direction::Inbound as u8,
            verdict: Verdict::Dropped as u8,
            reason: Reason::MarkFailed as u8,
        }
    }

    #[test]
    fn an_event_is_told_in_words() {
        let told = report(&event(Family::Ipv4, [0; 16], 0), None, jiff::Timestamp::UNIX_EPOCH);
        assert_eq!((told.family.as_str(), told.direction.as_str()), ("IPv4", "inbound"));
        assert_eq!((told.verdict.as_str(), told.reason.as_str()), ("dropped", "mark_failed"));
        assert_eq!((told.source, told.destination), (None, Some("192.0.2.1:80".parse().unwrap())));
        assert_eq!(told.socket_cookie, None);
        let bound = report(&event(Family::Ipv6, [0; 16], 15001), None, jiff::Timestamp::UNIX_EPOCH);
        assert_eq!(bound.source, Some("[::]:15001".parse().unwrap()));
    }

    #[tokio::test]
    async fn a_listener_that_is_too_slow_hears_how_much_it_missed() {
        let (events, receiver) = broadcast::channel(4);
        let (listeners, _) = watch::channel(1);
        let (stop, stopped) = watch::channel(false);
        let slow = Arc::<AtomicU64>::default();
        let filter = FlowFilter { family: Some("IPv6".into()), ..FlowFilter::default() };
        let place = Place(listeners.clone());
        let listener = Listener { events: receiver, filter, stopped, slow: Arc::clone(&slow), _place: place };
        for number in 0..10 {
            let family = if number % 2 == 0 { Family::Ipv4 } else { Family::Ipv6 };
            let told = report(&event(family, [0; 16], 0), None, jiff::Timestamp::UNIX_EPOCH);
            events.send(Arc::new(told)).unwrap();
        }
        let (reply, listener) = listener.next().await.unwrap();
        let Reply::Flows { flows, lost } = reply else { panic!("{reply:?}") };
        // Of the last four, two match the family.
        assert_eq!((flows.len(), lost, slow.load(Ordering::Relaxed)), (2, 6, 6));
        stop.send_replace(true);
        assert!(listener.next().await.is_none(), "the agent ends, and so do its listeners");
        assert_eq!(*listeners.borrow(), 0);
    }

    #[test]
    fn events_of_another_size_are_none() {
        assert_eq!(flow(&[0; 63]), None);
        assert!(flow(&[0; 64]).is_some());
    }
}
