//! The agent's own DaemonSet: whether another agent will follow this one.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use futures::StreamExt as _;
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::Api;
use kube::api::ObjectMeta;
use kube::core::PartialObjectMeta;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{Config, Event, watcher};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::{client, config};

/// A pod that ends has 30 seconds in all.
const DEADLINE: Duration = Duration::from_secs(5);

/// The DaemonSet, watched from the agent's start on. An uninstallation takes account and role as well, in any order: by
/// the time that the agent is told to end it may not be allowed to ask. A watch that is open sees the end of the
/// DaemonSet all the same. Rights that are gone prove nothing by themselves: somebody may have broken them.
pub(crate) struct OwnDaemonSet {
    api: Api<PartialObjectMeta<DaemonSet>>,
    name: String,
    /// Whether it was gone or about to go when something was last seen of it.
    going: watch::Receiver<bool>,
    task: JoinHandle<()>,
}

impl Drop for OwnDaemonSet {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl OwnDaemonSet {
    /// Starts to watch.
    pub(crate) async fn watch(
        kubeconfig: Option<&Path>,
        namespace: &str,
        name: &str,
    ) -> anyhow::Result<Self> {
        let api: Api<PartialObjectMeta<DaemonSet>> =
            Api::namespaced(client(config(kubeconfig).await?)?, namespace);
        let (sender, going) = watch::channel(false);
        // During an upgrade the status changes with every node, and every agent hears of it: it is not sent along.
        let only = Config::default().fields(&format!("metadata.name={name}")).any_semantic();
        // Pages would be read past the API server's cache.
        let only = Config { page_size: None, ..only };
        let seen = watcher(api.clone(), only).default_backoff();
        let mut listed = true;
        let task = tokio::spawn(seen.for_each(move |seen| {
            let now = match seen {
                Ok(Event::Init) => {
                    listed = true;
                    None
                }
                Ok(Event::InitApply(found)) => {
                    listed = is_going(&found.metadata);
                    None
                }
                Ok(Event::InitDone) => Some(listed),
                Ok(Event::Apply(found)) => Some(is_going(&found.metadata)),
                Ok(Event::Delete(_)) => Some(true),
                Err(error) => {
                    tracing::debug!(%error, "cannot watch the agent's DaemonSet");
                    None
                }
            };
            if let Some(now) = now {
                sender.send_replace(now);
            }
            std::future::ready(())
        }));
        Ok(Self { api, name: name.to_owned(), going, task })
    }

    /// Whether it is gone or about to go.
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

fn is_going(metadata: &ObjectMeta) -> bool {
    metadata.deletion_timestamp.is_some()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use redirect_testing::{ApiServer, Fault};

    const GET: &str = "GET /apis/apps/v1/namespaces/mesh/daemonsets/redirect";

    /// With a DaemonSet that stays, which was seen.
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
        const LIST: &str = "GET /apis/apps/v1/namespaces/mesh/daemonsets?";
        let (server, own) = watched().await;
        for _ in 0..NODES {
            server.put_daemonset("mesh", "redirect", false);
        }
        assert!(!own.is_deleted().await.unwrap());
        let lists = server.count(LIST) - server.count("watch=true");
        assert_eq!((lists, server.count("watch=true"), server.count(GET)), (1, 1, 1));
        // From the API server's cache, and no more than metadata.
        assert_eq!(server.count("resourceVersion=0"), 1);
        assert_eq!(server.requests_for_metadata(), 3);
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
