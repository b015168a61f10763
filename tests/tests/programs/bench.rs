//! Loaded programs, and namespaces to run them in.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, SockHash};
use aya::programs::{SchedClassifier, SkLookup, TestRun, TestRunOptions};
use aya::{Ebpf, Pod};
use redirect_datapath::linux::{self, Capacities, NotedBy, ProxyIdentity, Settings, TcMethod};
use redirect_ebpf::constants::{MARK_PROXY, PORT_INBOUND, PORT_OUTBOUND, PORT_TUNNEL};
use redirect_ebpf::count::{self, Direction, Reason, Verdict};
use redirect_ebpf::family::Family;
use redirect_ebpf::flow::FlowLimits;
use redirect_ebpf::maps::{Config, ConfigFlags, ListenerKey, PodAddress};
use redirect_protocol::placement::Placement;
use redirect_tests::Netns;
use socket2::{Domain, Socket, Type};

use crate::lookup;
use crate::packets::{POD_IPV4, POD_IPV6};

/// The TC programs.
pub(crate) const PROGRAMS: [&str; 6] =
    ["inbound_ipv4", "inbound_ipv6", "loopback_ipv4", "loopback_ipv6", "egress_ipv4", "egress_ipv6"];

/// The programs on the socket lookup.
const LOOKUPS: [&str; 2] = ["noted_listener", "listener_guard"];

/// The programs and their surroundings.
pub(crate) struct Bench {
    programs: Mutex<Ebpf>,
    counters: PerCpuArray<MapData, u64>,
    /// A namespace with listeners like a proxy's.
    served: Netns,
    /// One without.
    deserted: Netns,
    listeners: Vec<Socket>,
    /// Of the pod's namespace.
    cookie: u64,
}

/// Whether a proxy listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Proxy {
    /// It does.
    Listens,
    /// It does not.
    Absent,
}

/// The fate of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// The proxy gets it, as an enrolled pod's connection.
    Captured,
    /// The proxy's listener for tunnels gets it.
    Tunnelled,
    /// It passes uncounted.
    Untouched,
    /// It passes, and was counted.
    Passed(Reason),
    /// It is dropped, and was counted.
    Dropped(Reason),
    /// It passes to the socket lookup, which refuses it, and was counted.
    Refused(Reason),
}

/// `TC_ACT_UNSPEC`, `TC_ACT_SHOT` and `TC_ACT_REDIRECT`.
const UNSPEC: u32 = u32::MAX;
const SHOT: u32 = 2;
const REDIRECT: u32 = 7;

/// A TC program's verdict on a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Code {
    /// It passes.
    Continues,
    /// It is redirected to another device, with this mark.
    Redirected(u32),
    /// It is dropped.
    Dropped,
    /// It was turned into its own answer.
    Answered,
}

/// A count: the family, the way, the verdict and the reason.
pub(crate) type Counted = (Family, Direction, Verdict, Reason);

impl Bench {
    pub(crate) fn new() -> Result<Self> {
        Self::with(object(false)?)
    }

    /// As [`Bench::new`], with the programs of a placement.
    pub(crate) fn placed(placement: Placement) -> Result<Self> {
        let capacities = Capacities { pods: 4, addresses: 8, exclusions: 16 };
        let mut programs = linux::load(&Settings { placement, capacities, ..settings() })?;
        load(&mut programs, &["host_gate", "from_pod_ipv4", "from_pod_ipv6", "to_pod_ipv4", "to_pod_ipv6"])?;
        Self::with(programs)
    }

    /// As [`Bench::new`], with an object whose programs are not loaded yet.
    pub(crate) fn with(mut programs: Ebpf) -> Result<Self> {
        load(&mut programs, &PROGRAMS)?;
        for name in LOOKUPS {
            let program = programs.program_mut(name).context(name)?;
            <&mut SkLookup>::try_from(program)?.load().context(name)?;
        }
        let (served, deserted) = (Netns::new("served")?, Netns::new("deserted")?);
        let listeners =
            [PORT_OUTBOUND, PORT_INBOUND, PORT_TUNNEL].map(|port| served.run(|| listener(port, true)));
        let listeners = listeners.into_iter().map(|listener| Ok(listener??)).collect::<Result<_>>()?;

        // The addresses may belong to any namespace here, as long as it is a pod's.
        let cookie = served.cookie()?;
        insert(&mut programs, "PODS", cookie, redirect_ebpf::maps::Pod::default())?;
        insert(&mut programs, "POD_IPV4", POD_IPV4, PodAddress { netns_cookie: cookie })?;
        insert(&mut programs, "POD_IPV6", POD_IPV6, PodAddress { netns_cookie: cookie })?;
        configure(&mut programs, ConfigFlags::PROXY_BY_MARK)?;
        let counters = PerCpuArray::try_from(take(&mut programs, "COUNTERS")?)?;
        Ok(Self { programs: Mutex::new(programs), counters, served, deserted, listeners, cookie })
    }

    /// Runs a program on a packet and returns its fate. Fails if the results contradict each other.
    pub(crate) fn run(&self, name: &str, proxy: Proxy, packet: &[u8], mark: u32) -> Result<Fate> {
        self.run_and(name, proxy, packet, mark, true)
    }

    /// As [`Bench::run`], without the socket lookup that may follow.
    pub(crate) fn run_alone(&self, name: &str, proxy: Proxy, packet: &[u8], mark: u32) -> Result<Fate> {
        self.run_and(name, proxy, packet, mark, false)
    }

    fn run_and(&self, name: &str, proxy: Proxy, packet: &[u8], mark: u32, look_up: bool) -> Result<Fate> {
        let family = if name.ends_with('4') { Family::Ipv4 } else { Family::Ipv6 };
        let programs = self.lock();
        let before = self.counts()?;
        let code = self.netns(proxy).run(|| -> Result<u32> {
            let code = run(&programs, name, packet, mark)?;
            // Connections that the program could not assign itself are counted at the socket lookup.
            if look_up
                && code == UNSPEC
                && let Some(tuple) = lookup::query_of_syn(family, packet)
            {
                lookup::run(&programs, LOOKUPS[0], &tuple)?;
            }
            Ok(code)
        })??;
        let after = self.counts()?;
        let grown: Vec<Counted> = places()
            .zip(before.iter().zip(&after))
            .flat_map(|(place, (before, after))| {
                std::iter::repeat_n(place, usize::try_from(after - before).unwrap_or(usize::MAX))
            })
            .collect();
        let way = if name.starts_with("inbound") { Direction::Inbound } else { Direction::Outbound };
        match (code, &grown[..]) {
            (UNSPEC, []) => Ok(Fate::Untouched),
            (UNSPEC, &[(f, w, Verdict::Captured, Reason::Enrolled)]) if (f, w) == (family, way) => {
                Ok(Fate::Captured)
            }
            (UNSPEC, &[(f, w, Verdict::Captured, Reason::TunnelPort)]) if (f, w) == (family, way) => {
                Ok(Fate::Tunnelled)
            }
            (UNSPEC, &[(f, w, Verdict::Passed, reason)]) if (f, w) == (family, way) => {
                Ok(Fate::Passed(reason))
            }
            (UNSPEC, &[(f, w, Verdict::Dropped, reason)]) if (f, w) == (family, way) => {
                Ok(Fate::Refused(reason))
            }
            (SHOT, &[(f, w, Verdict::Dropped, reason)]) if (f, w) == (family, way) => {
                Ok(Fate::Dropped(reason))
            }
            other => anyhow::bail!("{name} returned and counted {other:?}"),
        }
    }

    /// The outcome of a connection at the socket lookup, and its counts.
    pub(crate) fn look_up(&self, tuple: &lookup::Query) -> Result<(lookup::Outcome, Vec<Counted>)> {
        let programs = self.lock();
        let before = self.counts()?;
        let outcome = ask(&programs, tuple)?;
        let after = self.counts()?;
        let grown = places().zip(before.iter().zip(&after)).filter(|(_, (before, after))| after > before);
        Ok((outcome, grown.map(|(place, _)| place).collect()))
    }

    /// The same with these flags of the node, in addition to the one that identifies the proxy by its mark. Not for the shared
    /// bench, because tests run concurrently.
    pub(crate) fn configured(self, flags: ConfigFlags) -> Result<Self> {
        configure(&mut self.lock(), flags.with(ConfigFlags::PROXY_BY_MARK, true))?;
        Ok(self)
    }

    /// Runs a program on many packets. Returns how often it dropped one, and how much it counted.
    pub(crate) fn run_many(
        &self,
        name: &str,
        proxy: Proxy,
        mut next: impl FnMut(&mut Vec<u8>) -> Option<u32> + Send,
    ) -> Result<Many> {
        let programs = self.lock();
        let before: u64 = self.counts()?.iter().sum();
        let mut many = Many::default();
        self.netns(proxy).run(|| -> Result<()> {
            let mut packet = Vec::new();
            while let Some(mark) = next(&mut packet) {
                match run(&programs, name, &packet, mark)? {
                    UNSPEC => {}
                    SHOT => many.dropped += 1,
                    code => anyhow::bail!("{name} returned {code} on {packet:02x?}"),
                }
                many.packets += 1;
            }
            Ok(())
        })??;
        many.counted = self.counts()?.iter().sum::<u64>() - before;
        Ok(many)
    }

    /// A program's verdict on a packet.
    pub(crate) fn judge(&self, name: &str, proxy: Proxy, packet: &[u8], mark: u32) -> Result<Code> {
        let programs = self.lock();
        let ran = self.netns(proxy).run(|| test_run(&programs, name, packet, mark, 1))??;
        match ran.code {
            REDIRECT if ran.changed => Ok(Code::Answered),
            UNSPEC => Ok(Code::Continues),
            REDIRECT => Ok(Code::Redirected(ran.mark)),
            SHOT => Ok(Code::Dropped),
            other => anyhow::bail!("{name} returned {other}"),
        }
    }

    /// The outcome of a connection at the socket lookup.
    pub(crate) fn ask(&self, query: &lookup::Query) -> Result<lookup::Outcome> {
        ask(&self.lock(), query)
    }

    /// Runs a program on a packet in the namespace of the caller.
    pub(crate) fn run_here(&self, name: &str, packet: &[u8]) -> Result<u32> {
        run(&self.lock(), name, packet, 0)
    }

    /// The cookie of the listener that the socket lookup chooses for a connection; zero if there is no note.
    pub(crate) fn chosen(&self, query: &lookup::Query) -> Result<u64> {
        lookup::run_and_read(&self.lock(), LOOKUPS[0], query).map(|(_, cookie)| cookie)
    }

    /// Has the maps of the programs changed.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut Ebpf, u64) -> Result<T>) -> Result<T> {
        change(&mut self.lock(), self.cookie)
    }

    /// The size of a program.
    pub(crate) fn size(&self, name: &str) -> Result<Size> {
        Size::of(&self.lock(), name)
    }

    /// The run time of a program for a packet.
    pub(crate) fn time(&self, name: &str, proxy: Proxy, packet: &[u8], mark: u32) -> Result<Duration> {
        let programs = self.lock();
        self.netns(proxy).run(|| test_run(&programs, name, packet, mark, 200_000).map(|run| run.time))?
    }

    /// Fills the map of listeners with arbitrary entries, so that there is no room for others.
    pub(crate) fn fill_listeners(&self) -> Result<()> {
        let mut programs = self.lock();
        let map = programs.map_mut("LISTENERS").context("map LISTENERS")?;
        let mut listeners = SockHash::<_, [u8; size_of::<ListenerKey>()]>::try_from(map)?;
        for number in 0.. {
            let mut key = [0xff; size_of::<ListenerKey>()];
            key[0] = number;
            match listeners.insert(key, self.listeners[0].as_raw_fd(), 0) {
                Ok(()) => {}
                Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::E2BIG) => {
                    break;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn netns(&self, proxy: Proxy) -> &Netns {
        match proxy {
            Proxy::Listens => &self.served,
            Proxy::Absent => &self.deserted,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Ebpf> {
        self.programs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn counts(&self) -> Result<Vec<u64>> {
        places()
            .map(|(family, way, verdict, reason)| {
                let place = count::index(family, way, verdict, reason);
                Ok(self.counters.get(&place, 0)?.iter().sum())
            })
            .collect()
    }
}

/// The object, with its maps. None of its programs is loaded yet.
pub(crate) fn object(diagnostics: bool) -> Result<Ebpf> {
    linux::load(&Settings { diagnostics, ..settings() })
}

fn settings() -> Settings {
    Settings {
        cgroup: PathBuf::new(),
        capacities: Capacities { pods: 4, addresses: 4, exclusions: 4 },
        tc: TcMethod::Clsact,
        refuse: false,
        link_local: false,
        host_cookie: 0,
        exclusions: BTreeSet::new(),
        proxy_identity: ProxyIdentity::Mark,
        proxy_cgroups: BTreeMap::new(),
        placement: Placement::Pod,
        rule_priority: 0,
        flows: FlowLimits::default(),
        diagnostics: false,
        object: None,
        noted_by: NotedBy::Tc,
    }
}

/// Has the kernel check the programs.
pub(crate) fn load(programs: &mut Ebpf, names: &[&str]) -> Result<()> {
    for name in names {
        let program = programs.program_mut(name).with_context(|| name.to_string())?;
        <&mut SchedClassifier>::try_from(program)?.load().with_context(|| name.to_string())?;
    }
    Ok(())
}

/// The size of a program in the kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    /// Instructions that the verifier processed before it accepted the program.
    pub(crate) verified: u32,
    /// Bytes of translated instructions.
    pub(crate) translated: u32,
}

impl Size {
    pub(crate) fn of(programs: &Ebpf, name: &str) -> Result<Self> {
        let info = programs.program(name).with_context(|| name.to_owned())?.info()?;
        let verified = info.verified_instruction_count().context("Linux 5.16")?;
        Ok(Self { verified, translated: info.size_translated().context("CAP_BPF")? })
    }
}

/// What [`Bench::run_many`] saw.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Many {
    pub(crate) packets: u64,
    pub(crate) dropped: u64,
    pub(crate) counted: u64,
}

impl fmt::Display for Many {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} packets, {} dropped, {} counted", self.packets, self.dropped, self.counted)
    }
}

fn places() -> impl Iterator<Item = Counted> {
    Family::ALL.into_iter().flat_map(|family| {
        Direction::ALL.iter().flat_map(move |&way| {
            Verdict::ALL.iter().flat_map(move |&verdict| {
                Reason::ALL.iter().map(move |&reason| (family, way, verdict, reason))
            })
        })
    })
}

/// The combined verdict of the programs on the socket lookup.
fn ask(programs: &Ebpf, query: &lookup::Query) -> Result<lookup::Outcome> {
    let [chosen, gate] =
        [lookup::run(programs, LOOKUPS[0], query)?, lookup::run(programs, LOOKUPS[1], query)?];
    Ok(match (chosen, gate) {
        (lookup::Outcome::Chosen, _) => lookup::Outcome::Chosen,
        (lookup::Outcome::Passed, lookup::Outcome::Passed) => lookup::Outcome::Passed,
        _ => lookup::Outcome::Refused,
    })
}

/// In the namespace of the calling thread.
fn run(programs: &Ebpf, name: &str, packet: &[u8], mark: u32) -> Result<u32> {
    let ran = test_run(programs, name, packet, mark, 1)?;
    ensure!(!ran.changed, "{name} changed the packet {packet:02x?}");
    Ok(ran.code)
}

/// The result of a test run.
struct Run {
    code: u32,
    /// The packet's mark after the program.
    mark: u32,
    /// Whether the program changed the packet.
    changed: bool,
    time: Duration,
}

fn test_run(programs: &Ebpf, name: &str, packet: &[u8], mark: u32, repeat: u32) -> Result<Run> {
    let program: &SchedClassifier = programs.program(name).context("a program")?.try_into()?;
    // In `struct __sk_buff` only the mark, its third word, may differ from zero.
    const MARK: std::ops::Range<usize> = 8..12;
    let mut context = [0; 192];
    context[MARK].copy_from_slice(&mark.to_ne_bytes());
    let (mut output, mut after) = ([0; 2048], [0; 192]);
    let options = TestRunOptions {
        data_in: Some(packet),
        data_out: Some(&mut output),
        ctx_in: Some(&context),
        ctx_out: Some(&mut after),
        repeat,
        ..TestRunOptions::default()
    };
    let result = program.test_run(options).with_context(|| format!("{name} on {packet:02x?}"))?;
    let changed = output.get(..packet.len()) != Some(packet);
    let mark = after[MARK].first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes));
    Ok(Run { code: result.return_value, mark, changed, time: result.duration })
}

/// A listener as a node proxy opens it, with or without SO_REUSEPORT.
pub(crate) fn listener(port: u16, shares: bool) -> std::io::Result<Socket> {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, None)?;
    socket.set_mark(MARK_PROXY)?;
    socket.set_reuse_port(shares)?;
    socket.set_ip_transparent_v6(true)?;
    socket.set_only_v6(false)?;
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
    socket.listen(16)?;
    Ok(socket)
}

pub(crate) fn configure(programs: &mut Ebpf, flags: ConfigFlags) -> Result<()> {
    let mut config = Array::<_, Config>::try_from(programs.map_mut("CONFIG").context("CONFIG")?)?;
    Ok(config.set(0, Config { flags: flags.0.into(), ..Config::default() }, 0)?)
}

fn take(programs: &mut Ebpf, name: &str) -> Result<Map> {
    programs.take_map(name).with_context(|| format!("map {name}"))
}

fn insert<K: Pod, V: Pod>(programs: &mut Ebpf, name: &str, key: K, value: V) -> Result<()> {
    let mut map = HashMap::<_, K, V>::try_from(programs.map_mut(name).context("a map")?)?;
    Ok(map.insert(key, value, 0)?)
}
