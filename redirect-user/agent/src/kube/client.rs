//! The connection to the API server.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper::Request;
use kube::client::retry::RetryPolicy;
use kube::client::{Body, ClientBuilder};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tower::buffer::BufferLayer;
use tower::limit::RateLimitLayer;
use tower::retry::RetryLayer;
use tower::util::MapRequestLayer;

/// Longer than a watch may be silent: the API server ends each one after 290 s.
const READ: Duration = Duration::from_secs(300);
const CONNECT: Duration = Duration::from_secs(5);

/// The maximum rate of an agent's requests. When a node loses its proxy, the annotations of all of its pods change; when a
/// cluster does, those of all nodes.
const RATE: Rate = Rate { requests: 20, period: Duration::from_secs(1) };

/// The number of requests in each period; further ones wait.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    pub(crate) requests: u64,
    pub(crate) period: Duration,
}

/// Why the API server can't be reached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    #[error("kubeconfig {}: {error}", path.display())]
    Kubeconfig { path: PathBuf, error: Box<kube::config::KubeconfigError> },
    #[error(
        "no kubeconfig and no service account: set --kubeconfig, or run the agent as a pod with \
         automountServiceAccountToken: {0}"
    )]
    Infer(Box<kube::config::InferConfigError>),
    #[error("invalid settings for the API server: {0}")]
    Build(Box<kube::Error>),
}

/// Reads the credentials. Those of a service account are reloaded as they are rotated.
pub(crate) async fn config(kubeconfig: Option<&Path>) -> Result<Config, ClientError> {
    match kubeconfig {
        None => Config::infer().await.map_err(|error| ClientError::Infer(Box::new(error))),
        Some(path) => {
            let failed = |error| ClientError::Kubeconfig { path: path.to_path_buf(), error: Box::new(error) };
            let file = Kubeconfig::read_from(path).map_err(failed)?;
            Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(failed)
        }
    }
}

/// Creates a client, without sending anything.
pub(crate) fn client(config: Config) -> Result<Client, ClientError> {
    client_at(RATE, config)
}

/// The same with another rate.
pub(crate) fn client_at(rate: Rate, mut config: Config) -> Result<Client, ClientError> {
    let failed = |error| ClientError::Build(Box::new(error));
    config.connect_timeout = Some(CONNECT);
    config.read_timeout = Some(READ);
    config.reset_reader_on_write = true;
    // The default retries for minutes before the caller gets an error. This policy only obeys the server's
    // Retry-After, and leaves the rest to the caller.
    config.default_retry = false;
    let policy = RetryPolicy::new(Duration::from_millis(100), Duration::from_secs(5), 3, true)
        .map_err(|error| failed(kube::Error::Service(error.into())))?;
    Ok(ClientBuilder::try_from(config)
        .map_err(failed)?
        .with_layer(&MapRequestLayer::new(newest))
        .with_layer(&RateLimitLayer::new(rate.requests, rate.period))
        .with_layer(&BufferLayer::new(64))
        .with_layer(&RetryLayer::new(policy))
        .build())
}

/// Makes a streaming list begin with the newest state. kube has no setting for that and requests any state. An older one may lack
/// a pod that was just enrolled, or a label that was just set, and the agent would take a running pod out of the mesh.
fn newest(mut request: Request<Body>) -> Request<Body> {
    let uri = request.uri().to_string();
    if uri.contains("sendInitialEvents=true")
        && let Ok(newest) = uri.replace("resourceVersion=0", "resourceVersion=").parse()
    {
        *request.uri_mut() = newest;
    }
    request
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use k8s_openapi::api::core::v1::Pod;
    use kube::Api;
    use redirect_testing::ApiServer;

    use super::*;

    const KUBECONFIG: &str = "
apiVersion: v1
kind: Config
current-context: c
clusters: [{name: c, cluster: {server: 'https://127.0.0.1:1', insecure-skip-tls-verify: true}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
users: [{name: u, user: {token: secret}}]
";

    #[tokio::test]
    async fn a_kubeconfig_makes_a_client_with_tls() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), KUBECONFIG).unwrap();
        let config = config(Some(file.path())).await.unwrap();
        assert_eq!(config.cluster_url.to_string(), "https://127.0.0.1:1/");
        let client = client(config).unwrap();
        // No server listens; the test is that the client gets as far as connecting.
        assert!(matches!(
            client.apiserver_version().await,
            Err(kube::Error::Service(_) | kube::Error::HyperError(_))
        ));
    }

    #[tokio::test]
    async fn requests_are_spread_over_time() {
        const REQUESTS: usize = 30;
        let server = ApiServer::start().await;
        let config = Config::new(format!("http://{}", server.address).parse().unwrap());
        let rate = Rate { requests: 10, period: Duration::from_millis(300) };
        let client = client_at(rate, config).unwrap();
        let began = Instant::now();
        let ask = |_| {
            let pods = Api::<Pod>::namespaced(client.clone(), "shop");
            async move { pods.get("absent").await.unwrap_err() }
        };
        futures::future::join_all((0..REQUESTS).map(ask)).await;
        assert_eq!(server.count("GET /api/v1/namespaces/shop/pods/absent"), REQUESTS);
        assert!(began.elapsed() >= 2 * rate.period, "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn a_kubeconfig_that_is_not_there_is_named() {
        let error = config(Some(Path::new("/nowhere/kubeconfig"))).await.unwrap_err();
        assert!(error.to_string().contains("/nowhere/kubeconfig"), "{error}");
    }
}
