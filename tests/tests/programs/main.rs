//! The TC programs on crafted packets, by BPF_PROG_TEST_RUN: their return values and counts, and that they change nothing.
//!
//! The kernel runs the programs in the caller's network namespace on a packet that no interface has received. Only the
//! listener can't be assigned this way (the kernel allows it only at a TC hook): the programs then leave the connection to
//! the socket lookup, whose programs run here as well, and count it as captured.

mod bench;
mod capturing;
mod cost;
mod diagnostics;
mod gate;
mod guard;
mod lookup;
mod packets;
mod processors;
mod random;
mod specification;

use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, anyhow};
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use crate::bench::Bench;

/// The programs, loaded on demand and once.
type Shared = Arc<Mutex<Option<Result<Arc<Bench>, String>>>>;

fn main() -> ExitCode {
    let shared = Shared::default();
    let trials = [
        capturing::trials(&shared),
        guard::trials(&shared),
        gate::trials(&shared),
        processors::trials(&shared),
        cost::trials(&shared),
        diagnostics::trials(&shared),
        random::trials(&shared),
        specification::trials(&shared),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials.into_iter().flatten().collect()).exit_code()
}

/// A test.
fn trial(shared: &Shared, name: String, test: impl FnOnce(&Bench) -> Result<()> + Send + 'static) -> Trial {
    let shared = shared.clone();
    Trial::ignorable_test(name, move || {
        if !nix::unistd::geteuid().is_root() {
            if std::env::var("REDIRECT_E2E").is_ok_and(|value| value == "require") {
                return Err(Failed::from("needs root"));
            }
            return Ok(Completion::ignored_with("needs root"));
        }
        let failed = |error: anyhow::Error| Failed::from(format!("{error:#}"));
        test(&*bench(&shared).map_err(failed)?).map_err(failed)?;
        Ok(Completion::Completed)
    })
}

fn bench(shared: &Shared) -> Result<Arc<Bench>> {
    let mut place = shared.lock().unwrap_or_else(PoisonError::into_inner);
    let made = place.get_or_insert_with(|| Bench::new().map(Arc::new).map_err(|error| format!("{error:#}")));
    made.clone().map_err(|error| anyhow!(error))
}
