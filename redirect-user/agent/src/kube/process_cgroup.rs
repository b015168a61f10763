//! Identifies the pod of a process by the name that the kubelet gave its cgroup.
//!
//! | kubelet's driver | runtime | path |
//! |---|---|---|
//! | systemd | containerd | `/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<UID with _>.slice/cri-containerd-<ID>.scope` |
//! | systemd | CRI-O | `/kubepods.slice/kubepods-pod<UID with _>.slice/crio-<ID>.scope` |
//! | systemd | containerd without `SystemdCgroup` | `/system.slice/containerd.service/kubepods-besteffort-pod<UID with _>.slice:cri-containerd:<ID>` |
//! | cgroupfs | containerd | `/kubepods/burstable/pod<UID>/<ID>` |
//! | cgroupfs | CRI-O | `/kubepods/besteffort/pod<UID>/crio-<ID>` |
//!
//! A node in a container (kind, minikube) has path components of its own before these, and a container may have
//! created cgroups below them. Containers choose those names freely, so the outermost match counts.

/// The pod of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Membership {
    /// The pod's UID on the node.
    pub(super) uid: String,
    /// The container's ID; `None` for a process outside containers.
    pub(super) container: Option<String>,
}

/// Parses a `/proc/<pid>/cgroup` of cgroup v2, v1 or both.
pub(super) fn membership(text: &str) -> Option<Membership> {
    text.lines().find_map(|line| {
        // "hierarchy:controllers:path", and the path may contain colons.
        let path = line.splitn(3, ':').nth(2)?;
        of_path(path.strip_suffix(" (deleted)").unwrap_or(path))
    })
}

fn of_path(path: &str) -> Option<Membership> {
    let mut components = path.split('/');
    let (uid, rest) = components.find_map(pod)?;
    let container = match rest {
        Some(rest) => container(rest),
        None => components.next().and_then(container),
    };
    Some(Membership { uid, container })
}

/// The UID in the name of a pod's cgroup, and the rest of the component.
fn pod(component: &str) -> Option<(String, Option<&str>)> {
    let (name, rest) = match component.split_once(':') {
        Some((name, rest)) => (name, Some(rest)),
        None => (component, None),
    };
    let uid = match name.strip_suffix(".slice") {
        Some(slice) => {
            let (parents, uid) = slice.rsplit_once("-pod")?;
            if !parents.split('-').any(|parent| parent == "kubepods") {
                return None;
            }
            uid.replace('_', "-")
        }
        None => name.strip_prefix("pod")?.to_owned(),
    };
    is_uid(&uid).then_some((uid, rest))
}

/// A UUID, or the MD5 hash that is a static pod's UID.
fn is_uid(text: &str) -> bool {
    let hex = text.bytes().filter(u8::is_ascii_hexdigit).count();
    let dashes = text.bytes().filter(|byte| *byte == b'-').count();
    hex == 32 && (dashes == 0 || dashes == 4) && hex + dashes == text.len()
}

/// The ID in the name of a container's cgroup.
fn container(name: &str) -> Option<String> {
    let name = name.strip_suffix(".scope").unwrap_or(name);
    let id = name.rsplit(['-', ':']).next()?;
    (id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit())).then(|| id.to_owned())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    const UID: &str = "8a3b1c2d-0e4f-4a5b-9c6d-7e8f90a1b2c3";
    const HASH: &str = "0123456789abcdef0123456789abcdef";
    const ID: &str = "f00df00df00df00df00df00df00df00df00df00df00df00df00df00df00df00d";

    /// `{u}` is a UID, `{s}` the same in systemd's form, `{i}` a container's ID.
    pub(in crate::kube) const SHAPES: [&str; 15] = [
        "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{s}.slice/cri-containerd-{i}.scope\n",
        "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{s}.slice/crio-{i}.scope\n",
        "0::/kubepods.slice/kubepods-pod{s}.slice/crio-{i}.scope/container\n",
        "0::/system.slice/containerd.service/kubepods-burstable-pod{s}.slice:cri-containerd:{i}\n",
        "0::/kubepods/burstable/pod{u}/{i}\n",
        "0::/kubepods/pod{u}/{i}\n",
        "0::/kubepods/besteffort/pod{u}/crio-{i}\n",
        "0::/kubepods/burstable/pod{u}/{i} (deleted)\n",
        "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/\
         kubelet-kubepods-burstable-pod{s}.slice/cri-containerd-{i}.scope\n",
        "0::/kubelet/kubepods/besteffort/pod{u}/{i}\n",
        // As seen by an agent in a cgroup namespace of its own.
        "0::/../../kubepods-besteffort-pod{s}.slice/cri-containerd-{i}.scope\n",
        // v1.
        "12:pids:/kubepods/burstable/pod{u}/{i}\n11:memory:/kubepods/burstable/pod{u}/{i}\n1:name=systemd:/x\n",
        "12:pids:/\n4:cpu,cpuacct:/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{s}.slice/\
         cri-containerd-{i}.scope\n0::/system.slice/containerd.service\n",
        // A container that creates cgroups named after another pod.
        "0::/kubepods/burstable/pod{u}/{i}/kubepods/pod11111111-2222-3333-4444-555555555555/x\n",
        "0::/kubepods/burstable/pod{u}/docker-{i}.scope\n",
    ];

    pub(in crate::kube) fn fill(shape: &str, uid: &str, container: &str) -> String {
        shape.replace("{u}", uid).replace("{s}", &uid.replace('-', "_")).replace("{i}", container)
    }

    #[test]
    fn every_shape_names_the_pod_and_the_container() {
        for shape in SHAPES {
            for uid in [UID, HASH] {
                let text = fill(shape, uid, ID);
                let expected = Membership { uid: uid.into(), container: Some(ID.into()) };
                assert_eq!(membership(&text), Some(expected), "{text}");
            }
        }
    }

    #[test]
    fn a_process_of_no_container() {
        let text = format!("0::/kubepods/burstable/pod{UID}\n");
        assert_eq!(membership(&text), Some(Membership { uid: UID.into(), container: None }));
        let text = format!("0::/kubepods/burstable/pod{UID}/short\n");
        assert_eq!(membership(&text), Some(Membership { uid: UID.into(), container: None }));
    }

    #[test]
    fn other_processes() {
        let texts = [
            "",
            "\n",
            "0::/\n",
            "0:\n",
            "nonsense",
            "0::/system.slice/containerd.service\n",
            "0::/kubepods.slice/kubepods-burstable.slice\n",
            "0::/user.slice/podman-1234.scope\n",
            "0::/machine.slice/libpod-f00d.scope\n",
            "0::/kubepods/burstable/pod1234/c\n",
            "0::/kubepods/burstable/podzzzzzzzz-0e4f-4a5b-9c6d-7e8f90a1b2c3/c\n",
            // Not one of the kubelet's slices.
            "0::/user.slice/user-pod8a3b1c2d_0e4f_4a5b_9c6d_7e8f90a1b2c3.slice/x\n",
        ];
        for text in texts {
            assert_eq!(membership(text), None, "{text:?}");
        }
    }
}
