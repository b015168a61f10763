//! Constants of the data path: marks, ports, routing table and rule priorities.

/// The bits of a socket's mark that belong to the mesh. The other bits stay as the application set them.
pub const MARK_MASK: u32 = 0xfff;

/// The mark that the node proxy sets on its own sockets (`SO_MARK`): ztunnel's `PACKET_MARK`.
pub const MARK_PROXY: u32 = 0x539;

/// The mark of the proxy's own connections to the pod's application. The application's accepted socket inherits it
/// (`net.ipv4.tcp_fwmark_accept`), so that its replies return to the proxy instead of leaving the pod.
pub const MARK_DELIVERY: u32 = 0x111;

/// The mark of an application's outbound connection that the proxy captures.
///
/// In placement `node`, the mark of every packet that the host's stack delivers to the proxy.
pub const MARK_CAPTURE: u32 = 0x112;

/// Placement `node`, only on packets on their way to the ingress device: for the proxy's inbound listener.
pub const MARK_INBOUND: u32 = 0x113;

/// As [`MARK_INBOUND`], for the proxy's tunnel listener.
pub const MARK_TUNNEL: u32 = 0x114;

/// As [`MARK_INBOUND`], for the proxy's resolver.
pub const MARK_RESOLVE: u32 = 0x115;

/// The proxy's listener for captured outbound connections.
pub const PORT_OUTBOUND: u16 = 15001;

/// The proxy's listener for captured inbound plaintext connections.
pub const PORT_INBOUND: u16 = 15006;

/// The proxy's listener for tunneled (HBONE, mTLS) connections. Never captured: peers dial it directly.
pub const PORT_TUNNEL: u16 = 15008;

/// The proxy's DNS resolver: on the loopback address of each family, in placement `node` on every address.
pub const PORT_DNS: u16 = 15053;

/// The port of DNS servers.
pub const PORT_DOMAIN: u16 = 53;

/// The proxy's ports, in the order of the constants above.
pub const PROXY_PORTS: [u16; 4] = [PORT_OUTBOUND, PORT_INBOUND, PORT_TUNNEL, PORT_DNS];

/// The routing table, inside each enrolled pod, whose routes deliver captured connections locally through `lo`.
pub const ROUTE_TABLE: u32 = 15001;

/// The metric of its IPv4 routes for sockets that are bound to an interface is this plus the interface's index.
pub const ROUTE_METRIC: u32 = 0x1_0000;

/// The routing table that delivers IPv6 replies to the proxy's deliveries locally through `lo`, wherever they are to.
pub const REPLY_TABLE: u32 = 15006;

/// Priority of the IPv4 rule that leaves a captured connection without a source to the pod's own routing.
pub const RULE_PRIORITY_SOURCE: u32 = 15000;

/// Priority of the rule `fwmark MARK_CAPTURE lookup ROUTE_TABLE`, before `main` (32766).
pub const RULE_PRIORITY_CAPTURE: u32 = 15001;

/// Priority of the IPv6 rule that refuses captured connections to where the pod has no route.
pub const RULE_PRIORITY_REFUSE: u32 = 15002;

/// Priority of the rule for `MARK_DELIVERY`: `lookup ROUTE_TABLE` in IPv4, `lookup REPLY_TABLE` in IPv6.
pub const RULE_PRIORITY_DELIVERY: u32 = 15006;

/// Placement `node`: the ingress device, in the host's namespace, through which packets of pods reach the proxy.
pub const INGRESS_DEVICE: &str = "redirect0";

/// The other end of that veth pair, which is never up.
pub const INGRESS_DEVICE_PEER: &str = "redirect1";

/// How many proxy cgroups the kernel side knows at a time: a rolling upgrade has two.
pub const MAX_PROXY_CGROUPS: u32 = 16;
