//! Tests against a real API server, if available: `KUBEBUILDER_ASSETS` is the directory of `etcd` and
//! `kube-apiserver`, as in Kubernetes' own test tools. There is no kubelet; the tests play it.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use k8s_openapi::api::core::v1::{Namespace, Pod, ServiceAccount};
use kube::Client;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};

use super::*;
use crate::kube::api::REDIRECTION;
use redirect_testing::skip;

const TOKEN: &str = "token-of-the-tests";
/// A cold API server starts slowly.
const START: Duration = Duration::from_secs(60);

/// etcd and an API server; dropping it stops both.
struct Cluster {
    processes: Vec<Child>,
    config: kube::Config,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for process in self.processes.iter_mut().rev() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn spawn(program: &Path, directory: &Path, arguments: &[String]) -> Child {
    let log = fs::File::create(directory.join("log")).unwrap();
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}", program.display()))
}

impl Cluster {
    async fn start(assets: &Path, directory: &Path) -> Self {
        let (client, peer, secure) = (free_port(), free_port(), free_port());
        let path = |name: &str| {
            let path = directory.join(name);
            fs::create_dir_all(&path).unwrap();
            path
        };
        let etcd = path("etcd");
        let urls = |port: u16| format!("http://127.0.0.1:{port}");
        let etcd_arguments = [
            format!("--data-dir={}", etcd.join("data").display()),
            format!("--listen-client-urls={}", urls(client)),
            format!("--advertise-client-urls={}", urls(client)),
            format!("--listen-peer-urls={}", urls(peer)),
            format!("--initial-advertise-peer-urls={}", urls(peer)),
            format!("--initial-cluster=default={}", urls(peer)),
            "--unsafe-no-fsync".into(),
        ];
        let server = path("apiserver");
        let key = server.join("sa.key");
        let made = Command::new("openssl").args(["genrsa", "-out"]).arg(&key).arg("2048").output().unwrap();
        assert!(made.status.success(), "openssl makes no key");
        fs::write(server.join("tokens.csv"), format!("{TOKEN},admin,admin,\"system:masters\"\n")).unwrap();
        let server_arguments = [
            format!("--etcd-servers={}", urls(client)),
            format!("--secure-port={secure}"),
            "--bind-address=127.0.0.1".into(),
            format!("--cert-dir={}", server.join("certs").display()),
            format!("--service-account-key-file={}", key.display()),
            format!("--service-account-signing-key-file={}", key.display()),
            "--service-account-issuer=https://kubernetes.default.svc".into(),
            format!("--token-auth-file={}", server.join("tokens.csv").display()),
            "--authorization-mode=RBAC".into(),
            "--service-cluster-ip-range=10.0.0.0/24,fd00:10::/112".into(),
        ];
        let processes = vec![
            spawn(&assets.join("etcd"), &etcd, &etcd_arguments),
            spawn(&assets.join("kube-apiserver"), &server, &server_arguments),
        ];
        let mut config = kube::Config::new(format!("https://127.0.0.1:{secure}").parse().unwrap());
        // Its certificate is self-signed.
        config.accept_invalid_certs = true;
        config.auth_info.token = Some(TOKEN.to_owned().into());
        let cluster = Self { processes, config };
        let namespaces: Api<Namespace> = Api::all(cluster.client());
        let ready = async {
            while namespaces.get("default").await.is_err() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        if tokio::time::timeout(START, ready).await.is_err() {
            panic!("no API server: {}", fs::read_to_string(server.join("log")).unwrap());
        }
        cluster
    }

    fn client(&self) -> Client {
        client(self.config.clone()).unwrap()
    }
}

async fn create<K>(api: &Api<K>, object: Value)
where
    K: Clone + std::fmt::Debug + serde::Serialize + serde::de::DeserializeOwned,
{
    api.create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await.unwrap();
}

#[tokio::test]
async fn a_real_api_server_is_followed_and_annotated() {
    const NAME: &str = "a_real_api_server_is_followed_and_annotated";
    let Some(assets) = std::env::var_os("KUBEBUILDER_ASSETS") else {
        skip(NAME, "KUBEBUILDER_ASSETS names no directory with etcd and kube-apiserver");
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(Path::new(&assets), directory.path()).await;
    let admin = cluster.client();
    let meta = |name: &str| json!({"metadata": {"name": name}});
    create(&Api::<Namespace>::all(admin.clone()), meta("shop")).await;
    create(&Api::<ServiceAccount>::namespaced(admin.clone(), "shop"), meta("cart")).await;
    let pods: Api<Pod> = Api::namespaced(admin.clone(), "shop");
    let spec = json!({
        "nodeName": NODE, "serviceAccountName": "cart", "automountServiceAccountToken": false,
        "containers": [{"name": "c", "image": "none"}],
    });
    create(&pods, json!({"metadata": {"name": "pod-1"}, "spec": spec})).await;
    let uid = pods.get("pod-1").await.unwrap().metadata.uid.unwrap();

    let node = Node::assemble(quick(), cluster.config.clone(), ApiServer::start().await);
    let _proxy = node.proxy().await;
    let cookie = node.run_sandbox(&uid, KINDS[0]);
    let merge = PatchParams::default();
    let ips = json!({"status": {"phase": "Running", "podIP": "10.0.0.2", "podIPs": [{"ip": "10.0.0.2"}, {"ip": "fd00::2"}]}});
    pods.patch_status("pod-1", &merge, &Patch::Merge(&ips)).await.unwrap();
    let redirection = || async {
        let annotations = pods.get("pod-1").await.unwrap().metadata.annotations.unwrap_or_default();
        annotations.get(REDIRECTION).cloned()
    };
    let namespaces: Api<Namespace> = Api::all(admin.clone());
    for (mode, expected) in
        [(Some("ambient"), Some("enabled")), (None, None), (Some("ambient"), Some("enabled"))]
    {
        namespaces.patch("shop", &merge, &Patch::Merge(&label(mode))).await.unwrap();
        let kind: &[&str] = if mode.is_some() { KINDS[0] } else { &[] };
        eventually("the namespace's label is followed", || node.captures(cookie, kind)).await;
        let shown = tokio::time::timeout(LONG, async {
            while redirection().await.as_deref() != expected {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        assert!(shown.await.is_ok(), "the annotation is {:?} instead of {expected:?}", redirection().await);
    }

    // A real API server also validates events strictly.
    let bad = annotation(crate::kube::labels::BYPASS_INBOUND, Some("maybe"));
    pods.patch("pod-1", &merge, &Patch::Merge(&bad)).await.unwrap();
    let events: Api<k8s_openapi::api::core::v1::Event> = Api::namespaced(admin.clone(), "shop");
    let told = tokio::time::timeout(LONG, async {
        while events.list(&kube::api::ListParams::default()).await.unwrap().items.is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    assert!(told.await.is_ok(), "there is no event");
    pods.delete("pod-1", &DeleteParams::default().grace_period(0)).await.unwrap();
    eventually("a deleted pod leaves", || node.captures(cookie, &[])).await;
    node.stop().await;
}
