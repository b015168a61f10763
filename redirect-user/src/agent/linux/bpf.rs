//! The bpf(2) calls for links that outlive the agent: made, pinned, found again, given another program. aya has none of
//! them for links of cgroups and of network namespaces.

use std::ffi::CString;
use std::io;
use std::mem::{size_of, size_of_val};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

const OBJ_PIN: libc::c_long = 6;
const OBJ_GET: libc::c_long = 7;
const PROG_GET_FD_BY_ID: libc::c_long = 13;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const PROG_QUERY: libc::c_long = 16;
const LINK_CREATE: libc::c_long = 28;
const LINK_UPDATE: libc::c_long = 29;
const LINK_DETACH: libc::c_long = 34;

/// A loaded program.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) fd: OwnedFd,
    pub(super) id: u32,
}

/// An attachment of a program, which ends with the last descriptor and pin of it.
#[derive(Debug)]
pub(super) struct Link(OwnedFd);

/// What a program can be attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hook {
    Cgroup(Cgroup),
    /// The socket lookup of a network namespace.
    Lookup,
    TcxIngress,
    TcxEgress,
}

/// The hooks of a cgroup, as the kernel numbers them (`enum bpf_attach_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Cgroup {
    SockOps = 3,
    Bind4 = 8,
    Bind6 = 9,
    Connect4 = 10,
    Connect6 = 11,
    Sendmsg4 = 14,
    Sendmsg6 = 15,
    Recvmsg4 = 19,
    Recvmsg6 = 20,
    Getpeername4 = 29,
    Getpeername6 = 30,
}

impl Hook {
    const fn attach_type(self) -> u32 {
        match self {
            Self::Cgroup(hook) => hook as u32,
            Self::Lookup => 36,
            Self::TcxIngress => 46,
            Self::TcxEgress => 47,
        }
    }

    /// `enum bpf_link_type`.
    const fn link_type(self) -> u32 {
        match self {
            Self::Cgroup(_) => 3,
            Self::Lookup => 5,
            Self::TcxIngress | Self::TcxEgress => 11,
        }
    }
}

/// Where a link is, or shall be: `at` is a descriptor of the cgroup or of the namespace, or the interface's index; `id` is
/// what the kernel calls the same thing: the inode of the cgroup's directory or of the namespace, or the index.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'a> {
    pub(super) hook: Hook,
    pub(super) at: At<'a>,
    pub(super) id: u64,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum At<'a> {
    Descriptor(BorrowedFd<'a>),
    Interface(u32),
}

impl At<'_> {
    fn number(self) -> u32 {
        match self {
            Self::Descriptor(descriptor) => descriptor.as_raw_fd().cast_unsigned(),
            Self::Interface(index) => index,
        }
    }
}

/// What the kernel tells about a link: the start of `struct bpf_link_info`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Info {
    kind: u32,
    id: u32,
    program: u32,
    padding: u32,
    target: [u32; 4],
}

/// How a link compares with what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// It attaches the program to the place.
    Current,
    /// It attaches another program to the place: that of another build.
    Stale,
    /// It is elsewhere, or what it was attached to is gone.
    Elsewhere,
}

impl Link {
    pub(super) fn create(program: &Program, place: Place<'_>) -> io::Result<Self> {
        let target = place.at.number();
        let create = |flags| {
            let program = program.fd.as_raw_fd().cast_unsigned();
            call(LINK_CREATE, &[program, target, place.hook.attach_type(), flags, 0, 0, 0, 0])
        };
        /// Before all others that are attached to the same place.
        const BEFORE: u32 = 1 << 3;
        let created = match place.hook {
            Hook::Lookup => create(0),
            Hook::TcxIngress | Hook::TcxEgress => create(BEFORE),
            // Linux before 6.17 knows no order but that of attachment.
            Hook::Cgroup(_) => create(BEFORE).or_else(|error| match error.raw_os_error() {
                Some(libc::EINVAL) => create(0),
                _ => Err(error),
            }),
        };
        descriptor(created?).map(Self)
    }

    /// Opens a pinned link.
    pub(super) fn open(pin: &Path) -> io::Result<Self> {
        let path = CString::new(pin.as_os_str().as_bytes())?;
        descriptor(call(OBJ_GET, &pin_attributes(&path, 0))?).map(Self)
    }

    pub(super) fn pin(&self, pin: &Path) -> io::Result<()> {
        let path = CString::new(pin.as_os_str().as_bytes())?;
        call(OBJ_PIN, &pin_attributes(&path, self.0.as_raw_fd().cast_unsigned())).map(drop)
    }

    /// Puts another program in the place of the link's, in one step.
    pub(super) fn update(&self, program: &Program) -> io::Result<()> {
        let (link, program) = (self.0.as_raw_fd().cast_unsigned(), program.fd.as_raw_fd().cast_unsigned());
        call(LINK_UPDATE, &[link, program, 0, 0]).map(drop)
    }

    /// Detaches the program now. When the last descriptor and pin are gone the kernel does so as well, but some time later.
    pub(super) fn detach(&self) -> io::Result<()> {
        call(LINK_DETACH, &[self.0.as_raw_fd().cast_unsigned()]).map(drop)
    }

    pub(super) fn state(&self, program: &Program, place: Place<'_>) -> io::Result<State> {
        let info = self.info()?;
        let (target, attach_type) = match place.hook {
            Hook::Cgroup(_) => (u64::from(info.target[0]) | u64::from(info.target[1]) << 32, info.target[2]),
            Hook::Lookup | Hook::TcxIngress | Hook::TcxEgress => (info.target[0].into(), info.target[1]),
        };
        let here = info.kind == place.hook.link_type()
            && attach_type == place.hook.attach_type()
            && target == place.id;
        Ok(match here {
            true if info.program == program.id => State::Current,
            true => State::Stale,
            false => State::Elsewhere,
        })
    }

    /// Whether what the link was attached to still exists.
    pub(super) fn is_attached(&self) -> io::Result<bool> {
        let info = self.info()?;
        // A cgroup's number has 64 bits.
        let [low, high, ..] = info.target;
        Ok(low != 0 || info.kind == Hook::Cgroup(Cgroup::SockOps).link_type() && high != 0)
    }

    fn info(&self) -> io::Result<Info> {
        info(self.0.as_fd())
    }
}

/// The IDs of the programs at a hook, in the order in which they run.
pub(super) fn programs(at: At<'_>, hook: Hook) -> io::Result<Vec<u32>> {
    /// The kernel allows no more.
    const MOST: usize = 64;
    const COUNT: usize = 6;
    let mut ids = [0u32; MOST];
    let [low, high] = words((&raw mut ids).expose_provenance() as u64);
    let mut attributes = [at.number(), hook.attach_type(), 0, 0, low, high, MOST as u32, 0];
    match query(&mut attributes) {
        Ok(()) => Ok(ids.into_iter().take(attributes[COUNT] as usize).collect()),
        // A kernel without tcx.
        Err(error) if matches!(at, At::Interface(_)) && error.raw_os_error() == Some(libc::EINVAL) => {
            Ok(Vec::new())
        }
        Err(error) => Err(error),
    }
}

/// The name of a program in the kernel; `None` if the program is gone.
pub(super) fn program_name(id: u32) -> io::Result<Option<String>> {
    /// The start of `struct bpf_prog_info`.
    #[derive(Default)]
    #[repr(C)]
    struct ProgramInfo {
        before: [u64; 8],
        name: [u8; 16],
    }
    let program = match call(PROG_GET_FD_BY_ID, &[id]) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        result => descriptor(result?)?,
    };
    let ProgramInfo { name, .. } = info(program.as_fd())?;
    let length = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    Ok(name.get(..length).map(|name| String::from_utf8_lossy(name).into_owned()))
}

/// What a map is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// `enum bpf_map_type`.
    pub(super) kind: u32,
    pub(super) key_size: u32,
    pub(super) value_size: u32,
    pub(super) max_entries: u32,
    pub(super) flags: u32,
}

impl Layout {
    /// That of a pinned map.
    pub(super) fn of_pin(pin: &Path) -> io::Result<Self> {
        /// The start of `struct bpf_map_info`.
        #[derive(Default)]
        #[repr(C)]
        struct MapInfo {
            kind: u32,
            id: u32,
            key_size: u32,
            value_size: u32,
            max_entries: u32,
            flags: u32,
        }
        let path = CString::new(pin.as_os_str().as_bytes())?;
        let map = descriptor(call(OBJ_GET, &pin_attributes(&path, 0))?)?;
        let MapInfo { kind, key_size, value_size, max_entries, flags, .. } = info(map.as_fd())?;
        Ok(Self { kind, key_size, value_size, max_entries, flags })
    }
}

/// Reads the start of what the kernel tells about an object. `T` has to be a C structure of integers.
fn info<T: Default>(object: BorrowedFd<'_>) -> io::Result<T> {
    let mut info = T::default();
    let [low, high] = words((&raw mut info).expose_provenance() as u64);
    let length = size_of::<T>() as u32;
    call(OBJ_GET_INFO_BY_FD, &[object.as_raw_fd().cast_unsigned(), length, low, high])?;
    Ok(info)
}

impl AsFd for Program {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn pin_attributes(path: &CString, object: u32) -> [u32; 4] {
    let address = words(path.as_ptr().expose_provenance() as u64);
    [address[0], address[1], object, 0]
}

/// A 64-bit field as two of 32 bits, in the order of the machine.
fn words(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_ne_bytes();
    [u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h])]
}

/// A question whose answer the kernel writes into the fields.
fn query(fields: &mut [u32; 8]) -> io::Result<()> {
    let (attributes, result) = ask(PROG_QUERY, fields);
    for (field, answer) in fields.iter_mut().zip(attributes.0) {
        *field = answer;
    }
    result.map(drop)
}

fn call(command: libc::c_long, fields: &[u32]) -> io::Result<libc::c_long> {
    ask(command, fields).1
}

#[repr(C, align(8))]
struct Attributes([u32; 16]);

/// The fields are those that the command's part of `union bpf_attr` begins with; the kernel takes the others as zero.
fn ask(command: libc::c_long, fields: &[u32]) -> (Attributes, io::Result<libc::c_long>) {
    let mut attributes = Attributes([0; 16]);
    for (place, field) in attributes.0.iter_mut().zip(fields) {
        *place = *field;
    }
    let length = size_of_val(fields);
    // SAFETY: the attributes, and what they point to, live for the length of the call, and the length is theirs.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut attributes, length) };
    (attributes, if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) })
}

fn descriptor(result: libc::c_long) -> io::Result<OwnedFd> {
    let descriptor = i32::try_from(result).map_err(io::Error::other)?;
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
