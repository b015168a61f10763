//! Constants of the data path: marks, ports, routing table and rule priorities.

/// The bits of a socket's mark that belong to the mesh. The other bits stay as the application set them.
pub const MARK_MASK: u32 = 0xfff;

/// The mark that the node proxy sets on its own sockets (`SO_MARK`): ztunnel's `PACKET_MARK`.
pub const MARK_PROXY: u32 = 0x539;

/// The mark of the proxy's own connections to the pod's application. The application's accepted socket inherits it
/// (`net.ipv4.tcp_fwmark_accept`), so that its replies return to the proxy instead of leaving the pod.
pub const MARK_DELIVERY: u32 = 0x111;

/// The mark of an application's outbound connection that is to be captured.
///
/// In placement `node`: of every packet that the host's stack is to deliver to the proxy.
pub const MARK_CAPTURE: u32 = 0x112;

/// Placement `node`, of packets on their way to the entrance alone: for the proxy's inbound listener.
pub const MARK_INBOUND: u32 = 0x113;

/// As [`MARK_INBOUND`], for the proxy's tunnel listener.
pub const MARK_TUNNEL: u32 = 0x114;

/// As [`MARK_INBOUND`], for the proxy's resolver.
pub const MARK_RESOLVE: u32 = 0x115;

/// The proxy's listener for captured outbound connections.
pub const PORT_OUTBOUND: u16 = 15001;

/// The proxy's listener for captured inbound plaintext connections.
pub const PORT_INBOUND: u16 = 15006;

/// The proxy's listener for tunnelled (HBONE, mTLS) connections. Never captured: peers dial it themselves.
pub const PORT_TUNNEL: u16 = 15008;

/// The proxy's DNS resolver: on the loopback address of each family, in placement `node` on every address.
pub const PORT_DNS: u16 = 15053;

/// The port of DNS servers.
pub const PORT_DOMAIN: u16 = 53;

/// The proxy's ports, in the order of the constants above.
pub const PROXY_PORTS: [u16; 4] = [PORT_OUTBOUND, PORT_INBOUND, PORT_TUNNEL, PORT_DNS];

/// The routing table, inside each enrolled pod, whose only route delivers everything locally through `lo`.
pub const ROUTE_TABLE: u32 = 15001;

/// The metric of that route's companions, one for each interface, is this and the interface's index.
pub const ROUTE_METRIC: u32 = 0x1_0000;

/// Priority of the rule `fwmark MARK_CAPTURE lookup ROUTE_TABLE`, before `main` (32766).
pub const RULE_PRIORITY_CAPTURE: u32 = 15001;

/// Priority of the rule `fwmark MARK_DELIVERY lookup ROUTE_TABLE`.
pub const RULE_PRIORITY_DELIVERY: u32 = 15006;

/// The network device, in the host's namespace, through which packets of pods reach the proxy in placement `node`.
pub const ENTRANCE: &str = "redirect0";

/// The other end of that pair of devices, which is never up.
pub const ENTRANCE_PEER: &str = "redirect1";

/// How many cgroups of node proxies the kernel side knows at once: a rolling upgrade has two.
pub const MAX_PROXY_CGROUPS: u32 = 16;
