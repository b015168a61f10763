//! Checks whether the node has state of agents of both placements.

use super::{Check, Requirements};
use redirect_datapath::linux;

const NAME: &str = "placement";

pub(super) fn check(requirements: &Requirements) -> Vec<Check> {
    let check = match linux::placements(&requirements.pin_dir) {
        Ok(found) if found.len() > 1 => Check::warn(
            NAME,
            "the node holds what agents of both placements of the node proxy have made",
            "see `redirect pod` for what is left of the former one: it goes when a proxy of the new placement serves the pod, and those \
             of the former one have ended",
        ),
        Ok(_) => Check::ok(NAME, "the node holds nothing of another placement of the node proxy"),
        Err(error) => Check::warn(
            NAME,
            format!("the node's devices can't be read: {error}"),
            "run it as root, in the host's network namespace",
        ),
    };
    vec![check]
}
