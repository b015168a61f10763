//! BPF features that the data path needs.

use std::io;
use std::os::fd::{AsFd as _, RawFd};

use aya::maps::MapType;
use aya::sys::is_map_supported;
use aya_obj::generated::bpf_attach_type::{self, *};
use aya_obj::generated::bpf_func_id::{self, *};
use aya_obj::generated::bpf_prog_type::{self, *};
use nix::errno::Errno;

use super::tiny::{self, Hook};
use super::{Cause, Check, Requirements};
use crate::{bpf, netns};

/// A hook, the helpers that our programs call there, and what provides them.
struct HookNeeds {
    name: &'static str,
    hook: Hook,
    helpers: &'static [(&'static str, bpf_func_id, &'static str)],
    remedy: &'static str,
}

const fn hook(program: bpf_prog_type, attach: Option<bpf_attach_type>) -> Hook {
    Hook { program, attach }
}

const fn sock_addr(
    name: &'static str,
    attach: bpf_attach_type,
    helpers: &'static [(&'static str, bpf_func_id, &'static str)],
) -> HookNeeds {
    let hook = hook(BPF_PROG_TYPE_CGROUP_SOCK_ADDR, Some(attach));
    HookNeeds { name, hook, helpers, remedy: "CONFIG_CGROUP_BPF=y, Linux 5.8" }
}

type Helper = (&'static str, bpf_func_id, &'static str);

const COOKIE: Helper = ("bpf_get_netns_cookie", BPF_FUNC_get_netns_cookie, "Linux 5.7; in sock_ops 5.15");
const CGROUP: Helper =
    ("bpf_get_current_cgroup_id", BPF_FUNC_get_current_cgroup_id, "CONFIG_CGROUPS=y, Linux 4.18");
const SETSOCKOPT: Helper = ("bpf_setsockopt", BPF_FUNC_setsockopt, "Linux 5.8; in bind 5.12");
const RETVAL: Helper = ("bpf_set_retval", BPF_FUNC_set_retval, "Linux 5.18");
const STORAGE: Helper = ("bpf_sk_storage_get", BPF_FUNC_sk_storage_get, "Linux 5.8");
const ASSIGN: Helper = ("bpf_sk_assign", BPF_FUNC_sk_assign, "CONFIG_INET=y, Linux 5.7; in sk_lookup 5.9");

const SOCKET: Helper = ("bpf_get_socket_cookie", BPF_FUNC_get_socket_cookie, "Linux 4.18");

const CONNECT: &[Helper] = &[COOKIE, CGROUP, SETSOCKOPT, RETVAL, STORAGE, SOCKET];
const BIND: &[Helper] = &[COOKIE, CGROUP, SETSOCKOPT, RETVAL, SOCKET];
const DNS: &[Helper] = &[COOKIE, STORAGE, SOCKET];

/// All hooks of the kernel side.
const HOOKS: [HookNeeds; 13] = [
    sock_addr("cgroup/connect4", BPF_CGROUP_INET4_CONNECT, CONNECT),
    sock_addr("cgroup/connect6", BPF_CGROUP_INET6_CONNECT, CONNECT),
    sock_addr("cgroup/bind4", BPF_CGROUP_INET4_BIND, BIND),
    sock_addr("cgroup/bind6", BPF_CGROUP_INET6_BIND, BIND),
    sock_addr("cgroup/sendmsg4", BPF_CGROUP_UDP4_SENDMSG, DNS),
    sock_addr("cgroup/sendmsg6", BPF_CGROUP_UDP6_SENDMSG, DNS),
    sock_addr("cgroup/recvmsg4", BPF_CGROUP_UDP4_RECVMSG, DNS),
    sock_addr("cgroup/recvmsg6", BPF_CGROUP_UDP6_RECVMSG, DNS),
    sock_addr("cgroup/getpeername4", BPF_CGROUP_INET4_GETPEERNAME, DNS),
    sock_addr("cgroup/getpeername6", BPF_CGROUP_INET6_GETPEERNAME, DNS),
    HookNeeds {
        name: "TC",
        hook: hook(BPF_PROG_TYPE_SCHED_CLS, None),
        helpers: &[
            ASSIGN,
            SOCKET,
            STORAGE,
            ("bpf_skc_lookup_tcp", BPF_FUNC_skc_lookup_tcp, "Linux 5.2"),
            ("bpf_tcp_check_syncookie", BPF_FUNC_tcp_check_syncookie, "CONFIG_SYN_COOKIES=y, Linux 5.2"),
            ("bpf_skb_cgroup_id", BPF_FUNC_skb_cgroup_id, "CONFIG_SOCK_CGROUP_DATA=y, Linux 4.18"),
            ("bpf_fib_lookup", BPF_FUNC_fib_lookup, "Linux 4.18"),
        ],
        remedy: "CONFIG_NET_CLS_BPF, CONFIG_NET_CLS_ACT",
    },
    HookNeeds {
        name: "sk_lookup",
        hook: hook(BPF_PROG_TYPE_SK_LOOKUP, Some(BPF_SK_LOOKUP)),
        helpers: &[ASSIGN],
        remedy: "CONFIG_INET=y, Linux 5.9",
    },
    HookNeeds {
        name: "sock_ops",
        hook: hook(BPF_PROG_TYPE_SOCK_OPS, None),
        helpers: &[COOKIE, ("bpf_sock_hash_update", BPF_FUNC_sock_hash_update, "Linux 4.18")],
        remedy: "CONFIG_CGROUP_BPF=y",
    },
];

const MAPS: [(&str, MapType); 6] = [
    ("hash", MapType::Hash),
    ("LRU hash", MapType::LruHash),
    ("LPM trie", MapType::LpmTrie),
    ("socket hash", MapType::SockHash),
    ("socket storage", MapType::SkStorage),
    ("ring buffer", MapType::RingBuf),
];

pub(super) fn checks(_: &Requirements) -> Vec<Check> {
    if let Err(error) = tiny::load(hook(BPF_PROG_TYPE_SOCKET_FILTER, None)) {
        return vec![not_at_all(error)];
    }
    let mut checks: Vec<Check> = HOOKS.iter().map(hook_check).collect();
    checks.push(maps());
    checks.push(listeners());
    checks.push(link_update());
    checks.push(netns_cookie());
    checks.push(tcx());
    checks
}

/// `bpf()` is refused altogether, so the probes can't find out anything.
fn not_at_all(error: Errno) -> Check {
    match error {
        Errno::ENOSYS => Check::fail(
            "bpf()",
            Cause::Kernel,
            format!("the kernel lacks it: {error}"),
            "CONFIG_BPF_SYSCALL=y",
        ),
        error => untried("bpf()", "refused", error),
    }
}

/// A probe without an answer: the feature may or may not exist.
fn untried(check: &str, what: &str, error: Errno) -> Check {
    let detail = format!("{what}: {error}");
    match error {
        Errno::EPERM | Errno::EACCES => Check::fail(
            check,
            Cause::Privileges,
            detail,
            "run it as root of the host's user namespace, without a seccomp profile or lockdown that forbids bpf()",
        ),
        Errno::ENOMEM => Check::fail(
            check,
            Cause::Untried,
            detail,
            "free memory on the node, or raise the limit of the agent's container",
        ),
        _ => Check::fail(check, Cause::Untried, detail, "try again; if it stays, report this error"),
    }
}

/// The kernel's error for unknown types of programs or maps, attach types, and commands.
const UNKNOWN: Errno = Errno::EINVAL;

fn hook_check(needs: &HookNeeds) -> Check {
    match tiny::load(needs.hook) {
        Ok(_) => {}
        Err(UNKNOWN) => {
            return missing(needs.name, format!("no programs of this type: {UNKNOWN}"), needs.remedy);
        }
        Err(error) => return untried(needs.name, "cannot load a program of this type", error),
    }
    let mut lacking = Vec::new();
    for (name, helper, remedy) in needs.helpers {
        match tiny::has_helper(needs.hook, *helper) {
            Ok(true) => {}
            Ok(false) => lacking.push((*name, *remedy)),
            Err(error) => return untried(needs.name, &format!("cannot probe {name}"), error),
        }
    }
    if lacking.is_empty() {
        let names: Vec<_> = needs.helpers.iter().map(|(name, ..)| *name).collect();
        return Check::ok(needs.name, names.join(", "));
    }
    let names: Vec<_> = lacking.iter().map(|(name, _)| *name).collect();
    let remedies: Vec<_> = lacking.iter().map(|(name, remedy)| format!("{name}: {remedy}")).collect();
    missing(needs.name, format!("the kernel lacks {}", names.join(", ")), &remedies.join("; "))
}

fn missing(check: &str, detail: String, brought_by: &str) -> Check {
    Check::fail(check, Cause::Kernel, detail, format!("a kernel that has it: {brought_by}"))
}

fn maps() -> Check {
    const NAME: &str = "maps";
    let mut lacking = Vec::new();
    for (name, kind) in MAPS {
        match is_map_supported(kind) {
            Ok(true) => {}
            Ok(false) => lacking.push(name),
            Err(error) => {
                return untried(NAME, &format!("cannot make a map ({name})"), errno(&error.io_error));
            }
        }
    }
    if lacking.is_empty() {
        return Check::ok(NAME, MAPS.map(|(name, _)| name).join(", "));
    }
    missing(
        NAME,
        format!("the kernel lacks {}", lacking.join(", ")),
        "CONFIG_BPF_STREAM_PARSER or CONFIG_NET, Linux 5.8",
    )
}

/// For connections that the socket lookup gives to the node proxy.
fn listeners() -> Check {
    const NAME: &str = "listeners";
    match tiny::tc_may_keep_sockets() {
        Ok(true) => Check::ok(NAME, "stored by TC programs"),
        Ok(false) => Check::ok(NAME, "stored by sock_ops: TC programs may not (Linux 7.3)"),
        // The verifier's answers.
        Err(error @ (Errno::EINVAL | Errno::EACCES)) => {
            missing(NAME, format!("TC programs cannot store sockets in a map: {error}"), "Linux 5.10")
        }
        Err(error) => untried(NAME, "cannot store a socket in a map", error),
    }
}

/// A kernel that knows the command rejects the descriptors; another one rejects the command.
fn link_update() -> Check {
    const NAME: &str = "BPF_LINK_UPDATE";
    const NOTHING: RawFd = -1;
    match bpf::link_update(NOTHING, NOTHING) {
        Err(UNKNOWN) => missing(NAME, "unknown to the kernel".into(), "Linux 5.7"),
        Ok(()) | Err(Errno::EBADF) => Check::ok(NAME, "programs can be replaced in place"),
        Err(error) => untried(NAME, "refused", error),
    }
}

fn netns_cookie() -> Check {
    const NAME: &str = "SO_NETNS_COOKIE";
    match netns::current_cookie().map_err(|error| errno(&error)) {
        Ok(_) => Check::ok(NAME, "network namespaces are distinguishable"),
        Err(Errno::ENOPROTOOPT) => {
            missing(NAME, "the kernel can't tell network namespaces apart".into(), "Linux 5.14")
        }
        Err(error) => untried(NAME, "cannot identify network namespaces", error),
    }
}

fn errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw)
}

/// A kernel that does not know the attach type fails before it looks for the interface, which does not exist.
fn tcx() -> Check {
    const NAME: &str = "tcx links";
    const NO_INTERFACE: u32 = i32::MAX as u32;
    let tried = tiny::load(hook(BPF_PROG_TYPE_SCHED_CLS, None))
        .and_then(|program| bpf::link_create(program.as_fd(), NO_INTERFACE, BPF_TCX_INGRESS, 0));
    match tried {
        Ok(_) | Err(Errno::ENODEV) => Check::ok(NAME, "available with --tc tcx"),
        Err(UNKNOWN) => Check::ok(NAME, "none (needs Linux 6.6): clsact filters are used"),
        Err(error) => Check::warn(NAME, format!("cannot be tried: {error}"), "clsact filters are used"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_kernels_own_answer_is_a_lack() {
        for (error, cause) in [
            (Errno::EPERM, Cause::Privileges),
            (Errno::EACCES, Cause::Privileges),
            (Errno::ENOMEM, Cause::Untried),
            (Errno::EREMOTEIO, Cause::Untried),
        ] {
            for check in [untried("maps", "cannot make a map (ring buffer)", error), not_at_all(error)] {
                assert_eq!(check.cause, Some(cause), "{check:?}");
                assert!(
                    check.detail.contains(&error.to_string()) && !check.detail.contains("lacks"),
                    "{check:?}"
                );
            }
        }
        let check = not_at_all(Errno::ENOSYS);
        assert!(check.cause == Some(Cause::Kernel) && check.detail.contains("lacks"), "{check:?}");
    }
}
