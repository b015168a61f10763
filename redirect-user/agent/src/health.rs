//! Health and readiness of the agent.
//!
//! A background task makes the slow checks: the kernel, and the files of the CNI chain. Answers come from its latest findings,
//! so they are immediate however many clients ask, and they report when the task stops delivering findings.

use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::install;
use redirect_datapath::handle::DatapathHandle;
use redirect_datapath::linux::Linux;

/// How often the kernel is checked.
const PERIOD: Duration = Duration::from_secs(2);

/// How often the kernel and the chain are checked while a check fails. Readiness follows within this time.
const PERIOD_OF_FAULTS: Duration = Duration::from_millis(200);

/// The chain is checked in every N-th of these periods, because that means reading files, including the
/// plugin's.
const CHAIN_EVERY: u32 = 5;

/// The deadline for the datapath thread's answer. An enrollment takes milliseconds, but many may be queued.
const PATIENCE: Duration = Duration::from_secs(5);

/// Older findings count as missing.
const STALE: Duration = Duration::from_secs(30);

/// The findings of the last check.
#[derive(Clone, Debug)]
pub(super) struct Findings {
    /// When it ended.
    at: Instant,
    datapath: Result<(), String>,
    chain: Result<(), Unchained>,
}

/// Why the plugin is not in the CNI chain.
#[derive(Clone, Debug)]
struct Unchained {
    why: String,
    /// There is no configuration at all, so no container has a network. One that can't be read may become usable at
    /// any moment.
    no_chain: bool,
}

impl Findings {
    /// The findings before the first check: pods can't be enrolled yet, and there is no reason for a restart.
    fn none() -> Self {
        let pending = Err(Unchained { why: "not examined yet".to_owned(), no_chain: false });
        Self { at: Instant::now(), datapath: Ok(()), chain: pending }
    }

    /// Why a container that starts now may bypass the plugin.
    pub(super) fn blocked(&self) -> Option<String> {
        match (&self.datapath, &self.chain) {
            (Err(why), _) => Some(why.clone()),
            (_, Err(Unchained { why, no_chain: false })) => Some(why.clone()),
            _ => None,
        }
    }

    fn of(&self, what: impl FnOnce(&Self) -> Result<(), String>) -> Result<(), String> {
        let age = self.at.elapsed();
        if age > STALE {
            return Err(format!("the last examination ended {} s ago", age.as_secs()));
        }
        what(self)
    }

    pub(super) fn datapath(&self) -> Result<(), String> {
        self.of(|findings| findings.datapath.clone())
    }

    pub(super) fn chain(&self) -> Result<(), String> {
        self.of(|findings| findings.chain.clone().map_err(|unchained| unchained.why))
    }
}

/// The subjects of the checks.
#[derive(Clone)]
pub(super) struct Examined {
    pub(super) kernel: DatapathHandle<Linux>,
    /// The CNI chain, if this agent manages it.
    pub(super) chain: Option<install::Options>,
}

/// The channel for findings.
pub(super) fn channel() -> (watch::Sender<Findings>, watch::Receiver<Findings>) {
    watch::channel(Findings::none())
}

/// Checks periodically.
pub(super) async fn examine(what: Examined, findings: watch::Sender<Findings>) -> anyhow::Result<()> {
    let mut chain = Ok(());
    for round in 0_u32.. {
        if round % CHAIN_EVERY == 0 || chain.is_err() {
            chain = examine_chain(what.chain.clone()).await;
        }
        let datapath = examine_datapath(&what.kernel).await;
        let period = if datapath.is_ok() && chain.is_ok() { PERIOD } else { PERIOD_OF_FAULTS };
        findings.send_replace(Findings { at: Instant::now(), datapath, chain: chain.clone() });
        sleep(period).await;
    }
    Ok(())
}

/// Whether the plugin is in the node's CNI chain.
async fn examine_chain(options: Option<install::Options>) -> Result<(), Unchained> {
    let failed = |why: String| Err(Unchained { why, no_chain: false });
    let Some(options) = options else { return Ok(()) };
    match tokio::task::spawn_blocking(move || install::missing(&options)).await {
        Ok(Ok(missing)) if missing.is_empty() => Ok(()),
        Ok(Ok(missing)) => failed(format!("not in place: {}", missing.join(", "))),
        Ok(Err(error)) => {
            let no_chain =
                matches!(&error, install::Error::NoConfiguration { invalid, .. } if invalid.is_empty());
            Err(Unchained { why: error.to_string(), no_chain })
        }
        Err(error) => failed(error.to_string()),
    }
}

/// Whether the programs are attached and the datapath thread answers.
async fn examine_datapath(kernel: &DatapathHandle<Linux>) -> Result<(), String> {
    match timeout(PATIENCE, kernel.run(|linux| linux.detached())).await {
        Ok(Ok(None)) => Ok(()),
        Ok(Ok(Some(program))) => Err(format!("program {program} is not attached")),
        Ok(Err(gone)) => Err(gone.to_string()),
        Err(_) => Err(format!("the datapath thread does not answer within {PATIENCE:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(datapath: Result<(), &str>, chain: Result<(), (&str, bool)>) -> Findings {
        let chain = chain.map_err(|(why, no_chain)| Unchained { why: why.to_owned(), no_chain });
        Findings { at: Instant::now(), datapath: datapath.map_err(str::to_owned), chain }
    }

    #[test]
    fn findings_count_as_long_as_they_are_fresh() {
        let fresh = findings(Ok(()), Err(("no plugin", false)));
        assert_eq!(fresh.datapath(), Ok(()));
        assert_eq!(fresh.chain(), Err("no plugin".into()));
        let at = Instant::now().checked_sub(STALE + Duration::from_secs(1)).expect("a clock that has run");
        let stale = Findings { at, ..fresh };
        let complaint = stale.datapath().unwrap_err();
        assert!(complaint.contains("31 s ago"), "{complaint}");
    }

    #[test]
    fn containers_wait_for_programs_and_plugin_but_not_for_a_chain() {
        assert_eq!(findings(Ok(()), Ok(())).blocked(), None);
        assert_eq!(findings(Ok(()), Err(("no configuration", true))).blocked(), None);
        assert_eq!(findings(Ok(()), Err(("no plugin", false))).blocked(), Some("no plugin".into()));
        assert_eq!(findings(Err("not attached"), Ok(())).blocked(), Some("not attached".into()));
        assert_eq!(Findings::none().blocked(), Some("not examined yet".into()));
    }
}
