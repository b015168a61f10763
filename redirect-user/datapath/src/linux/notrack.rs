//! Placement `node`: exempts packets on the ingress device from the host's connection tracking.
//!
//! If the host translates Service addresses (as kube-proxy does), it would replace the dialed address by a pod's before the
//! packet reaches the proxy's socket: the proxy would not see the Service, and the next packet would find no socket. One
//! nftables rule in a table of our own prevents that: `iifname "redirect0" notrack`. No other rules change.

use std::io;
use std::path::Path;
use std::sync::Once;

use redirect_ebpf::constants::INGRESS_DEVICE;
use redirect_linux::netlink::nftables::{APPEND, CREATE, Kind, Nftables, bytes, nested, number, text};

const TABLE: &str = "ambient-redirect";
const CHAIN: &str = "ingress_device";

/// Exists if the kernel tracks connections.
const TRACKING: &str = "/proc/sys/net/netfilter/nf_conntrack_max";

/// Before connection tracking (-200).
const PRIORITY: i32 = -300;

/// Ensures the rule if connections are tracked. Returns whether it was missing. A failure is logged once, because
/// everything but Services still works.
pub(super) fn ensure() -> bool {
    static TOLD: Once = Once::new();
    if !Path::new(TRACKING).exists() {
        return false;
    }
    let outcome = is_there().and_then(|there| if there { Ok(false) } else { add().map(|()| true) });
    outcome.unwrap_or_else(|error| {
        TOLD.call_once(|| {
            tracing::warn!(
                %error,
                "cannot exempt device {INGRESS_DEVICE} from connection tracking by nftables (CONFIG_NF_TABLES, \
                 CONFIG_NFT_CT): enrolled pods cannot reach Services whose addresses the host translates"
            );
        });
        false
    })
}

/// Removes the rule. Returns whether it was there.
pub(super) fn remove() -> io::Result<bool> {
    if !Path::new(TRACKING).exists() || !is_there().unwrap_or(false) {
        return Ok(false);
    }
    Nftables::open()?.transact(&[(Kind::DeleteTable, 0, text(1, TABLE))])?;
    Ok(true)
}

fn is_there() -> io::Result<bool> {
    Nftables::open()?.has_rules(TABLE, CHAIN)
}

/// Recreates the table, whatever its state, in one transaction.
fn add() -> io::Result<()> {
    let table = text(1, TABLE);
    let hook = [number(1, 0), number(2, PRIORITY.cast_unsigned())].concat();
    let chain = [text(1, TABLE), text(3, CHAIN), nested(4, &hook), text(7, "filter")].concat();
    let rule = [text(1, TABLE), text(2, CHAIN), nested(4, &expressions())].concat();
    Nftables::open()?.transact(&[
        (Kind::NewTable, CREATE, table.clone()),
        (Kind::DeleteTable, 0, table.clone()),
        (Kind::NewTable, CREATE, table),
        (Kind::NewChain, CREATE, chain),
        (Kind::NewRule, CREATE | APPEND, rule),
    ])
}

/// `meta iifname` into the first register; `cmp`; `notrack`.
fn expressions() -> Vec<u8> {
    const REGISTER: u32 = 1;
    const INTERFACE_NAME: u32 = 6;
    const EQUAL: u32 = 0;
    let mut name = [0; 16];
    name[..INGRESS_DEVICE.len()].copy_from_slice(INGRESS_DEVICE.as_bytes());
    let load = [number(1, REGISTER), number(2, INTERFACE_NAME)].concat();
    let compare = [number(1, REGISTER), number(2, EQUAL), nested(3, &bytes(1, &name))].concat();
    let expression = |word: &str, data: &[u8]| nested(1, &[text(1, word), nested(2, data)].concat());
    [expression("meta", &load), expression("cmp", &compare), nested(1, &text(1, "notrack"))].concat()
}
