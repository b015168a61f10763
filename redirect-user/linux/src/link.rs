//! BPF links that outlive the agent: creates, pins, finds and updates them. aya can't do that for links of cgroups and
//! network namespaces.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

pub use aya_obj::generated::bpf_attach_type as AttachType;
use aya_obj::generated::{BPF_F_BEFORE, bpf_cmd, bpf_insn, bpf_link_info, bpf_link_type, bpf_prog_info};
use nix::errno::Errno;

use crate::bpf;

/// A loaded program.
#[derive(Debug)]
pub struct Program {
    /// Its descriptor.
    pub fd: OwnedFd,
    /// Its ID in the kernel.
    pub id: u32,
}

/// A program's attachment, which ends with its last descriptor and pin.
#[derive(Debug)]
pub struct Link(OwnedFd);

/// The target of a link. `at` is a descriptor of the cgroup or namespace, or the interface's index; `id` is the kernel's
/// name of the same: the inode of the cgroup's directory or of the namespace, or the index.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The hook.
    pub attach_type: AttachType,
    /// The target, as bpf(2) takes it.
    pub at: At<'a>,
    /// The target, as the kernel reports it.
    pub id: u64,
}

/// The target of a link, as bpf(2) takes it.
#[derive(Clone, Copy, Debug)]
pub enum At<'a> {
    /// A descriptor of the cgroup or of the namespace.
    Descriptor(BorrowedFd<'a>),
    /// The index of an interface of the calling thread's namespace.
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

/// How a link compares with the wanted one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It attaches the program to the place.
    Current,
    /// It attaches another program to the place, such as one of another build.
    Stale,
    /// It is attached elsewhere, or its target is gone.
    Elsewhere,
}

impl Link {
    /// Attaches a program.
    pub fn create(program: &Program, place: Place<'_>) -> io::Result<Self> {
        let create =
            |flags| bpf::link_create(program.fd.as_fd(), place.at.number(), place.attach_type, flags);
        // Before all other programs at the same place.
        let created = match link_type(place.attach_type) {
            bpf_link_type::BPF_LINK_TYPE_NETNS => create(0),
            bpf_link_type::BPF_LINK_TYPE_TCX => create(BPF_F_BEFORE),
            // Before Linux 6.17 the order is that of attachment.
            _ => match create(BPF_F_BEFORE) {
                Err(Errno::EINVAL) => create(0),
                created => created,
            },
        };
        Ok(Self(created?))
    }

    /// Opens a pinned link.
    pub fn open(pin: &Path) -> io::Result<Self> {
        bpf::obj_get(pin).map(Self)
    }

    /// Pins the link.
    pub fn pin(&self, pin: &Path) -> io::Result<()> {
        bpf::obj_pin(self.0.as_fd(), pin)
    }

    /// Replaces the link's program atomically.
    pub fn update(&self, program: &Program) -> io::Result<()> {
        Ok(bpf::link_update(self.0.as_raw_fd(), program.fd.as_raw_fd())?)
    }

    /// Detaches the program now. The kernel would also do so some time after the last descriptor and pin are gone.
    pub fn detach(&self) -> io::Result<()> {
        let mut attributes = bpf::attributes();
        attributes.link_detach.link_fd = self.0.as_raw_fd().cast_unsigned();
        bpf::call(bpf_cmd::BPF_LINK_DETACH, &mut attributes)?;
        Ok(())
    }

    /// Compares the link with the wanted one.
    pub fn state(&self, program: &Program, place: Place<'_>) -> io::Result<State> {
        let info: bpf_link_info = bpf::info(self.0.as_fd())?;
        let here = info.type_ == link_type(place.attach_type) as u32
            && target(&info) == (place.id, place.attach_type as u32);
        Ok(match here {
            true if info.prog_id == program.id => State::Current,
            true => State::Stale,
            false => State::Elsewhere,
        })
    }

    /// Whether the link's target still exists.
    pub fn is_attached(&self) -> io::Result<bool> {
        let (id, _) = target(&bpf::info(self.0.as_fd())?);
        Ok(id != 0)
    }
}

/// A link's target, zero if it is gone, and its attach type.
fn target(info: &bpf_link_info) -> (u64, u32) {
    let (tcx, netns) = (bpf_link_type::BPF_LINK_TYPE_TCX as u32, bpf_link_type::BPF_LINK_TYPE_NETNS as u32);
    // SAFETY: integers, which are zero unless the kernel set them.
    unsafe {
        let target = &info.__bindgen_anon_1;
        match info.type_ {
            kind if kind == tcx => (target.tcx.ifindex.into(), target.tcx.attach_type),
            kind if kind == netns => (target.netns.netns_ino.into(), target.netns.attach_type),
            _ => (target.cgroup.cgroup_id, target.cgroup.attach_type),
        }
    }
}

/// The link type for an attach type.
fn link_type(attach_type: AttachType) -> bpf_link_type {
    match attach_type {
        AttachType::BPF_SK_LOOKUP => bpf_link_type::BPF_LINK_TYPE_NETNS,
        AttachType::BPF_TCX_INGRESS | AttachType::BPF_TCX_EGRESS => bpf_link_type::BPF_LINK_TYPE_TCX,
        _ => bpf_link_type::BPF_LINK_TYPE_CGROUP,
    }
}

/// The IDs of the attached programs, in execution order.
pub fn programs(at: At<'_>, attach_type: AttachType) -> io::Result<Vec<u32>> {
    /// The kernel's limit.
    const MOST: usize = 64;
    let mut ids = [0u32; MOST];
    let mut attributes = bpf::attributes();
    attributes.query.__bindgen_anon_1.target_fd = at.number();
    attributes.query.attach_type = attach_type as u32;
    attributes.query.prog_ids = (&raw mut ids).expose_provenance() as u64;
    attributes.query.__bindgen_anon_2.prog_cnt = MOST as u32;
    match bpf::call(bpf_cmd::BPF_PROG_QUERY, &mut attributes) {
        Ok(_) => {
            // SAFETY: the kernel has written this member.
            let answer = unsafe { attributes.query };
            // SAFETY: both members are integers.
            let count = unsafe { answer.__bindgen_anon_2.prog_cnt };
            Ok(ids.into_iter().take(count as usize).collect())
        }
        // A kernel without tcx.
        Err(Errno::EINVAL) if matches!(at, At::Interface(_)) => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}

/// The name of a program in the kernel; `None` if the program is gone.
pub fn program_name(id: u32) -> io::Result<Option<String>> {
    let Some(program) = program(id)? else { return Ok(None) };
    let info: bpf_prog_info = bpf::info(program.as_fd())?;
    let name = info.name.map(|byte| byte.to_ne_bytes()[0]);
    let name = CStr::from_bytes_until_nul(&name).unwrap_or_default();
    Ok(Some(name.to_string_lossy().into_owned()))
}

/// The instructions of a program, as translated by the kernel; none if the program is gone.
pub fn program_instructions(id: u32) -> io::Result<Vec<bpf_insn>> {
    let Some(program) = program(id)? else { return Ok(Vec::new()) };
    Ok(bpf::instructions(program.as_fd())?)
}

fn program(id: u32) -> io::Result<Option<OwnedFd>> {
    let mut attributes = bpf::attributes();
    // SAFETY: the union was zeroed, which is valid for every member.
    unsafe { &mut attributes.__bindgen_anon_6 }.__bindgen_anon_1.prog_id = id;
    match bpf::open(bpf_cmd::BPF_PROG_GET_FD_BY_ID, &mut attributes) {
        Err(Errno::ENOENT) => Ok(None),
        result => Ok(Some(result?)),
    }
}

impl AsFd for Program {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
