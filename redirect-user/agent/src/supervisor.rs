//! Runs the agent's services. If a service ends before the agent does, the supervisor logs and counts that with its cause, shows
//! it in health and readiness, and restarts the service where that can help. A panic ends the agent instead.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{JoinError, JoinHandle};
use tokio::time::{sleep, timeout};

use crate::metrics::events::events;

/// The pause before a service is restarted. It doubles with each restart.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// A restarted service that has run for this long is healthy again.
const STEADY: Duration = Duration::from_secs(10);

/// How long a service may take to finish when the agent stops. Kubernetes kills the agent after 30 s.
const LAST_WORK: Duration = Duration::from_secs(10);

/// What happens to a service when the agent stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// It sees [`Supervisor::stopped`] and finishes its work.
    Finishes,
    /// The supervisor aborts it.
    Cut,
}

/// The services of the agent, by name.
pub(super) struct Supervisor {
    stop: watch::Sender<bool>,
    ended: Arc<watch::Sender<BTreeMap<&'static str, Ended>>>,
    services: Vec<(&'static str, JoinHandle<()>)>,
}

/// A service that is not running.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Ended {
    cause: String,
    /// Whether only a restart of the agent helps.
    for_good: bool,
}

/// The states of the services, for health and readiness.
#[derive(Clone, Debug)]
pub(super) struct Services(watch::Receiver<BTreeMap<&'static str, Ended>>);

impl Services {
    /// Fails if a service has ended for good, so that only a restart of the agent helps.
    pub(super) fn health(&self) -> Result<(), String> {
        self.check(|ended| ended.for_good)
    }

    /// Fails unless all services run.
    pub(super) fn readiness(&self) -> Result<(), String> {
        self.check(|_| true)
    }

    fn check(&self, counts: impl Fn(&Ended) -> bool) -> Result<(), String> {
        let ended = self.0.borrow();
        let lines: Vec<_> = ended
            .iter()
            .filter(|(_, ended)| counts(ended))
            .map(|(name, ended)| format!("{name}: {}", ended.cause))
            .collect();
        if lines.is_empty() { Ok(()) } else { Err(lines.join("; ")) }
    }
}

impl Supervisor {
    pub(super) fn new() -> Self {
        let (stop, _) = watch::channel(false);
        Self { stop, ended: Arc::new(watch::channel(BTreeMap::new()).0), services: Vec::new() }
    }

    /// Becomes true when the agent stops.
    pub(super) fn stopped(&self) -> watch::Receiver<bool> {
        self.stop.subscribe()
    }

    pub(super) fn services(&self) -> Services {
        Services(self.ended.subscribe())
    }

    /// Runs a service that cannot be restarted.
    pub(super) fn once(
        &mut self,
        name: &'static str,
        stop: Stop,
        service: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        let mut service = Some(service);
        self.add(name, stop, move || service.take());
    }

    /// Runs a service, and restarts it when it ends.
    pub(super) fn restarting<F>(
        &mut self,
        name: &'static str,
        stop: Stop,
        mut start: impl FnMut() -> F + Send + 'static,
    ) where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        self.add(name, stop, move || Some(start()));
    }

    fn add<F>(&mut self, name: &'static str, stop: Stop, start: impl FnMut() -> Option<F> + Send + 'static)
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let (stopped, ended) = (self.stopped(), Arc::clone(&self.ended));
        events().service_begins(name);
        self.services.push((name, tokio::spawn(supervise(name, stop, stopped, ended, start))));
    }

    /// Signals all services to stop.
    pub(super) fn stop(&self) {
        self.stop.send_replace(true);
    }

    /// Waits for the end of one service, after [`Self::stop`].
    pub(super) async fn join(&mut self, wanted: &'static str) {
        if let Some(place) = self.services.iter().position(|(name, _)| *name == wanted) {
            let (_, task) = self.services.swap_remove(place);
            join(wanted, task).await;
        }
    }

    /// Waits for the end of all services but one, after [`Self::stop`].
    pub(super) async fn join_others(&mut self, kept: &'static str) {
        let (kept, others) =
            std::mem::take(&mut self.services).into_iter().partition(|(name, _)| *name == kept);
        self.services = others;
        self.join_all().await;
        self.services = kept;
    }

    /// Waits for the end of all services, after [`Self::stop`].
    pub(super) async fn join_all(&mut self) {
        let services = self.services.drain(..).map(|(name, task)| join(name, task));
        futures::future::join_all(services).await;
    }
}

async fn join(service: &'static str, mut task: JoinHandle<()>) {
    match timeout(LAST_WORK, &mut task).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!(service, %error, "the supervisor of a service has failed"),
        Err(_) => {
            tracing::error!(service, "a service did not finish within {LAST_WORK:?}; it is cut off");
            task.abort();
        }
    }
}

async fn until_stopped(mut stopped: watch::Receiver<bool>) {
    // An error means that the sender is gone, which also means to stop.
    let _ = stopped.wait_for(|stop| *stop).await;
}

async fn supervise<F>(
    service: &'static str,
    stop: Stop,
    stopped: watch::Receiver<bool>,
    ended: Arc<watch::Sender<BTreeMap<&'static str, Ended>>>,
    mut start: impl FnMut() -> Option<F>,
) where
    F: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    let mut pause = FIRST_PAUSE;
    while let Some(run) = start() {
        // A separate task, which can be aborted anywhere when the agent stops.
        let mut task = AbortOnDrop(tokio::spawn(run));
        let run = async {
            if let Ok(outcome) = timeout(STEADY, &mut task.0).await {
                return outcome;
            }
            ended.send_if_modified(|ended| ended.remove(service).is_some());
            pause = FIRST_PAUSE;
            (&mut task.0).await
        };
        let outcome = tokio::select! {
            outcome = run => outcome,
            () = until_stopped(stopped.clone()), if stop == Stop::Cut => return,
        };
        if *stopped.borrow() {
            if let Some(cause) = failure(outcome) {
                tracing::error!(service, cause, "a service failed while the agent stops");
            }
            return;
        }
        let cause = failure(outcome).unwrap_or_else(|| "it ended".into());
        tracing::error!(service, cause, "a service of the agent ended");
        events().service_ended(service);
        ended.send_modify(|ended| _ = ended.insert(service, Ended { cause, for_good: false }));
        tokio::select! {
            () = sleep(pause) => pause = (2 * pause).min(LONGEST_PAUSE),
            () = until_stopped(stopped.clone()) => return,
        }
    }
    ended.send_modify(|ended| {
        if let Some(ended) = ended.get_mut(service) {
            ended.for_good = true;
        }
    });
    until_stopped(stopped).await;
}

/// Why a service failed; `None` if its work was done.
fn failure(outcome: Result<anyhow::Result<()>, JoinError>) -> Option<String> {
    match outcome {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(format!("{error:#}")),
        Err(error) => Some(error.to_string()),
    }
}

struct AbortOnDrop(JoinHandle<anyhow::Result<()>>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use anyhow::bail;
    use tokio::time::Instant;

    use super::*;

    /// A service that fails this many times, then runs.
    fn failing(times: usize, count: &Arc<AtomicUsize>) -> impl FnMut() -> Pinned + Send + 'static {
        let count = Arc::clone(count);
        move || {
            let run = count.fetch_add(1, Ordering::Relaxed);
            Box::pin(async move {
                match run {
                    run if run >= times => std::future::pending().await,
                    0 => bail!("no socket"),
                    1 => Ok(()),
                    _ => bail!("out of order"),
                }
            })
        }
    }

    type Pinned = std::pin::Pin<Box<dyn Future<Output = anyhow::Result<()>> + Send>>;

    #[tokio::test(start_paused = true)]
    async fn a_service_that_ends_is_reported_with_its_cause_and_restarted_with_a_growing_pause() {
        let (mut supervisor, count) = (Supervisor::new(), Arc::default());
        let services = supervisor.services();
        supervisor.restarting("watch", Stop::Cut, failing(3, &count));
        sleep(Duration::from_millis(5)).await;
        for (runs, cause, pause) in [(1, "no socket", 1), (2, "it ended", 2), (3, "out of order", 4)] {
            assert_eq!(count.load(Ordering::Relaxed), runs);
            assert_eq!(services.readiness(), Err(format!("watch: {cause}")));
            assert_eq!(services.health(), Ok(()), "it is restarted");
            sleep(Duration::from_secs(pause) - Duration::from_millis(10)).await;
            assert_eq!(count.load(Ordering::Relaxed), runs, "after a pause");
            sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(count.load(Ordering::Relaxed), 4);
        assert!(services.readiness().is_err(), "it has not run for long yet");
        sleep(STEADY).await;
        assert_eq!(services.readiness(), Ok(()));
        supervisor.stop();
        supervisor.join_all().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_service_that_cannot_be_restarted_makes_the_agent_unhealthy() {
        let mut supervisor = Supervisor::new();
        let services = supervisor.services();
        supervisor.once("proxies", Stop::Finishes, async { bail!("the socket is gone") });
        sleep(2 * LONGEST_PAUSE).await;
        assert_eq!(services.health(), Err("proxies: the socket is gone".into()));
        supervisor.stop();
        supervisor.join_all().await;
    }

    #[tokio::test(start_paused = true)]
    async fn services_finish_or_are_cut_off_when_the_agent_stops() {
        let mut supervisor = Supervisor::new();
        let services = supervisor.services();
        let (began, stopped) = (Instant::now(), until_stopped(supervisor.stopped()));
        supervisor.once("finishes", Stop::Finishes, async {
            stopped.await;
            sleep(Duration::from_secs(3)).await;
            Ok(())
        });
        supervisor.once("cut", Stop::Cut, std::future::pending());
        supervisor.restarting("between two runs", Stop::Finishes, || async { bail!("no luck") });
        sleep(Duration::from_millis(500)).await;
        supervisor.stop();
        supervisor.join("cut").await;
        assert_eq!(began.elapsed().as_secs(), 0);
        supervisor.join_all().await;
        assert_eq!(began.elapsed().as_secs(), 3);
        assert_eq!(services.health(), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn one_service_ends_after_the_others() {
        let mut supervisor = Supervisor::new();
        let (end, ended) = watch::channel(false);
        supervisor.once("last", Stop::Finishes, async {
            until_stopped(ended).await;
            Ok(())
        });
        supervisor.once("first", Stop::Cut, std::future::pending());
        supervisor.stop();
        let began = Instant::now();
        supervisor.join_others("last").await;
        assert_eq!(began.elapsed().as_secs(), 0);
        end.send_replace(true);
        supervisor.join_all().await;
        assert_eq!(began.elapsed().as_secs(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn services_that_do_not_finish_are_cut_off_together() {
        let mut supervisor = Supervisor::new();
        let (held, mut dropped) = tokio::sync::mpsc::channel::<()>(1);
        for name in ["hangs", "hangs too", "hangs first"] {
            let held = held.clone();
            supervisor.once(name, Stop::Finishes, async move {
                std::future::pending::<()>().await;
                drop(held);
                Ok(())
            });
        }
        drop(held);
        let began = Instant::now();
        supervisor.stop();
        supervisor.join("hangs first").await;
        supervisor.join_all().await;
        assert_eq!(began.elapsed(), 2 * LAST_WORK);
        assert_eq!(dropped.recv().await, None, "nobody works on them any more");
    }
}
