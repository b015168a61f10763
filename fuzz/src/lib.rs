//! Fuzz targets for the parsers of untrusted bytes: functions that panic if an invariant is violated.
//!
//! `cargo test` replays the corpora and mutates them for a bounded time, on stable Rust (`tests/bounded.rs`).
//! `cargo +nightly fuzz run --features libfuzzer TARGET` searches for longer, guided by coverage.

use std::fmt::Debug;

use redirect_agent::install;
use redirect_ebpf::decide::Protocol;
use redirect_ebpf::family::{Ipv4, Ipv6};
use redirect_ebpf::packet::{self, Packet, Parse, Parsed, Segment};
use redirect_protocol::wire;
use redirect_zds::messages::{Hello, WorkloadRequest, WorkloadResponse};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

/// A target.
pub type Target = fn(&[u8]);

/// Every target, by the name of its corpus.
pub const TARGETS: [(&str, Target); 6] = [
    ("wire", wire),
    ("zds", zds),
    ("conflist", conflist),
    ("cni_config", cni_config),
    ("cni_result", cni_result),
    ("packet", packet),
];

/// Requests of plugin and command line, and the agent's replies: parsed messages survive another round trip.
pub fn wire(data: &[u8]) {
    fn journey<T: Serialize + DeserializeOwned + PartialEq + Debug>(data: &[u8]) {
        if let Ok(message) = wire::decode::<T>(data) {
            match wire::encode(&message) {
                Ok(packet) => assert_eq!(wire::decode::<T>(&packet).ok(), Some(message)),
                // Escapes may make it longer.
                Err(error) => assert!(data.len() > wire::MAX_PACKET / 6, "{error}"),
            }
        }
    }
    journey::<wire::Request>(data);
    journey::<wire::Reply>(data);
}

/// ZDS, both directions: parsed messages survive another round trip.
pub fn zds(data: &[u8]) {
    macro_rules! journey {
        ($message:ty) => {
            if let Ok(message) = redirect_zds::packet::decode::<$message>(data)
                && let Ok(packet) = redirect_zds::packet::encode(&message)
            {
                assert!(packet.len() <= redirect_zds::MAX_PACKET);
                assert_eq!(redirect_zds::packet::decode::<$message>(&packet).ok(), Some(message));
            }
        };
    }
    journey!(Hello);
    journey!(WorkloadRequest);
    journey!(WorkloadResponse);
}

/// CNI configurations of the node: the plugin is added once and last, whatever the input, and removed without a
/// trace.
pub fn conflist(data: &[u8]) {
    for name in ["10-primary.conflist", "10-primary.conf"] {
        let Ok(chained) = install::chained(name, data, &entry()) else { continue };
        assert_eq!(ours(&chained), [types(&chained).len() - 1], "{chained}");
        let written = chained.to_string().into_bytes();
        let again = install::chained("10-primary.conflist", &written, &entry());
        assert_eq!(again.as_ref(), Ok(&chained));
        let without = install::unchained("10-primary.conflist", &written).unwrap_or_default();
        assert!(ours(&without).is_empty() && !types(&without).is_empty(), "{without}");
        assert_eq!(install::unchained(name, data), Ok(without));
    }
}

fn entry() -> Map<String, Value> {
    let entry = json!({ "type": install::PLUGIN, "agentSocket": "/run/ambient-redirect/agent.sock" });
    entry.as_object().cloned().unwrap_or_default()
}

fn types(list: &Value) -> Vec<&str> {
    let plugins = list["plugins"].as_array().into_iter().flatten();
    plugins.filter_map(|plugin| plugin["type"].as_str()).collect()
}

/// The places of our entry.
fn ours(list: &Value) -> Vec<usize> {
    let types = types(list);
    (0..types.len()).filter(|place| types[*place] == install::PLUGIN).collect()
}

/// The plugin's standard input: accepted values are within their documented bounds.
pub fn cni_config(data: &[u8]) {
    if let Ok(config) = redirect_cni::Config::parse(data) {
        assert!(config.agent_socket.is_absolute());
        assert!((1..=3600).contains(&config.timeout.as_secs()));
        if let Some(result) = &config.prev_result {
            addresses(result);
        }
    }
}

/// Results of earlier plugins: a pod has an address, or there is an error.
pub fn cni_result(data: &[u8]) {
    if let Ok(result) = serde_json::from_slice::<Value>(data) {
        addresses(&result);
    }
}

fn addresses(result: &Value) {
    if let Ok(addresses) = redirect_cni::addresses(result) {
        assert!(addresses.iter().next().is_some());
    }
}

/// The kernel side's parser. The first two bytes are the EtherType, the others the packet from its network header.
pub fn packet(data: &[u8]) {
    let Some((ether_type, bytes)) = data.split_first_chunk() else { return };
    let packet = Bytes { ether_type: u16::from_be_bytes(*ether_type), bytes };
    parsed::<Ipv4>(&packet);
    parsed::<Ipv6>(&packet);
}

/// Whether the parser finds a whole TCP header in an input of [`packet()`].
#[must_use]
pub fn is_tcp(data: &[u8]) -> bool {
    data.split_first_chunk().is_some_and(|(ether_type, bytes)| {
        let packet = Bytes { ether_type: u16::from_be_bytes(*ether_type), bytes };
        matches!(packet::parse::<Ipv4>(&packet), Parsed::Tcp(_))
            || matches!(packet::parse::<Ipv6>(&packet), Parsed::Tcp(_))
    })
}

struct Bytes<'a> {
    ether_type: u16,
    bytes: &'a [u8],
}

impl Packet for Bytes<'_> {
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.bytes.get(usize::try_from(offset).ok()?..)?.first_chunk().copied()
    }

    fn ether_type(&self) -> u16 {
        self.ether_type
    }
}

fn parsed<I: Parse<Address: PartialEq>>(packet: &Bytes<'_>) {
    /// The length of a TCP header up to its flags.
    const TCP: usize = 14;
    const PORTS: usize = 4;
    let found = packet::parse::<I>(packet);
    let (segment, length) = match &found {
        Parsed::Tcp(segment) => (Some(segment), TCP),
        Parsed::Fragment(segment) | Parsed::Datagram(segment) => (Some(segment), PORTS),
        _ => (None, 0),
    };
    if let Some(segment) = segment {
        within::<I>(packet, segment, length);
        assert!(!packet::is_of_another_family::<I>(packet));
        assert_eq!(packet::source::<I>(packet), Some(segment.source));
    }
    // The fast path finds the same as the full parser.
    if packet.ether_type() == I::ETHER_TYPE {
        if let Some(plain) = I::plain(packet, Protocol::Tcp) {
            assert_eq!(found, Parsed::Tcp(plain));
        }
        if let Some(plain) = I::plain(packet, Protocol::Udp) {
            assert_eq!(found, Parsed::Datagram(plain));
        }
    }
    if let Some(segment) = packet::complained_of::<I>(packet) {
        within::<I>(packet, &segment.reversed(), PORTS);
    }
}

/// A segment matches the bytes at its offset.
fn within<I: Parse>(packet: &Bytes<'_>, segment: &Segment<I::Address>, length: usize) {
    let transport = segment.transport_offset as usize;
    assert!(segment.network_offset < segment.transport_offset);
    assert!(transport + length <= packet.bytes.len());
    assert_eq!(packet.bytes[transport..transport + 2], segment.source_port);
    assert_eq!(packet.bytes[transport + 2..transport + 4], segment.destination_port);
    assert_eq!(I::load(packet, segment.network_offset + I::SOURCE), Some(segment.source));
    assert_eq!(I::load(packet, segment.network_offset + I::DESTINATION), Some(segment.destination));
}
