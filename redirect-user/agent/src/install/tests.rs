//! Directories as primary CNIs leave them, a plugin that answers, and an agent that listens.

mod crash;
mod repair;

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::PathBuf;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use redirect_protocol::wire::testing::TestAgent;
use redirect_protocol::wire::{ErrorKind, Reply, Request};

/// Answers like the plugin; the end-to-end tests run the real one in pods.
const PLUGIN_SCRIPT: &str = r#"#!/bin/sh
case $CNI_COMMAND in
VERSION) echo '{"cniVersion":"1.1.0","supportedVersions":["0.3.1","0.4.0","1.0.0","1.1.0"]}' ;;
STATUS) grep -q '"agentSocket"' || exit 1 ;;
*) exit 1 ;;
esac
"#;

/// A node's directories, and an agent.
struct Host {
    options: Options,
    directory: TempDir,
    _agent: TestAgent,
}

impl Host {
    fn new(files: &[(&str, Value)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let agent = TestAgent::start(|_| vec![Reply::Done]);
        let path = |name: &str| directory.path().join(name);
        let options = Options {
            directories: Directories { cni_conf_dir: path("net.d"), cni_bin_dir: path("bin") },
            cni_conf_name: None,
            cni_own_conf: false,
            cni_plugin: Some(path("source")),
            cni_agent_socket: agent.socket(),
            cni_timeout: None,
            cni_exclude_namespaces: None,
        };
        for made in [&options.directories.cni_conf_dir, &options.directories.cni_bin_dir] {
            fs::create_dir(made).unwrap();
        }
        let host = Self { options, directory, _agent: agent };
        host.plugin(PLUGIN_SCRIPT);
        fs::write(host.options.directories.cni_bin_dir.join("bridge"), "").unwrap();
        for (name, content) in files {
            host.write(name, content);
        }
        host
    }

    fn plugin(&self, script: &str) {
        let path = self.directory.path().join("source");
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.options.directories.cni_conf_dir.join(name)
    }

    fn write(&self, name: &str, content: &Value) {
        fs::write(self.path(name), content.to_string()).unwrap();
    }

    fn install(&self) -> Result<Outcome, Error> {
        install_once(&self.options)
    }

    /// Every file by name, except kept configurations and files that a keeper is renaming.
    fn files(&self) -> BTreeMap<String, Value> {
        let read = |entry: fs::DirEntry| {
            if is_original(&entry.file_name().to_string_lossy()) {
                return None;
            }
            let content = match fs::read(entry.path()) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
                content => serde_json::from_slice(&content.unwrap()).unwrap_or(Value::Null),
            };
            Some((entry.file_name().into_string().unwrap(), content))
        };
        fs::read_dir(&self.options.directories.cni_conf_dir)
            .unwrap()
            .filter_map(|entry| read(entry.unwrap()))
            .collect()
    }

    /// The chain as a runtime sees it: the types of the first configuration's plugins, which must all exist.
    fn runtime_s_view(&self) -> Vec<String> {
        let files = self.files();
        let is_conf = |name: &&String| name.ends_with(".conf") || name.ends_with(".conflist");
        let name = files.keys().find(is_conf).expect("a configuration");
        let content = &files[name];
        assert!(content["name"].is_string() && content["cniVersion"].is_string(), "{name}: {content}");
        let plugins = match content["plugins"].as_array() {
            Some(plugins) if name.ends_with(".conflist") => plugins.clone(),
            None if name.ends_with(".conf") => vec![content.clone()],
            _ => panic!("{name}: {content}"),
        };
        let types = plugins.iter().map(|plugin| plugin["type"].as_str().expect("a type").to_owned());
        let types: Vec<String> = types.collect();
        assert_eq!(types[0], "bridge", "{content}");
        for kind in &types {
            assert!(self.options.directories.cni_bin_dir.join(kind).exists(), "{kind} is not there");
        }
        types
    }
}

fn bridge() -> Value {
    json!({"type": "bridge", "bridge": "cni0", "ipam": {"type": "host-local", "ranges": [[{"subnet": "fd00::/64"}]]}})
}

fn list() -> Value {
    json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge()], "disableCheck": true})
}

fn single() -> Value {
    let mut single = bridge();
    single["cniVersion"] = json!("0.4.0");
    single["name"] = json!("pods");
    single
}

#[test]
fn the_first_configuration_gets_the_plugin_and_keeps_the_rest() {
    let host = Host::new(&[("10-b.conflist", list()), ("20-c.conflist", list())]);
    fs::write(host.path("00-readme.txt"), "not a configuration").unwrap();
    fs::set_permissions(host.path("10-b.conflist"), Permissions::from_mode(0o640)).unwrap();
    if nix::unistd::geteuid().is_root() {
        chown(host.path("10-b.conflist"), Some(7), Some(8)).unwrap();
    }
    let before = fs::metadata(host.path("10-b.conflist")).unwrap();

    let outcome = host.install().unwrap();
    assert_eq!(outcome.configuration, host.path("10-b.conflist"));
    let files = host.files();
    assert_eq!(
        files["10-b.conflist"],
        json!({
            "cniVersion": "1.0.0", "name": "pods", "disableCheck": true,
            "plugins": [bridge(), {"type": "redirect-cni", "agentSocket": host.options.cni_agent_socket}],
        })
    );
    assert_eq!(files["20-c.conflist"], list());
    let after = fs::metadata(host.path("10-b.conflist")).unwrap();
    assert_eq!((after.mode(), after.uid(), after.gid()), (before.mode(), before.uid(), before.gid()));
    let plugin = fs::metadata(host.options.directories.installed_plugin()).unwrap();
    assert_eq!(plugin.mode() & 0o7777, 0o755);

    assert!(host.install().unwrap().changed.is_empty(), "nothing is left to do");
    assert!(missing(&host.options).unwrap().is_empty());
}

#[test]
fn settings_that_change_are_carried_over() {
    let mut host = Host::new(&[("10-b.conflist", list())]);
    host.install().unwrap();
    host.options.cni_timeout = Some(7);
    host.options.cni_exclude_namespaces = Some(vec!["kube-system".into()]);
    assert_eq!(missing(&host.options).unwrap(), [host.path("10-b.conflist").display().to_string()]);
    host.install().unwrap();
    let plugins = &host.files()["10-b.conflist"]["plugins"];
    assert_eq!(plugins.as_array().unwrap().len(), 2);
    assert_eq!(plugins[1]["timeoutSeconds"], 7);
    assert_eq!(plugins[1]["excludeNamespaces"], json!(["kube-system"]));

    host.plugin(&format!("{PLUGIN_SCRIPT}# newer\n"));
    assert_eq!(host.install().unwrap().changed, [host.options.directories.installed_plugin()]);
}

#[test]
fn a_single_configuration_becomes_a_list() {
    let host = Host::new(&[("10-b.conf", single())]);
    assert_eq!(host.install().unwrap().configuration, host.path("10-b.conflist"));
    let files = host.files();
    assert_eq!(files.keys().collect::<Vec<_>>(), ["10-b.conflist"]);
    assert_eq!(files["10-b.conflist"]["plugins"][0], bridge());
    assert_eq!(files["10-b.conflist"]["cniVersion"], "0.4.0");

    // The primary CNI restarts and writes its own file again, with other contents.
    let mut newer = single();
    newer["bridge"] = json!("cni1");
    host.write("10-b.conf", &newer);
    host.install().unwrap();
    let files = host.files();
    assert_eq!(files.keys().collect::<Vec<_>>(), ["10-b.conflist"]);
    assert_eq!(files["10-b.conflist"]["plugins"][0]["bridge"], "cni1");
}

#[test]
fn a_list_of_somebody_else_is_not_overwritten() {
    let host = Host::new(&[("10-b.conf", single()), ("10-b.conflist", list())]);
    assert!(matches!(host.install().unwrap_err(), Error::Ambiguous { .. }));
    assert_eq!(host.files()["10-b.conflist"], list());
}

#[test]
fn a_name_chooses_and_is_found_again_as_a_list() {
    let mut host = Host::new(&[("10-b.conflist", list()), ("87-podman.conf", single())]);
    host.options.cni_conf_name = Some("87-podman.conf".into());
    for _ in 0..2 {
        let outcome = host.install().unwrap();
        assert_eq!(outcome.configuration, host.path("87-podman.conflist"));
        assert!(outcome.warnings.iter().any(|warning| warning.contains("10-b.conflist")), "{outcome:?}");
    }
    assert_eq!(host.files()["10-b.conflist"], list());

    host.options.cni_conf_name = Some("99-nothing.conflist".into());
    assert!(matches!(host.install().unwrap_err(), Error::NoSuchConfiguration { .. }));
}

#[test]
fn a_configuration_of_our_own_follows_the_primary_one() {
    let mut host = Host::new(&[("10-b.conflist", list())]);
    host.options.cni_own_conf = true;
    assert_eq!(host.install().unwrap().configuration, host.path(OWN_CONF));
    assert_eq!(host.files()["10-b.conflist"], list());
    assert_eq!(host.runtime_s_view(), ["bridge", PLUGIN]);

    let mut newer = list();
    newer["plugins"][0]["bridge"] = json!("cni1");
    host.write("10-b.conflist", &newer);
    host.install().unwrap();
    assert_eq!(host.files()[OWN_CONF]["plugins"][0]["bridge"], "cni1");

    fs::rename(host.path(OWN_CONF), host.path(&format!("{OWN_CONF}.cilium_bak"))).unwrap();
    let warnings = host.install().unwrap().warnings;
    assert!(warnings.iter().any(|warning| warning.contains("cni.exclusive=false")), "{warnings:?}");

    // The reverse direction.
    host.options.cni_own_conf = false;
    host.install().unwrap();
    assert!(!host.path(OWN_CONF).exists());
    assert_eq!(host.runtime_s_view(), ["bridge", PLUGIN]);

    host.options.cni_own_conf = true;
    host.write("00-a.conflist", &list());
    assert!(matches!(host.install().unwrap_err(), Error::NotFirst { .. }));
}

#[test]
fn removal_leaves_what_was_there_before() {
    for own in [false, true] {
        let mut host = Host::new(&[("10-b.conflist", list()), ("20-c.conflist", list())]);
        host.options.cni_own_conf = own;
        host.install().unwrap();
        let changed = remove(&host.options.directories).unwrap();
        assert_eq!(changed.len(), 2, "{changed:?}");
        assert_eq!(
            host.files(),
            BTreeMap::from([("10-b.conflist".into(), list()), ("20-c.conflist".into(), list())])
        );
        assert!(!host.options.directories.installed_plugin().exists());
        assert!(remove(&host.options.directories).unwrap().is_empty());
    }
}

/// Name, mode, owner and bytes of every file.
fn exactly(host: &Host) -> BTreeMap<PathBuf, (u32, u32, u32, Vec<u8>)> {
    let read = |entry: fs::DirEntry| {
        let metadata = entry.metadata().unwrap();
        let attributes = (metadata.mode(), metadata.uid(), metadata.gid());
        (entry.path(), (attributes.0, attributes.1, attributes.2, fs::read(entry.path()).unwrap()))
    };
    fs::read_dir(&host.options.directories.cni_conf_dir).unwrap().map(|entry| read(entry.unwrap())).collect()
}

/// Written by hand: another order of keys, other whitespace.
const BY_HAND: &str = r#"{ "name":"pods",
   "cniVersion" : "1.0.0",
 "plugins":[ {"type":"bridge",  "bridge":"cni0"}   ] }"#;

const SINGLE_BY_HAND: &str = r#"{ "name":"pods", "type":"bridge",
   "cniVersion" : "1.0.0" }"#;

#[test]
fn removal_puts_back_the_very_bytes_name_mode_and_owner() {
    for (name, text) in
        [("10-b.conflist", BY_HAND), ("10-b.conf", SINGLE_BY_HAND), ("10-b.json", SINGLE_BY_HAND)]
    {
        let mut host = Host::new(&[("20-c.conflist", list())]);
        fs::write(host.path(name), text).unwrap();
        fs::set_permissions(host.path(name), Permissions::from_mode(0o640)).unwrap();
        if nix::unistd::geteuid().is_root() {
            chown(host.path(name), Some(7), Some(8)).unwrap();
        }
        let before = exactly(&host);
        host.install().unwrap();
        // The settings change, and the keeper repairs: none of that is the original.
        host.options.cni_timeout = Some(7);
        host.install().unwrap();
        assert_ne!(exactly(&host), before);
        remove(&host.options.directories).unwrap();
        assert_eq!(exactly(&host), before, "{name}");
    }
}

#[test]
fn removal_keeps_what_others_have_changed_since() {
    let host = Host::new(&[]);
    fs::write(host.path("10-b.conflist"), BY_HAND).unwrap();
    host.install().unwrap();
    let mut changed = host.files()["10-b.conflist"].clone();
    changed["plugins"][0]["bridge"] = json!("cni1");
    host.write("10-b.conflist", &changed);
    remove(&host.options.directories).unwrap();
    assert_eq!(host.files()["10-b.conflist"]["plugins"], json!([{"type": "bridge", "bridge": "cni1"}]));
    assert_eq!(exactly(&host).len(), 1, "nothing is kept any longer");

    // The primary CNI writes its single configuration again, and the removal comes before the next repair.
    let host = Host::new(&[]);
    fs::write(host.path("10-b.conf"), SINGLE_BY_HAND).unwrap();
    host.install().unwrap();
    let mut newer = single();
    newer["bridge"] = json!("cni1");
    host.write("10-b.conf", &newer);
    let (path, text) = (host.path("10-b.conf"), newer.to_string());
    remove(&host.options.directories).unwrap();
    let files = exactly(&host);
    assert_eq!(
        files.iter().map(|(path, file)| (path, &file.3[..])).collect::<Vec<_>>(),
        [(&path, text.as_bytes())]
    );
}

#[test]
fn removal_takes_the_entry_out_wherever_it_is() {
    let mut host = Host::new(&[("10-b.conflist", list()), ("20-c.conflist", list())]);
    host.install().unwrap();
    host.options.cni_conf_name = Some("20-c.conflist".into());
    host.install().unwrap();
    assert_eq!(remove(&host.options.directories).unwrap().len(), 3);
    assert!(host.files().values().all(|content| *content == list()));
}

/// The directory is unchanged, and the error contains these words.
fn refused(host: &Host, words: &str) {
    let before = host.files();
    let error = host.install().unwrap_err().to_string();
    assert!(error.contains(words), "{error:?} has no {words:?}");
    assert_eq!(host.files(), before, "{words}");
}

#[test]
fn a_plugin_that_does_not_answer_is_not_chained() {
    for (script, words) in [
        ("#!/bin/sh\nexit 1\n", "VERSION fails"),
        ("#!/bin/sh\necho nonsense\n", "VERSION answers"),
        ("#!/nowhere\n", "cannot run it"),
        ("\u{7f}ELF", "cannot run it"),
        (
            "#!/bin/sh\n[ $CNI_COMMAND = VERSION ] && echo '{\"supportedVersions\":[\"1.0.0\"]}'\n",
            "STATUS fails",
        ),
        ("#!/bin/sh\necho '{\"supportedVersions\":[\"0.4.0\"]}'\n", "cniVersion 1.0.0"),
    ] {
        let host = Host::new(&[("10-b.conflist", list())]);
        host.plugin(script);
        refused(&host, words);
    }
}

#[test]
fn a_broken_plugin_does_not_replace_one_that_works() {
    let host = Host::new(&[("10-b.conflist", list())]);
    host.install().unwrap();
    host.plugin("#!/bin/sh\nexit 1\n");
    host.install().unwrap_err();
    assert_eq!(fs::read_to_string(host.options.directories.installed_plugin()).unwrap(), PLUGIN_SCRIPT);
}

#[test]
fn no_agent_no_entry() {
    let mut host = Host::new(&[("10-b.conflist", list())]);
    host.options.cni_agent_socket = host.directory.path().join("nobody.sock");
    refused(&host, "nobody.sock");
}

#[test]
fn an_agent_without_proxy_is_no_obstacle() {
    let host = Host::new(&[("10-b.conflist", list())]);
    host.plugin(&PLUGIN_SCRIPT.replace(
        "STATUS) grep -q '\"agentSocket\"' || exit 1 ;;",
        r#"STATUS) echo '{"code":50,"msg":"no node proxy"}'; exit 1 ;;"#,
    ));
    assert_eq!(host.install().unwrap().warnings, ["no node proxy"]);
    assert_eq!(host.runtime_s_view(), ["bridge", PLUGIN]);
}

#[test]
fn configurations_that_can_t_be_chained_are_named() {
    let mut old = list();
    old["cniVersion"] = json!("0.2.0");
    refused(&Host::new(&[("10-b.conflist", old)]), "10-b.conflist has cniVersion 0.2.0");
    let mut many = list();
    many["cniVersions"] = json!(["1.0.0", "2.0.0"]);
    refused(&Host::new(&[("10-b.conflist", many)]), "cniVersion 2.0.0");
    refused(&Host::new(&[]), "no CNI configuration");
    for broken in [
        json!([]),
        json!({"name": "pods"}),
        json!({"name": "pods", "plugins": []}),
        json!({"name": "", "plugins": [bridge()]}),
        json!({"name": "pods", "plugins": [{"bridge": "cni0"}]}),
        json!({"name": "pods", "plugins": [1]}),
        json!({"name": "pods", "plugins": [{"type": PLUGIN}]}),
    ] {
        refused(&Host::new(&[("10-b.conflist", broken)]), "10-b.conflist ");
    }
}

#[test]
fn a_broken_configuration_before_ours_is_reported() {
    let host = Host::new(&[("10-b.conflist", list())]);
    fs::write(host.path("05-half.conflist"), "{\"name\":").unwrap();
    let outcome = host.install().unwrap();
    assert_eq!(outcome.configuration, host.path("10-b.conflist"));
    assert!(outcome.warnings[0].contains("05-half.conflist"), "{outcome:?}");
}

#[test]
fn istio_s_own_plugin_is_pointed_out() {
    let mut both = list();
    both["plugins"].as_array_mut().unwrap().push(json!({"type": "istio-cni"}));
    let warnings = Host::new(&[("10-b.conflist", both)]).install().unwrap().warnings;
    assert!(warnings[0].contains("istio-cni"), "{warnings:?}");
}

#[test]
fn an_agent_that_refuses_to_answer_counts_as_none() {
    let mut host = Host::new(&[("10-b.conflist", list())]);
    let agent = TestAgent::start(|request| match request {
        Request::Status => {
            vec![Reply::Error(redirect_protocol::wire::Error::new(
                ErrorKind::Datapath,
                "the kernel can't be read",
            ))]
        }
        _ => vec![Reply::Done],
    });
    host.options.cni_agent_socket = agent.socket();
    refused(&host, "the kernel can't be read");
}

#[test]
fn files_are_read_up_to_a_limit() {
    let long = " ".repeat((1 << 20) + 1);
    let host = Host::new(&[("10-b.conflist", list())]);
    // Not the one in use.
    fs::write(host.path("99-long.conflist"), &long).unwrap();
    host.install().unwrap();
    assert_eq!(host.runtime_s_view(), ["bridge", PLUGIN]);
    assert_eq!(fs::read_to_string(host.path("99-long.conflist")).unwrap(), long);
    // A plugin of another size, even an endless one, is replaced without being read.
    let installed = host.options.directories.installed_plugin();
    fs::File::options().write(true).open(&installed).unwrap().set_len(1 << 40).unwrap();
    assert!(!plugin::is_current(&host.options).unwrap());
    host.install().unwrap();
    assert!(plugin::is_current(&host.options).unwrap());
    // A kept configuration is restored as a whole or not at all.
    fs::write(host.path("10-b.conflist.before-ambient-redirect"), &long).unwrap();
    let error = remove(&host.options.directories).unwrap_err().to_string();
    assert!(error.contains("10-b.conflist.before-ambient-redirect is larger than 1048576 bytes"), "{error}");
    assert_eq!(host.runtime_s_view(), ["bridge", PLUGIN]);
    fs::remove_file(host.path("10-b.conflist.before-ambient-redirect")).unwrap();
    // More files than the limit.
    for number in 0..10_000 {
        fs::write(host.path(&format!("{number}.bak")), "").unwrap();
    }
    let error = host.install().unwrap_err().to_string();
    assert!(error.contains("more than 10000 files"), "{error}");
}
