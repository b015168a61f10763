//! Loads the programs, to check that the kernel's verifier accepts them.

use super::{Cause, Check, Requirements};
use redirect_datapath::linux;

pub(super) fn checks(requirements: &Requirements) -> Vec<Check> {
    match linux::try_out(requirements.tc) {
        Ok(programs) => vec![Check::ok("programs", format!("the kernel accepts all {programs}"))],
        Err(error) => vec![Check::fail(
            "programs",
            Cause::Kernel,
            format!("{error:#}"),
            "a kernel of the table in README.md; if this is one, report it with this output",
        )],
    }
}
