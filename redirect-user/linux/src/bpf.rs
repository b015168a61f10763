//! bpf(2) calls that aya lacks: links that outlive the agent, and probes.

use std::ffi::{CStr, CString};
use std::io;
use std::mem;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use aya_obj::generated::{
    bpf_attach_type, bpf_attr, bpf_cmd, bpf_insn, bpf_link_info, bpf_map_info, bpf_prog_info,
};
use nix::errno::Errno;

/// The kernel's description of an object.
///
/// # Safety
///
/// All zeros is a valid value of the type, and so is any value that the kernel writes.
pub unsafe trait Info: Copy {}

// SAFETY: they consist of integers, in structures and unions.
unsafe impl Info for bpf_link_info {}
// SAFETY: as above.
unsafe impl Info for bpf_map_info {}
// SAFETY: as above.
unsafe impl Info for bpf_prog_info {}

/// All zeros, which the kernel reads as "not set".
pub fn attributes() -> bpf_attr {
    // SAFETY: the attributes consist of integers, for which zero is valid.
    unsafe { mem::zeroed() }
}

/// A bpf(2) call. Returns a descriptor, for commands that create one. Whatever the attributes point to must outlive the
/// call.
pub fn call(command: bpf_cmd, attributes: &mut bpf_attr) -> Result<RawFd, Errno> {
    // SAFETY: the size is that of the attributes, and the caller guarantees what they point to. Older kernels that know fewer
    // attributes accept them if the rest is zero.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command as libc::c_int, &raw mut *attributes, size_of::<bpf_attr>())
    };
    Errno::result(result).map(|descriptor| descriptor as RawFd)
}

/// A call that creates or opens an object.
pub fn open(command: bpf_cmd, attributes: &mut bpf_attr) -> Result<OwnedFd, Errno> {
    let descriptor = call(command, attributes)?;
    // SAFETY: the kernel has just created the descriptor, and we alone own it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// `BPF_LINK_CREATE`. The target is a descriptor, or the index of an interface.
pub fn link_create(
    program: BorrowedFd<'_>,
    target: u32,
    attach_type: bpf_attach_type,
    flags: u32,
) -> Result<OwnedFd, Errno> {
    let mut attributes = attributes();
    attributes.link_create.__bindgen_anon_1.prog_fd = program.as_raw_fd().cast_unsigned();
    attributes.link_create.__bindgen_anon_2.target_fd = target;
    attributes.link_create.attach_type = attach_type as u32;
    attributes.link_create.flags = flags;
    open(bpf_cmd::BPF_LINK_CREATE, &mut attributes)
}

/// `BPF_LINK_UPDATE`.
pub fn link_update(link: RawFd, program: RawFd) -> Result<(), Errno> {
    let mut attributes = attributes();
    attributes.link_update.link_fd = link.cast_unsigned();
    attributes.link_update.__bindgen_anon_1.new_prog_fd = program.cast_unsigned();
    call(bpf_cmd::BPF_LINK_UPDATE, &mut attributes).map(drop)
}

/// `BPF_OBJ_GET_INFO_BY_FD`.
pub fn info<T: Info>(object: BorrowedFd<'_>) -> Result<T, Errno> {
    // SAFETY: all zeros is a valid value.
    let mut info: T = unsafe { mem::zeroed() };
    let mut attributes = attributes();
    attributes.info.bpf_fd = object.as_raw_fd().cast_unsigned();
    attributes.info.info_len = size_of::<T>() as u32;
    attributes.info.info = (&raw mut info).expose_provenance() as u64;
    call(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attributes)?;
    Ok(info)
}

/// The instructions of a program, as translated by the kernel.
pub fn instructions(program: BorrowedFd<'_>) -> Result<Vec<bpf_insn>, Errno> {
    let length = info::<bpf_prog_info>(program)?.xlated_prog_len as usize;
    let nothing = bpf_insn {
        code: 0,
        _bitfield_align_1: [],
        _bitfield_1: bpf_insn::new_bitfield_1(0, 0),
        off: 0,
        imm: 0,
    };
    let mut instructions = vec![nothing; length / size_of::<bpf_insn>()];
    // SAFETY: all zeros is a valid value.
    let mut info: bpf_prog_info = unsafe { mem::zeroed() };
    info.xlated_prog_len = length as u32;
    info.xlated_prog_insns = instructions.as_mut_ptr().expose_provenance() as u64;
    let mut attributes = attributes();
    attributes.info.bpf_fd = program.as_raw_fd().cast_unsigned();
    attributes.info.info_len = size_of::<bpf_prog_info>() as u32;
    attributes.info.info = (&raw mut info).expose_provenance() as u64;
    call(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attributes)?;
    Ok(instructions)
}

/// `BPF_OBJ_PIN`.
pub fn obj_pin(object: BorrowedFd<'_>, pin: &Path) -> io::Result<()> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let mut attributes = of_pin(&path);
    // SAFETY: every byte of the union was zeroed or written as this member.
    unsafe { &mut attributes.__bindgen_anon_4 }.bpf_fd = object.as_raw_fd().cast_unsigned();
    call(bpf_cmd::BPF_OBJ_PIN, &mut attributes)?;
    Ok(())
}

/// `BPF_OBJ_GET`.
pub fn obj_get(pin: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    Ok(open(bpf_cmd::BPF_OBJ_GET, &mut of_pin(&path))?)
}

fn of_pin(path: &CStr) -> bpf_attr {
    let mut attributes = attributes();
    // SAFETY: the union was zeroed, which is valid for every member.
    unsafe { &mut attributes.__bindgen_anon_4 }.pathname = path.as_ptr().expose_provenance() as u64;
    attributes
}
