//! The agent's own DaemonSet: whether another agent will follow this one.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::Api;
use kube::api::ObjectMeta;
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::{Config, watcher};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::informer::{Patience, Sink, follow};
use super::{client, config};

/// A terminating pod has 30 seconds in all.
const DEADLINE: Duration = Duration::from_secs(5);

/// The DaemonSet, watched from the agent's start on. An uninstallation also deletes service account and role, in any
/// order, so the API server may refuse the agent's query by the time the agent stops. An open watch still sees the
/// deletion. A lack of permissions by itself proves nothing: it may be a misconfiguration.
pub(crate) struct OwnDaemonSet {
    api: Api<PartialObjectMeta<DaemonSet>>,
    name: String,
    /// Whether it was deleted or being deleted when it was last seen.
    going: watch::Receiver<bool>,
    task: JoinHandle<()>,
}

impl Drop for OwnDaemonSet {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl OwnDaemonSet {
    /// Starts the watch.
    pub(crate) async fn watch(
        kubeconfig: Option<&Path>,
        namespace: &str,
        name: &str,
    ) -> anyhow::Result<Self> {
        let api: Api<PartialObjectMeta<DaemonSet>> =
            Api::namespaced(client(config(kubeconfig).await?)?, namespace);
        let (seen, going) = watch::channel(false);
        // During an upgrade the status changes with every node, for every agent: it is not requested.
        let only = Config::default().fields(&format!("metadata.name={name}"));
        let watched = api.clone();
        let sink = Own { seen, listed: true };
        let task = tokio::spawn(async move {
            follow(|config| watcher(watched.clone(), config), only, sink, Patience::default()).await;
        });
        Ok(Self { api, name: name.to_owned(), going, task })
    }

    /// Whether it is deleted or being deleted.
    pub(crate) async fn is_deleted(&self) -> anyhow::Result<bool> {
        let answer = tokio::time::timeout(DEADLINE, self.api.get(&self.name)).await;
        let error = match answer.context("the API server does not answer") {
            Ok(Ok(daemonset)) => return Ok(is_going(&daemonset.metadata)),
            Ok(Err(kube::Error::Api(status))) if status.code == 404 => return Ok(true),
            Ok(Err(error)) => anyhow::Error::new(error).context("the API server answered"),
            Err(silence) => silence,
        };
        if *self.going.borrow() { Ok(true) } else { Err(error) }
    }
}

/// The sink of the watch.
struct Own {
    seen: watch::Sender<bool>,
    /// Whether it is going according to the current list, which may lack it.
    listed: bool,
}

impl Sink<PartialObjectMeta<DaemonSet>> for Own {
    fn name(&self) -> &'static str {
        "daemonsets"
    }

    fn begin(&mut self) {
        self.listed = true;
    }

    fn listed(&mut self, found: PartialObjectMeta<DaemonSet>) {
        self.listed = is_going(&found.metadata);
    }

    fn complete(&mut self) {
        self.seen.send_replace(self.listed);
    }

    fn changed(&self, found: PartialObjectMeta<DaemonSet>) {
        self.seen.send_replace(is_going(&found.metadata));
    }

    fn deleted(&self, _: PartialObjectMeta<DaemonSet>) {
        self.seen.send_replace(true);
    }
}

fn is_going(metadata: &ObjectMeta) -> bool {
    metadata.deletion_timestamp.is_some()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use redirect_testing::{ApiServer, Fault};

    const GET: &str = "GET /apis/apps/v1/namespaces/mesh/daemonsets/redirect";

    /// A DaemonSet that exists and has been seen.
    async fn watched() -> (ApiServer, OwnDaemonSet) {
        let server = ApiServer::start().await;
        server.put_daemonset("mesh", "redirect", false);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        write!(
            file,
            "{{apiVersion: v1, kind: Config, current-context: c, contexts: [{{name: c, context: {{cluster: c, user: u}}}}], \
             users: [{{name: u, user: {{}}}}], clusters: [{{name: c, cluster: {{server: 'http://{}'}}}}]}}",
            server.address
        )
        .unwrap();
        let mut own = OwnDaemonSet::watch(Some(file.path()), "mesh", "redirect").await.unwrap();
        own.going.changed().await.unwrap();
        (server, own)
    }

    async fn seen_to_go(own: &mut OwnDaemonSet) {
        tokio::time::timeout(DEADLINE * 6, own.going.wait_for(|going| *going)).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn one_that_stays_has_a_successor() {
        let (_server, own) = watched().await;
        assert!(!own.is_deleted().await.unwrap());
    }

    #[tokio::test]
    async fn an_upgrade_costs_one_watch_of_metadata() {
        const NODES: usize = 5000;
        let (server, own) = watched().await;
        for _ in 0..NODES {
            server.put_daemonset("mesh", "redirect", false);
        }
        // The watch delivers all of these before the deletion.
        server.put_daemonset("mesh", "redirect", true);
        let mut going = own.going.clone();
        tokio::time::timeout(DEADLINE * 6, going.wait_for(|going| *going)).await.unwrap().unwrap();
        assert!(own.is_deleted().await.unwrap());
        assert_eq!((server.count("watch=true"), server.count(GET), server.count("")), (1, 1, 2));
        assert_eq!(server.requests_for_metadata(), 2);
    }

    #[tokio::test]
    async fn one_that_is_gone_or_about_to_go_has_none() {
        let (server, own) = watched().await;
        server.put_daemonset("mesh", "redirect", true);
        assert!(own.is_deleted().await.unwrap());
        server.delete_daemonset("mesh", "redirect");
        assert!(own.is_deleted().await.unwrap());
    }

    #[tokio::test]
    async fn rights_that_are_gone_are_no_end() {
        let (server, own) = watched().await;
        for code in [401, 403, 500] {
            server.fail_next(GET, Fault::Status(code));
            own.is_deleted().await.unwrap_err();
            assert!(!own.is_deleted().await.unwrap(), "{code}: afterwards");
        }
    }

    #[tokio::test]
    async fn an_end_that_was_seen_counts_without_rights() {
        for code in [401, 403, 500] {
            let (server, mut own) = watched().await;
            server.delete_daemonset("mesh", "redirect");
            seen_to_go(&mut own).await;
            server.fail_next(GET, Fault::Status(code));
            assert!(own.is_deleted().await.unwrap(), "{code}");
            // Installed again meanwhile.
            server.put_daemonset("mesh", "redirect", false);
            own.going.wait_for(|going| !going).await.unwrap();
            server.fail_next(GET, Fault::Status(code));
            own.is_deleted().await.unwrap_err();
        }
    }
}
