//! The agent's own DaemonSet: whether another agent will follow this one.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::Api;

use super::{client, config};

/// A pod that ends has 30 seconds in all.
const DEADLINE: Duration = Duration::from_secs(5);

/// Whether the DaemonSet is gone or about to go. An agent whose rights were taken away is taken to be uninstalled:
/// account and role go together with the DaemonSet, in any order.
pub(crate) async fn is_deleted(
    kubeconfig: Option<&Path>,
    namespace: &str,
    name: &str,
) -> anyhow::Result<bool> {
    let api: Api<DaemonSet> = Api::namespaced(client(config(kubeconfig).await?)?, namespace);
    let found = tokio::time::timeout(DEADLINE, api.get(name)).await.context("the API server is silent")?;
    match found {
        Ok(daemonset) => Ok(daemonset.metadata.deletion_timestamp.is_some()),
        Err(kube::Error::Api(status)) if matches!(status.code, 401 | 403 | 404) => Ok(true),
        Err(error) => Err(error).context("the API server's answer"),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use serde_json::{Value, json};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    /// An API server that has one answer.
    async fn answered(status: u16, body: Value) -> anyhow::Result<bool> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let mut file = tempfile::NamedTempFile::new()?;
        write!(
            file,
            "{{apiVersion: v1, kind: Config, current-context: c, contexts: [{{name: c, context: {{cluster: c, user: u}}}}], \
             users: [{{name: u, user: {{}}}}], clusters: [{{name: c, cluster: {{server: 'http://{}'}}}}]}}",
            listener.local_addr()?
        )?;
        let server = tokio::spawn(async move {
            loop {
                let (mut connection, _) = listener.accept().await.unwrap();
                let mut request = [0; 4096];
                let length = connection.read(&mut request).await.unwrap();
                let request = String::from_utf8_lossy(&request[..length]).into_owned();
                assert!(
                    request.starts_with("GET /apis/apps/v1/namespaces/mesh/daemonsets/redirect "),
                    "{request}"
                );
                let body = body.to_string();
                let head = format!(
                    "HTTP/1.1 {status} X\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
                    body.len()
                );
                connection.write_all((head + &body).as_bytes()).await.unwrap();
            }
        });
        let answer = is_deleted(Some(file.path()), "mesh", "redirect").await;
        server.abort();
        answer
    }

    fn daemonset(metadata: &Value) -> Value {
        json!({"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": metadata})
    }

    fn refusal(code: u16) -> Value {
        json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": "x", "message": "x"})
    }

    #[tokio::test]
    async fn only_a_daemonset_that_stays_has_a_successor() {
        assert!(!answered(200, daemonset(&json!({"name": "redirect"}))).await.unwrap());
        let going = json!({"name": "redirect", "deletionTimestamp": "2026-01-01T00:00:00Z"});
        assert!(answered(200, daemonset(&going)).await.unwrap());
        for code in [401, 403, 404] {
            assert!(answered(code, refusal(code)).await.unwrap(), "{code}");
        }
        answered(500, refusal(500)).await.unwrap_err();
    }
}
