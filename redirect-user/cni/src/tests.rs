//! The plugin as a runtime sees it: environment and configuration in, JSON and exit status out.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use insta::assert_json_snapshot;
use nix::sys::stat::stat;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{MAX_STDIN, Outcome, SpecVersion};
use redirect_protocol::wire::testing::{TestAgent, nobody};
use redirect_protocol::wire::{self, ErrorKind, Reply, Request, deletions};

const NETNS: &str = "/proc/self/ns/net";

/// One run of the plugin.
struct Call {
    environment: HashMap<&'static str, OsString>,
    config: Value,
}

impl Call {
    /// A command for the pod shop/cart in a dual-stack network.
    fn new(command: &str, socket: &Path) -> Self {
        let args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart;K8S_POD_UID=u-1";
        let environment = [
            ("CNI_COMMAND", command),
            ("CNI_CONTAINERID", "c1"),
            ("CNI_NETNS", NETNS),
            ("CNI_IFNAME", "eth0"),
            ("CNI_ARGS", args),
            ("CNI_PATH", "/opt/cni/bin"),
        ];
        Self {
            environment: environment.into_iter().map(|(name, value)| (name, value.into())).collect(),
            config: json!({
                "cniVersion": "1.1.0",
                "name": "cluster",
                "type": "redirect-cni",
                "agentSocket": socket,
                "prevResult": prev_result("1.1.0", &["10.0.0.5/24", "fd00::5/64"]),
            }),
        }
    }

    fn set(mut self, key: &str, value: Value) -> Self {
        self.config[key] = value;
        self
    }

    fn unset(mut self, key: &str) -> Self {
        self.config.as_object_mut().unwrap().remove(key);
        self
    }

    fn environment(mut self, name: &'static str, value: &str) -> Self {
        self.environment.insert(name, value.into());
        self
    }

    fn namespace(self, namespace: &str) -> Self {
        self.environment("CNI_ARGS", &format!("K8S_POD_NAMESPACE={namespace};K8S_POD_NAME=dns"))
    }

    fn run(&self) -> Outcome {
        self.run_with(self.config.to_string().as_bytes())
    }

    fn run_with(&self, stdin: impl Read) -> Outcome {
        super::run(&|name| self.environment.get(name).cloned(), stdin)
    }

    /// The error object.
    fn fail(&self) -> Value {
        let outcome = self.run();
        assert!(outcome.failed, "{outcome:?}");
        outcome.stdout.unwrap()
    }

    fn fail_code(&self) -> u64 {
        self.fail()["code"].as_u64().unwrap()
    }

    /// Succeeds with an empty stdout.
    fn succeed_silently(&self) -> Option<String> {
        let outcome = self.run();
        assert!(!outcome.failed && outcome.stdout.is_none(), "{outcome:?}");
        outcome.note
    }
}

/// The result of a bridge-like plugin, with keys that this plugin does not know.
fn prev_result(version: &str, addresses: &[&str]) -> Value {
    let ips = addresses.iter().map(|address| {
        let mut ip = json!({ "address": address, "interface": 1, "gateway": "10.0.0.1" });
        if version.starts_with("0.") {
            ip["version"] = if address.contains(':') { "6" } else { "4" }.into();
        }
        ip
    });
    json!({
        "cniVersion": version,
        "interfaces": [
            { "name": "veth1", "mac": "aa:bb:cc:dd:ee:01", "mtu": 1400 },
            { "name": "eth0", "mac": "aa:bb:cc:dd:ee:02", "sandbox": NETNS, "pciID": "" },
        ],
        "ips": ips.collect::<Vec<_>>(),
        "routes": [{ "dst": "0.0.0.0/0", "priority": 1 }],
        "dns": { "nameservers": ["10.96.0.10"] },
        "vendor.example/extra": { "keep": [1, 2.5, null, "ü"] },
    })
}

fn agreeable(request: &Request) -> Vec<Reply> {
    match request {
        Request::Add { .. } => vec![Reply::Added { enrolled: true }],
        _ => vec![Reply::Done],
    }
}

fn refusing(kind: ErrorKind) -> TestAgent {
    TestAgent::start(move |_| vec![Reply::Error(wire::Error::new(kind, "the IPv6 rule is gone"))])
}

/// A path that is the same in every run, for snapshots.
fn absent() -> PathBuf {
    "/proc/ambient-redirect/agent.sock".into()
}

#[test]
fn add_passes_addresses_of_every_family_on_and_the_result_through() {
    let agent = TestAgent::start(agreeable);
    let cases: [(&[&str], &[&str]); 4] = [
        (&["10.0.0.5/24"], &["10.0.0.5"]),
        (&["fd00::5/64"], &["fd00::5"]),
        (&["fd00::5/64", "10.0.0.5/24"], &["10.0.0.5", "fd00::5"]),
        (&["::ffff:10.0.0.5/120"], &["10.0.0.5"]),
    ];
    for version in SpecVersion::ALL {
        for (reported, expected) in cases {
            let result = prev_result(version.as_str(), reported);
            let call = Call::new("ADD", &agent.socket())
                .set("cniVersion", version.as_str().into())
                .set("prevResult", result.clone());
            assert_eq!(call.run(), Outcome { stdout: Some(result), failed: false, note: None }, "{version}");

            let (request, netns) = agent.requests().pop().unwrap();
            let Request::Add { attachment, pod, addresses, .. } = request else { panic!("{request:?}") };
            assert_eq!((attachment.container_id.as_str(), attachment.interface.as_str()), ("c1", "eth0"));
            assert_eq!((pod.to_string().as_str(), pod.uid.as_str()), ("shop/cart", "u-1"));
            assert_eq!(addresses.iter().map(ToString::to_string).collect::<Vec<_>>(), expected, "{version}");
            assert_eq!(netns, Some(stat(NETNS).unwrap().st_ino));
        }
    }
}

#[test]
fn add_prints_the_result_in_the_configuration_s_version() {
    let agent = TestAgent::start(agreeable);
    for version in ["0.4.0", "1.1.0"] {
        let call = Call::new("ADD", &agent.socket())
            .set("cniVersion", version.into())
            .set("prevResult", prev_result("1.0.0", &["10.0.0.5/24", "fd00::5/64"]));
        let stdout = call.run().stdout.unwrap();
        assert_eq!(stdout["cniVersion"], version);
        assert_json_snapshot!(format!("add_{version}"), stdout);
    }
}

#[test]
fn add_without_kubernetes_names_the_pod_after_its_container() {
    let agent = TestAgent::start(agreeable);
    assert!(!Call::new("ADD", &agent.socket()).environment("CNI_ARGS", "").run().failed);
    let Some((Request::Add { pod, .. }, _)) = agent.requests().pop() else { panic!() };
    assert_eq!([pod.uid, pod.namespace, pod.name], ["c1", "", "c1"]);
}

#[test]
fn add_must_be_chained() {
    let (_guard, socket) = nobody();
    let add = || Call::new("ADD", &socket);
    assert_json_snapshot!("not_chained", add().unset("prevResult").fail());
    assert_json_snapshot!("no_addresses", add().set("prevResult", json!({ "cniVersion": "1.1.0" })).fail());
    let host_only =
        json!({ "interfaces": [{ "name": "veth" }], "ips": [{ "address": "10.0.0.1/24", "interface": 0 }] });
    assert_eq!(add().set("prevResult", host_only).fail_code(), 7);
}

#[test]
fn add_needs_a_network_namespace() {
    let (_guard, socket) = nobody();
    let add = |path| Call::new("ADD", &socket).environment("CNI_NETNS", path);
    assert_json_snapshot!("no_such_namespace", add("/proc/self/ns/absent").fail());
    assert_json_snapshot!("other_namespace", add("/proc/self/ns/mnt").fail());
    assert_eq!(add("/dev/null").fail_code(), 4);
}

#[test]
fn an_absent_agent_is_an_error_with_the_remedy() {
    assert_json_snapshot!("add_unreachable", Call::new("ADD", &absent()).fail());
    assert_json_snapshot!("check_unreachable", Call::new("CHECK", &absent()).fail());
    assert_json_snapshot!("status_unreachable", Call::new("STATUS", &absent()).fail());
    let gc = Call::new("GC", &absent()).set("cni.dev/valid-attachments", json!([]));
    assert_json_snapshot!("gc_unreachable", gc.fail());
}

#[test]
fn excluded_namespaces_do_without_the_agent_but_heed_its_answer() {
    for command in ["ADD", "CHECK"] {
        for namespace in ["kube-system", "ambient-redirect"] {
            let outcome = Call::new(command, &absent()).namespace(namespace).run();
            assert!(!outcome.failed, "{outcome:?}");
            let note = outcome.note.unwrap();
            assert!(note.contains(&format!("{namespace}/dns")) && note.contains("agent.sock"), "{note}");
        }
        let configured = Call::new(command, &absent()).set("excludeNamespaces", json!(["infra"]));
        assert!(!configured.namespace("infra").run().failed);
        let configured = Call::new(command, &absent()).set("excludeNamespaces", json!(["infra"]));
        assert_eq!(configured.namespace("kube-system").fail_code(), 11);

        let agent = refusing(ErrorKind::Datapath);
        assert_eq!(Call::new(command, &agent.socket()).namespace("kube-system").fail_code(), 102);
    }
    let agent = TestAgent::start(agreeable);
    assert!(!Call::new("ADD", &agent.socket()).namespace("kube-system").run().failed);
    assert_eq!(agent.requests().len(), 1, "excluded pods are captured if the agent is there");
}

#[test]
fn excluded_namespaces_do_not_wait_long_for_a_slow_agent() {
    let agent = TestAgent::start_slow(Duration::from_secs(4), agreeable);
    let start = Instant::now();
    assert!(!Call::new("ADD", &agent.socket()).namespace("kube-system").run().failed);
    assert!(start.elapsed() < Duration::from_secs(4));
}

#[test]
fn a_slow_agent_is_an_error_when_the_time_is_up() {
    let agent = TestAgent::start_slow(Duration::from_secs(3), agreeable);
    let error = Call::new("ADD", &agent.socket()).set("timeoutSeconds", 1.into()).fail();
    assert_eq!(error["code"], 11);
    assert!(error["msg"].as_str().unwrap().contains("did not answer within 1s"), "{error}");
}

#[test]
fn every_refusal_has_its_code_and_names_the_pod() {
    for (kind, code) in [
        (ErrorKind::Version, 100),
        (ErrorKind::Malformed, 104),
        (ErrorKind::Denied, 105),
        (ErrorKind::TryAgain, 11),
        (ErrorKind::Unknown, 3),
        (ErrorKind::Mismatch, 101),
        (ErrorKind::Datapath, 102),
        (ErrorKind::Proxy, 103),
        (ErrorKind::Internal, 104),
    ] {
        let agent = refusing(kind);
        for command in ["ADD", "CHECK"] {
            let error = Call::new(command, &agent.socket()).fail();
            assert_eq!(error["code"], code, "{kind:?}");
            assert_eq!(error["msg"], "ambient-redirect: pod shop/cart: the IPv6 rule is gone");
        }
    }
}

#[test]
fn a_pod_is_named_once() {
    let message = "pod shop/cart: the IPv4 map is full";
    let agent = TestAgent::start(move |_| vec![Reply::Error(wire::Error::new(ErrorKind::Datapath, message))]);
    assert_eq!(Call::new("ADD", &agent.socket()).fail()["msg"], format!("ambient-redirect: {message}"));
}

#[test]
fn an_answer_to_another_question_is_an_error() {
    let agent = TestAgent::start(|_| vec![Reply::Done]);
    assert_eq!(Call::new("ADD", &agent.socket()).fail_code(), 104);
    let agent = TestAgent::start(|_| vec![Reply::Added { enrolled: true }]);
    assert_eq!(Call::new("CHECK", &agent.socket()).fail_code(), 104);
}

#[test]
fn del_needs_neither_namespace_nor_result_nor_agent() {
    let agent = TestAgent::start(agreeable);
    let mut del = Call::new("DEL", &agent.socket()).unset("prevResult");
    for netns in [Some(""), Some("/proc/self/ns/absent"), None] {
        del.environment.remove("CNI_NETNS");
        if let Some(netns) = netns {
            del = del.environment("CNI_NETNS", netns);
        }
        assert_eq!(del.succeed_silently(), None);
        let (request, netns) = agent.requests().pop().unwrap();
        assert!(matches!(request, Request::Del { attachment } if attachment.container_id == "c1"));
        assert_eq!(netns, None);
    }
    let note = Call::new("DEL", &absent()).succeed_silently().unwrap();
    assert!(note.contains("shop/cart"), "{note}");
}

#[test]
fn a_deletion_without_an_agent_is_noted_until_the_container_is_added_again() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("agent.sock");
    let notes = || deletions::read(&socket).unwrap();
    Call::new("DEL", &socket).succeed_silently().unwrap();
    assert_eq!(notes().iter().map(|note| note.container_id.as_str()).collect::<Vec<_>>(), ["c1"]);
    // ADD removes the note even if it then fails.
    assert_eq!(Call::new("ADD", &socket).fail_code(), 11);
    assert_eq!(notes(), []);

    let agent = TestAgent::start(agreeable);
    assert_eq!(Call::new("DEL", &agent.socket()).succeed_silently(), None);
    assert_eq!(deletions::read(&agent.socket()).unwrap(), [], "the agent has answered");

    // A note that stays would make the next agent delete the new pod.
    std::fs::create_dir_all(directory.path().join("agent.deleted/c1:eth0")).unwrap();
    assert_eq!(Call::new("ADD", &socket).fail_code(), 5);
}

#[test]
fn del_fails_only_if_the_agent_failed() {
    for kind in [ErrorKind::Unknown, ErrorKind::Version] {
        Call::new("DEL", &refusing(kind).socket()).succeed_silently();
    }
    assert_eq!(Call::new("DEL", &refusing(ErrorKind::Datapath).socket()).fail_code(), 102);
}

#[test]
fn check_passes_namespace_and_addresses_on() {
    let agent = TestAgent::start(agreeable);
    assert_eq!(Call::new("CHECK", &agent.socket()).succeed_silently(), None);
    let (request, netns) = agent.requests().pop().unwrap();
    let Request::Check { addresses, .. } = request else { panic!("{request:?}") };
    assert_eq!(addresses.len(), 2);
    assert_eq!(netns, Some(stat(NETNS).unwrap().st_ino));
    assert_json_snapshot!(
        "check_mismatch",
        Call::new("CHECK", &refusing(ErrorKind::Mismatch).socket()).fail()
    );
}

#[test]
fn status_tells_whether_captured_pods_suffer_too() {
    let agent = TestAgent::start(agreeable);
    let status = Call::new("STATUS", &agent.socket()).unset("prevResult");
    assert_eq!(status.succeed_silently(), None);
    assert_eq!(agent.requests(), [(Request::Ready, None)]);
    for (kind, code) in [
        (ErrorKind::TryAgain, 50),
        (ErrorKind::Version, 50),
        (ErrorKind::Proxy, 51),
        (ErrorKind::Datapath, 51),
    ] {
        assert_eq!(Call::new("STATUS", &refusing(kind).socket()).fail_code(), code, "{kind:?}");
    }
    assert_json_snapshot!("status_limited", Call::new("STATUS", &refusing(ErrorKind::Proxy).socket()).fail());
}

#[test]
fn gc_passes_the_valid_attachments_on_and_insists_on_them() {
    let agent = TestAgent::start(agreeable);
    let valid = json!([{ "containerID": "c1", "ifname": "eth0" }, { "containerID": "c2", "ifname": "net1" }]);
    let gc = Call::new("GC", &agent.socket()).set("cni.dev/valid-attachments", valid);
    assert_eq!(gc.succeed_silently(), None);
    let Some((Request::Gc { valid }, None)) = agent.requests().pop() else { panic!() };
    assert_eq!(valid.iter().map(|a| a.container_id.as_str()).collect::<Vec<_>>(), ["c1", "c2"]);

    assert_json_snapshot!("gc_without_list", Call::new("GC", &agent.socket()).fail());
    assert_eq!(agent.requests().len(), 1);
}

#[test]
fn gc_of_a_large_node_reaches_the_agent_whole() {
    let agent = TestAgent::start(agreeable);
    let ids: Vec<String> = (0..5_000).map(|i| format!("{i:064x}")).collect();
    let valid: Vec<Value> = ids.iter().map(|id| json!({ "containerID": id, "ifname": "eth0" })).collect();
    let gc = Call::new("GC", &agent.socket()).set("cni.dev/valid-attachments", valid.into());
    assert_eq!(gc.succeed_silently(), None);
    let [(Request::Gc { valid }, None)] = &agent.requests()[..] else { panic!() };
    assert!(valid.iter().map(|attachment| &attachment.container_id).eq(&ids));
}

#[test]
fn commands_need_a_version_that_has_them() {
    let agent = TestAgent::start(agreeable);
    for (command, since) in [("CHECK", "0.4.0"), ("STATUS", "1.1.0"), ("GC", "1.1.0")] {
        for version in SpecVersion::ALL {
            let call = Call::new(command, &agent.socket())
                .set("cniVersion", version.as_str().into())
                .set("cni.dev/valid-attachments", json!([]));
            if version.as_str() < since {
                assert_eq!(call.fail_code(), 1, "{command} {version}");
            } else {
                call.succeed_silently();
            }
        }
    }
    assert_json_snapshot!(
        "check_too_old",
        Call::new("CHECK", &absent()).set("cniVersion", "0.3.1".into()).fail()
    );
}

#[test]
fn version_is_told_whatever_is_asked() {
    let version = Call::new("VERSION", &absent());
    assert_json_snapshot!("version", version.run().stdout);
    for (stdin, answered) in [
        ("", "1.1.0"),
        (r#"{"cniVersion":"1.0.0"}"#, "1.0.0"),
        (r#"{"cniVersion":"0.3.1","timeoutSeconds":"wrong"}"#, "0.3.1"),
        (r#"{"cniVersion":"9.9.9"}"#, "1.1.0"),
        ("nonsense", "1.1.0"),
    ] {
        let outcome = version.run_with(stdin.as_bytes());
        assert!(!outcome.failed);
        assert_eq!(outcome.stdout.unwrap()["cniVersion"], answered, "{stdin}");
    }
}

#[test]
fn errors_follow_the_specification() {
    let add = || Call::new("ADD", &absent());
    assert_json_snapshot!("version_missing", add().unset("cniVersion").fail());
    assert_json_snapshot!("version_unknown", add().set("cniVersion", "2.0.0".into()).fail());
    assert_json_snapshot!(
        "environment",
        add().environment("CNI_IFNAME", "").environment("CNI_CONTAINERID", "!").fail()
    );
    assert_json_snapshot!("wrong_key", add().set("timeoutSeconds", "soon".into()).fail());
    assert_json_snapshot!("not_json", add().run_with(&b"{"[..]).stdout);
    let old = add().set("cniVersion", "0.3.0".into()).fail();
    assert_eq!(old["cniVersion"], "0.3.0", "errors are in the configuration's version");
}

#[test]
fn standard_input_is_bounded() {
    let outcome = Call::new("ADD", &absent()).run_with(io::repeat(b' ').take(MAX_STDIN + 1));
    assert_eq!(outcome.stdout.unwrap()["code"], 6);
}

proptest! {
    #[test]
    fn arbitrary_input_is_an_error_and_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let outcome = Call::new("ADD", &absent()).run_with(bytes.as_slice());
        prop_assert!(outcome.failed);
    }

    #[test]
    fn unknown_keys_of_the_result_survive(key in "[a-zA-Z./]{1,20}", number: i64, text: String) {
        prop_assume!(!["ips", "interfaces", "cniVersion"].contains(&key.as_str()));
        let mut result = prev_result("1.1.0", &["10.0.0.5/24"]);
        result[&key] = json!({ "number": number, "text": text });
        let call = Call::new("ADD", &absent()).namespace("kube-system").set("prevResult", result.clone());
        prop_assert_eq!(call.run().stdout, Some(result));
    }
}
