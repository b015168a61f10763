use std::fs::File;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use super::super::process_cgroup::tests::{SHAPES, fill};
use super::*;
use redirect_testing::skip;

const UID: &str = "8a3b1c2d-0e4f-4a5b-9c6d-7e8f90a1b2c3";

/// A fake `/proc`, in which files stand in for namespaces.
struct Tree(TempDir);

impl Tree {
    /// With the host's process 1.
    fn new() -> Self {
        let tree = Self(tempfile::tempdir().unwrap());
        File::create(tree.0.path().join("host")).unwrap();
        tree.process(1, "0::/init.scope\n", "host");
        fs::create_dir(tree.0.path().join("sys")).unwrap();
        tree
    }

    fn process(&self, pid: u32, cgroup: &str, netns: &str) {
        let directory = self.0.path().join(pid.to_string());
        fs::create_dir_all(directory.join("ns")).unwrap();
        fs::write(directory.join("cgroup"), cgroup).unwrap();
        let namespace = self.0.path().join(netns);
        File::options().create(true).append(true).open(&namespace).unwrap();
        fs::hard_link(namespace, directory.join("ns/net")).unwrap();
    }

    fn netns(&self, name: &str) -> NetNs {
        NetNs::open(&self.0.path().join(name)).unwrap()
    }

    fn find(&self, uid: &str) -> Vec<Sandbox> {
        Sandboxes::new(self.0.path().to_path_buf()).find(&[uid.to_owned()]).unwrap()
    }
}

fn id(letter: &str) -> String {
    letter.repeat(64)
}

#[test]
fn every_driver_and_runtime_leads_to_the_namespace() {
    for shape in SHAPES {
        let tree = Tree::new();
        tree.process(7, &fill(shape, "11111111-2222-3333-4444-555555555555", &id("b")), "other");
        tree.process(8, &fill(shape, UID, &id("a")), "pod");
        let found = tree.find(UID);
        let [sandbox] = found.as_slice() else { panic!("{shape}: {found:?}") };
        assert_eq!(sandbox.netns, tree.netns("pod"), "{shape}");
        assert_eq!(sandbox.containers, [id("a")].into(), "{shape}");
    }
}

#[test]
fn processes_of_one_pod_are_told_apart_by_their_namespaces() {
    let tree = Tree::new();
    let cgroup = |letter: &str| fill("0::/kubepods/pod{u}/{i}\n", UID, &id(letter));
    tree.process(100, &cgroup("a"), "pod");
    tree.process(101, &cgroup("b"), "pod");
    tree.process(102, &cgroup("b"), "nested");
    // A container's monitor may run in the host's namespace.
    tree.process(99, &cgroup("a"), "host");
    let found = tree.find(UID);
    assert_eq!(found.len(), 2);
    assert_eq!(found[0].netns, tree.netns("pod"));
    assert_eq!(found[0].containers, [id("a"), id("b")].into());
    assert_eq!(found[1].netns, tree.netns("nested"));
}

#[test]
fn processes_that_end_meanwhile_are_passed_over() {
    let tree = Tree::new();
    let cgroup = fill("0::/kubepods/pod{u}/{i}\n", UID, &id("a"));
    for pid in [100, 101, 102] {
        tree.process(pid, &cgroup, "pod");
    }
    let sandboxes = Sandboxes::new(tree.0.path().to_path_buf());
    let uids = [UID.to_owned()];
    assert_eq!(sandboxes.find(&uids).unwrap().len(), 1);
    // After the scan: one has ended, one has ended and its ID was reused, one ends during the check.
    fs::remove_dir_all(tree.0.path().join("100")).unwrap();
    fs::write(tree.0.path().join("101/cgroup"), "0::/system.slice/x.service\n").unwrap();
    fs::remove_file(tree.0.path().join("102/cgroup")).unwrap();
    assert!(sandboxes.find(&uids).unwrap().is_empty());
    // A new process is found at once, however recent the last scan.
    tree.process(200, &cgroup, "new");
    assert_eq!(sandboxes.find(&uids).unwrap()[0].netns, tree.netns("new"));
}

#[test]
fn a_directory_that_is_no_proc_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let error = Sandboxes::new(directory.path().to_path_buf()).find(&[UID.to_owned()]).unwrap_err();
    assert!(error.to_string().contains("is it the host's /proc?"), "{error}");
}

/// A process in a network namespace and a cgroup of its own; dropping it removes both.
struct Process {
    child: Child,
    cgroups: Vec<PathBuf>,
}

impl Process {
    fn start(uid: &str) -> Result<Self, String> {
        let mount = cgroup::mount().map_err(|error| error.to_string())?;
        let kubepods = mount.join(format!("ambient-redirect-test-{}", std::process::id()));
        let pod = kubepods.join(format!("pod{uid}"));
        let container = pod.join(id("a"));
        let script = "ip link set lo up && ip addr add 10.9.8.7/32 dev lo && ip addr add fd00::987/128 dev lo && \
                      echo ready && exec sleep 60";
        let mut child = Command::new("unshare")
            .args(["--net", "sh", "-c", script])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("unshare: {error}"))?;
        let made = fs::create_dir_all(&container)
            .and_then(|()| fs::write(container.join("cgroup.procs"), child.id().to_string()));
        let mut line = String::new();
        let output = child.stdout.take().unwrap();
        let _ = std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut line);
        let process = Self { child, cgroups: vec![container, pod, kubepods] };
        made.map_err(|error| format!("a scratch cgroup: {error}"))?;
        if line == "ready\n" { Ok(process) } else { Err("a scratch network namespace can't be made".into()) }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        for cgroup in &self.cgroups {
            // The kernel takes a moment to see that the cgroup is empty.
            for _ in 0..50 {
                if fs::remove_dir(cgroup).is_ok() || !cgroup.exists() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

#[test]
fn a_real_process_leads_to_its_real_namespace_and_addresses() {
    const NAME: &str = "a_real_process_leads_to_its_real_namespace_and_addresses";
    if !nix::unistd::geteuid().is_root() {
        skip(NAME, "it needs root");
        return;
    }
    let process = match Process::start(UID) {
        Ok(process) => process,
        Err(reason) => {
            skip(NAME, reason);
            return;
        }
    };
    let found = Sandboxes::new("/proc".into()).find(&[UID.to_owned()]).unwrap();
    let [sandbox] = found.as_slice() else { panic!("{found:?}") };
    assert_eq!(sandbox.containers, [id("a")].into());
    let expected = NetNs::open(Path::new(&format!("/proc/{}/ns/net", process.child.id()))).unwrap();
    assert_eq!(sandbox.netns, expected);
    assert_ne!(sandbox.netns, NetNs::current().unwrap());
    let addresses = sandbox.netns.addresses().unwrap();
    for address in ["10.9.8.7", "fd00::987", "127.0.0.1"] {
        assert!(addresses.contains(&address.parse().unwrap()), "{address} is not in {addresses:?}");
    }
}
