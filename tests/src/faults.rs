//! Makes system calls of a program fail or hang from outside: with a seccomp filter, the kernel asks this process about each of
//! them first (`SECCOMP_RET_USER_NOTIF`). The program is the shipped one and the kernel is real; no special build is needed.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::mem::{offset_of, zeroed};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Context as _, Result};
use libc::{c_long, seccomp_notif, seccomp_notif_resp, sock_filter};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockaddrLike as _, UnixAddr, getsockname};

use crate::process::descriptor_of;
use crate::wait;

/// A fault point by name: a command of bpf(2), a kind of netlink message, an operation on a kind of file, a call of the plugin.
pub type Point = String;

/// What happens at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The call fails with [`ERROR`].
    Fails,
    /// This call and all that follow it fail with this error.
    FailsFromNowOn(i32),
    /// The call does not return until [`Faults::release`].
    Hangs,
}

/// An error that the kernel never returns from these calls: a program that reports it has hit an injected fault.
pub const ERROR: i32 = libc::EREMOTEIO;

/// The program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// `redirect`.
    Agent,
    /// `redirect-cni`. Its points begin with `plugin`.
    Plugin,
}

/// The system calls into which faults can be injected.
const CALLS: [c_long; 20] = [
    libc::SYS_bpf,
    libc::SYS_openat,
    libc::SYS_write,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_mkdir,
    libc::SYS_fsync,
    libc::SYS_setns,
    libc::SYS_socket,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_connect,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_mount,
];

/// Those that are intercepted in the plugin only.
const PLUGIN_CALLS: [c_long; 4] = [libc::SYS_read, libc::SYS_fstatfs, libc::SYS_ioctl, libc::SYS_setsockopt];

/// Faults for the programs that are started with [`Faults::inject_into`].
#[derive(Clone, Debug)]
pub struct Faults {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// The program's directories for checkpoints and pins.
    directories: [(&'static str, PathBuf); 2],
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// How often each point was reached since [`Faults::arm`].
    reached: BTreeMap<Point, usize>,
    armed: Option<Armed>,
    /// Whether the fault has occurred.
    happened: bool,
    /// Whether a call hangs.
    hanging: bool,
    /// How often [`Faults::release`] was called.
    released: u64,
}

#[derive(Clone, Debug)]
struct Armed {
    point: Point,
    occurrence: usize,
    fault: Fault,
}

impl Faults {
    /// No faults so far. The directories are those of the program's checkpoints and pins.
    #[must_use]
    pub fn new(checkpoints: PathBuf, pins: PathBuf) -> Self {
        let directories = [("checkpoint", checkpoints), ("pin", pins)];
        Self { shared: Arc::new(Shared { directories, state: Mutex::default() }) }
    }

    /// Intercepts the calls of the program that the command will start.
    pub fn inject_into(&self, command: &mut Command, program: Program) -> Result<()> {
        let filter = filter(program);
        let page = Page::new()?;
        let shared = Arc::clone(&self.shared);
        thread::spawn(move || {
            if let Err(error) = page.listener().and_then(|listener| shared.answer(&listener, program)) {
                // No process answers for this program, which fails; it must not wait in vain.
                page.0.taken.store(1, Ordering::Release);
                eprintln!("faults: {error:#}");
            }
        });
        // SAFETY: the closure runs between fork and exec; it makes system calls and uses existing memory only.
        unsafe { command.pre_exec(move || page.install(&filter)) };
        Ok(())
    }

    /// Restarts the count of reached points, and makes the fault occur when its point is reached the given number of times.
    pub fn arm(&self, fault: Option<(&Point, usize, Fault)>) {
        let mut state = self.shared.state();
        let armed = fault.map(|(point, occurrence, fault)| Armed { point: point.clone(), occurrence, fault });
        *state = State { armed, released: state.released, hanging: state.hanging, ..State::default() };
    }

    /// The points that were reached, and how often.
    #[must_use]
    pub fn reached(&self) -> BTreeMap<Point, usize> {
        self.shared.state().reached.clone()
    }

    /// Whether the fault has occurred.
    #[must_use]
    pub fn happened(&self) -> bool {
        self.shared.state().happened
    }

    /// Whether a call hangs.
    #[must_use]
    pub fn is_hanging(&self) -> bool {
        self.shared.state().hanging
    }

    /// Continues the call that hangs.
    pub fn release(&self) {
        let mut state = self.shared.state();
        state.released += 1;
        state.hanging = false;
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers the kernel's notifications until the program and its children have ended.
    fn answer(&self, listener: &OwnedFd, program: Program) -> Result<()> {
        let mut hanging: Option<(u64, u64)> = None;
        loop {
            if let Some((id, released)) = hanging
                && self.state().released > released
            {
                respond(listener, id, None)?;
                hanging = None;
            }
            let mut ready = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
            if poll(&mut ready, PollTimeout::from(20_u8))? == 0 {
                continue;
            }
            let events = ready[0].revents().unwrap_or(PollFlags::empty());
            if !events.contains(PollFlags::POLLIN) {
                return Ok(());
            }
            let Some(call) = Call::receive(listener)? else { continue };
            let point = match program {
                Program::Agent => call.point(&self.directories),
                Program::Plugin => call.plugin_point().map(|point| format!("plugin {point}")),
            };
            match point.and_then(|point| self.decide(point)) {
                None => respond(listener, call.0.id, None)?,
                Some(Fault::Fails) => respond(listener, call.0.id, Some(ERROR))?,
                Some(Fault::FailsFromNowOn(error)) => respond(listener, call.0.id, Some(error))?,
                Some(Fault::Hangs) => hanging = Some((call.0.id, self.state().released)),
            }
        }
    }

    fn decide(&self, point: Point) -> Option<Fault> {
        let mut state = self.state();
        let count = state.reached.entry(point.clone()).or_default();
        *count += 1;
        let count = *count;
        let armed = match state.armed.clone()? {
            armed if armed.point != point => return None,
            armed if matches!(armed.fault, Fault::FailsFromNowOn(_)) && count >= armed.occurrence => armed,
            armed if count == armed.occurrence => {
                state.armed = None;
                armed
            }
            _ => return None,
        };
        state.happened = true;
        state.hanging = armed.fault == Fault::Hangs;
        Some(armed.fault)
    }
}

/// An intercepted call.
struct Call(seccomp_notif);

impl Call {
    /// `None` if the calling thread has ended.
    fn receive(listener: &OwnedFd) -> Result<Option<Self>> {
        // SAFETY: plain numbers.
        let mut call = unsafe { zeroed::<seccomp_notif>() };
        // SAFETY: the kernel fills in the structure that this request is for.
        match unsafe { libc::ioctl(listener.as_raw_fd(), NOTIF_RECV, &mut call) } {
            0 => Ok(Some(Self(call))),
            _ => match io::Error::last_os_error() {
                error if [Some(libc::ENOENT), Some(libc::EINTR)].contains(&error.raw_os_error()) => Ok(None),
                error => Err(error).context("SECCOMP_IOCTL_NOTIF_RECV"),
            },
        }
    }

    /// `None`: a call without a fault point.
    fn point(&self, directories: &[(&str, PathBuf)]) -> Option<Point> {
        let arguments = self.0.data.args;
        let file = |path: &Path| {
            let found = directories.iter().find(|(_, directory)| path.starts_with(directory));
            match found {
                Some((kind, _)) => Some(*kind),
                None if path.starts_with("/proc/sys") => Some("sysctl"),
                None if path.starts_with("/proc") && path.ends_with("ns/net") => Some("namespace"),
                None => None,
            }
        };
        let at = |what: &str, path: u64| Some(format!("{what} {}", file(&self.path(path)?)?));
        match c_long::from(self.0.data.nr) {
            libc::SYS_bpf => Some(format!("bpf {}", bpf(arguments[0]))),
            libc::SYS_openat => at("open", arguments[1]),
            libc::SYS_write => {
                let path = fs::read_link(format!("/proc/{}/fd/{}", self.0.pid, arguments[0])).ok()?;
                Some(format!("write {}", file(&path)?))
            }
            libc::SYS_rename => at("rename", arguments[0]),
            libc::SYS_renameat | libc::SYS_renameat2 => at("rename", arguments[1]),
            libc::SYS_unlink => at("remove", arguments[0]),
            libc::SYS_unlinkat => at("remove", arguments[1]),
            libc::SYS_mkdir => at("make directory of", arguments[0]),
            libc::SYS_fsync => Some("fsync".into()),
            libc::SYS_mount => Some("mount".into()),
            libc::SYS_setns => Some("setns".into()),
            libc::SYS_socket => {
                (arguments[0] == libc::AF_NETLINK as u64).then(|| "netlink socket".to_owned())
            }
            libc::SYS_bind => Some(format!("bind {}", self.socket(arguments[0])?)),
            libc::SYS_listen => Some(format!("listen {}", self.socket(arguments[0])?)),
            libc::SYS_connect => Some(format!("connect {}", self.socket(arguments[0])?)),
            libc::SYS_sendto => self.sent(arguments[0], arguments[1]),
            libc::SYS_sendmsg => {
                // struct msghdr: the vector is the third pointer; its first element is the buffer.
                let vector = self.word(arguments[1] + 16)?;
                self.sent(arguments[0], self.word(vector)?)
            }
            libc::SYS_recvfrom | libc::SYS_recvmsg => match self.socket(arguments[0])? {
                kind @ ("netlink" | "ZDS") => Some(format!("{kind} receive")),
                _ => None,
            },
            _ => None,
        }
    }

    /// The same for the plugin.
    fn plugin_point(&self) -> Option<Point> {
        let arguments = self.0.data.args;
        let is_unix = |number| self.socket(number) == Some("unix");
        match c_long::from(self.0.data.nr) {
            libc::SYS_read => (arguments[0] == 0).then(|| "read stdin".into()),
            libc::SYS_write => {
                // It may write to a duplicate.
                let file = |number| fs::read_link(format!("/proc/{}/fd/{number}", self.0.pid)).ok();
                let written = file(arguments[0])?;
                let name = |(number, name)| (file(number).as_ref() == Some(&written)).then_some(name);
                [(1, "write stdout"), (2, "write stderr")].into_iter().find_map(name).map(str::to_owned)
            }
            libc::SYS_openat => {
                // The harness keeps namespaces there.
                let path = self.path(arguments[1])?;
                let is_namespace = path.starts_with("/proc") && path.iter().any(|name| name == "fd");
                is_namespace.then(|| "open namespace".into())
            }
            libc::SYS_fstatfs => Some("fstatfs namespace".into()),
            libc::SYS_ioctl => Some("ioctl namespace".into()),
            libc::SYS_unlink | libc::SYS_unlinkat => Some("remove note".into()),
            libc::SYS_mkdir => Some("make directory of notes".into()),
            libc::SYS_socket => (arguments[0] == libc::AF_UNIX as u64).then(|| "socket".into()),
            libc::SYS_setsockopt => is_unix(arguments[0]).then(|| "setsockopt".into()),
            libc::SYS_connect => is_unix(arguments[0]).then(|| "connect".into()),
            libc::SYS_sendmsg => is_unix(arguments[0]).then(|| "send".into()),
            libc::SYS_recvmsg => is_unix(arguments[0]).then(|| "receive".into()),
            _ => None,
        }
    }

    fn sent(&self, socket: u64, buffer: u64) -> Option<Point> {
        match self.socket(socket)? {
            "ZDS" => Some("ZDS send".into()),
            "netlink" => {
                // struct nlmsghdr: length, then kind.
                let kind = u16::try_from(self.word(buffer)? >> 32 & 0xffff).ok()?;
                Some(format!("netlink {}", netlink(kind)))
            }
            _ => None,
        }
    }

    /// The kind of a socket, if it is a relevant one.
    fn socket(&self, number: u64) -> Option<&'static str> {
        let process = nix::unistd::Pid::from_raw(i32::try_from(self.0.pid).ok()?);
        let group = thread_group(process.as_raw())?;
        let socket = descriptor_of(group, i32::try_from(number as u32).ok()?).ok()?;
        let address = getsockname::<nix::sys::socket::SockaddrStorage>(socket.as_raw_fd()).ok()?;
        match address.family()? {
            AddressFamily::Netlink => Some("netlink"),
            AddressFamily::Inet | AddressFamily::Inet6 => Some("TCP"),
            AddressFamily::Unix => {
                let address = getsockname::<UnixAddr>(socket.as_raw_fd()).ok()?;
                Some(if address.path().is_some_and(|path| path.ends_with("zds.sock")) {
                    "ZDS"
                } else {
                    "unix"
                })
            }
            _ => None,
        }
    }

    fn path(&self, address: u64) -> Option<PathBuf> {
        let mut bytes = self.memory(address, 256)?;
        bytes.truncate(bytes.iter().position(|byte| *byte == 0)?);
        Some(OsStr::from_bytes(&bytes).into())
    }

    fn word(&self, address: u64) -> Option<u64> {
        Some(u64::from_ne_bytes(self.memory(address, 8)?.try_into().ok()?))
    }

    /// At most this many bytes, fewer at the end of the mapping.
    fn memory(&self, address: u64, most: usize) -> Option<Vec<u8>> {
        let memory = fs::File::open(format!("/proc/{}/mem", self.0.pid)).ok()?;
        let mut bytes = vec![0; most];
        let read = memory.read_at(&mut bytes, address).ok()?;
        bytes.truncate(read);
        Some(bytes)
    }
}

fn thread_group(thread: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok())
}

/// Lets a call proceed, or fail.
fn respond(listener: &OwnedFd, id: u64, error: Option<i32>) -> Result<()> {
    let flags = if error.is_none() { libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32 } else { 0 };
    let response = seccomp_notif_resp { id, val: 0, error: -error.unwrap_or(0), flags };
    // SAFETY: the kernel reads the structure that this request is for.
    match unsafe { libc::ioctl(listener.as_raw_fd(), NOTIF_SEND, &response) } {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            // The calling thread has ended.
            error if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            error => Err(error).context("SECCOMP_IOCTL_NOTIF_SEND"),
        },
    }
}

const NOTIF_RECV: libc::c_ulong = nix::request_code_readwrite!(b'!', 0, size_of::<seccomp_notif>()) as _;
const NOTIF_SEND: libc::c_ulong = nix::request_code_readwrite!(b'!', 1, size_of::<seccomp_notif_resp>()) as _;

/// Intercepts [`CALLS`], and allows all others.
fn filter(program: Program) -> Vec<sock_filter> {
    let more: &[c_long] = if program == Program::Plugin { &PLUGIN_CALLS } else { &[] };
    let calls: Vec<c_long> = CALLS.iter().chain(more).copied().collect();
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const IS: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, k, jt| sock_filter { code, jt, jf: 0, k };
    let mut filter = vec![step(LOAD, offset_of!(libc::seccomp_data, nr) as u32, 0)];
    for (i, call) in calls.iter().enumerate() {
        // Jumps to the last instruction, over the other comparisons and the one that allows.
        filter.push(step(IS, *call as u32, (calls.len() - i) as u8));
    }
    filter.push(step(RETURN, libc::SECCOMP_RET_ALLOW, 0));
    filter.push(step(RETURN, libc::SECCOMP_RET_USER_NOTIF, 0));
    filter
}

/// Memory that the child shares until it executes its program. The child passes its listener there, because it can't make any of
/// [`CALLS`] by then.
#[derive(Clone, Copy)]
struct Page(&'static Shown);

struct Shown {
    process: AtomicI32,
    listener: AtomicI32,
    taken: AtomicI32,
}

impl Page {
    fn new() -> Result<Self> {
        let length = std::num::NonZeroUsize::MIN.saturating_add(size_of::<Shown>());
        let protection = nix::sys::mman::ProtFlags::PROT_READ | nix::sys::mman::ProtFlags::PROT_WRITE;
        // SAFETY: the kernel chooses the place.
        let page = unsafe {
            nix::sys::mman::mmap_anonymous(None, length, protection, nix::sys::mman::MapFlags::MAP_SHARED)
        }?;
        // SAFETY: zeroed memory of a page, which is never unmapped and only used by atomic operations.
        Ok(Self(unsafe { page.cast::<Shown>().as_ref() }))
    }

    /// Called in the child.
    fn install(self, filter: &[sock_filter]) -> io::Result<()> {
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
        let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER
            // A signal does not restart the call.
            | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
        // SAFETY: the program lives through the call, which copies it.
        let listener =
            unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &program) };
        if listener < 0 {
            return Err(io::Error::last_os_error());
        }
        self.0.listener.store(listener as i32, Ordering::Relaxed);
        self.0.process.store(nix::unistd::getpid().as_raw(), Ordering::Release);
        while self.0.taken.load(Ordering::Acquire) == 0 {
            thread::yield_now();
        }
        Ok(())
    }

    /// Called in the parent: waits for the child.
    fn listener(self) -> Result<OwnedFd> {
        wait::until_true("program with faults", 6 * wait::SOON, || {
            Ok(self.0.process.load(Ordering::Acquire) != 0)
        })?;
        let listener =
            descriptor_of(self.0.process.load(Ordering::Relaxed), self.0.listener.load(Ordering::Relaxed));
        let listener = listener.context("listener of the seccomp filter")?;
        self.0.taken.store(1, Ordering::Release);
        Ok(listener)
    }
}

fn bpf(command: u64) -> String {
    let name = match command {
        0 => "MAP_CREATE",
        1 => "MAP_LOOKUP_ELEM",
        2 => "MAP_UPDATE_ELEM",
        3 => "MAP_DELETE_ELEM",
        4 => "MAP_GET_NEXT_KEY",
        5 => "PROG_LOAD",
        6 => "OBJ_PIN",
        7 => "OBJ_GET",
        10 => "PROG_TEST_RUN",
        11 => "PROG_GET_NEXT_ID",
        12 => "MAP_GET_NEXT_ID",
        13 => "PROG_GET_FD_BY_ID",
        14 => "MAP_GET_FD_BY_ID",
        15 => "OBJ_GET_INFO_BY_FD",
        16 => "PROG_QUERY",
        18 => "BTF_LOAD",
        22 => "MAP_FREEZE",
        26 => "MAP_UPDATE_BATCH",
        28 => "LINK_CREATE",
        29 => "LINK_UPDATE",
        30 => "LINK_GET_FD_BY_ID",
        31 => "LINK_GET_NEXT_ID",
        34 => "LINK_DETACH",
        _ => return format!("command {command}"),
    };
    name.into()
}

fn netlink(kind: u16) -> String {
    let name = match kind {
        2 => "NOTHING",
        16 => "NEWLINK",
        17 => "DELLINK",
        18 => "GETLINK",
        19 => "SETLINK",
        20 => "NEWADDR",
        22 => "GETADDR",
        24 => "NEWROUTE",
        25 => "DELROUTE",
        26 => "GETROUTE",
        32 => "NEWRULE",
        33 => "DELRULE",
        34 => "GETRULE",
        36 => "NEWQDISC",
        37 => "DELQDISC",
        38 => "GETQDISC",
        44 => "NEWTFILTER",
        45 => "DELTFILTER",
        46 => "GETTFILTER",
        88 => "NEWNSID",
        90 => "GETNSID",
        _ => return format!("message {kind}"),
    };
    name.into()
}
