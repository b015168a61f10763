//! Programs of a few instructions: whether the kernel accepts them shows what it supports.

use std::os::fd::{AsRawFd as _, OwnedFd};

use aya_obj::generated::{
    BPF_ADD, BPF_ALU64, BPF_CALL, BPF_DW, BPF_EXIT, BPF_IMM, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_LDX,
    BPF_MEM, BPF_MOV, BPF_PSEUDO_MAP_FD, BPF_ST, BPF_W, BPF_X, bpf_attach_type, bpf_cmd, bpf_func_id,
    bpf_insn, bpf_map_type, bpf_prog_type,
};
use nix::errno::Errno;

use crate::bpf;

/// The hook of a program.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hook {
    pub(super) program: bpf_prog_type,
    pub(super) attach: Option<bpf_attach_type>,
}

/// The kernel may return EAGAIN while signals are pending.
const ATTEMPTS: usize = 5;

/// The verifier's messages about a helper that is unknown, or not allowed at this hook.
const REFUSED: [&str; 3] = ["invalid func ", "unknown func ", "program of this type cannot use helper "];

/// Loads a program that does nothing.
pub(super) fn load(hook: Hook) -> Result<OwnedFd, Errno> {
    load_with_log(hook, &[set_result_to_one(), exit()], &mut [])
}

/// Whether programs of this hook may call a helper.
pub(super) fn has_helper(hook: Hook, helper: bpf_func_id) -> Result<bool, Errno> {
    let mut log = [0; 4096];
    let Err(error) = load_with_log(hook, &[call(helper), exit()], &mut log) else { return Ok(true) };
    let said = String::from_utf8_lossy(&log);
    let said = said.trim_end_matches('\0');
    // The verifier checks the helper before its arguments, which are missing.
    if said.is_empty() { Err(error) } else { Ok(!REFUSED.iter().any(|refused| said.contains(refused))) }
}

/// Whether TC programs may store sockets in maps.
pub fn tc_may_keep_sockets() -> Result<bool, Errno> {
    const REFUSED: &str = "cannot update sockmap in this context";
    const KEY: i16 = -4;
    /// Offset of `sk` in `struct __sk_buff`.
    const OWN_SOCKET: i16 = 168;
    let [result, context, key, socket, flags, frame] = [0, 1, 2, 3, 4, 10];
    let map = socket_hash()?;
    let program = [
        insn(BPF_LDX | BPF_MEM | BPF_DW, [socket, context], OWN_SOCKET, 0),
        insn(BPF_JMP | BPF_JEQ | BPF_K, [socket, 0], 7, 0),
        insn(BPF_ST | BPF_MEM | BPF_W, [frame, 0], KEY, 0),
        insn(BPF_ALU64 | BPF_MOV | BPF_X, [key, frame], 0, 0),
        insn(BPF_ALU64 | BPF_ADD | BPF_K, [key, 0], 0, KEY.into()),
        insn(BPF_LD | BPF_IMM | BPF_DW, [1, BPF_PSEUDO_MAP_FD as u8], 0, map.as_raw_fd()),
        insn(0, [0, 0], 0, 0),
        insn(BPF_ALU64 | BPF_MOV | BPF_K, [flags, 0], 0, 0),
        call(bpf_func_id::BPF_FUNC_map_update_elem),
        insn(BPF_ALU64 | BPF_MOV | BPF_K, [result, 0], 0, 0),
        exit(),
    ];
    let mut log = [0; 4096];
    let hook = Hook { program: bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS, attach: None };
    let Err(error) = load_with_log(hook, &program, &mut log) else { return Ok(true) };
    if String::from_utf8_lossy(&log).contains(REFUSED) { Ok(false) } else { Err(error) }
}

fn socket_hash() -> Result<OwnedFd, Errno> {
    let mut attributes = bpf::attributes();
    // SAFETY: the union was zeroed, which is valid for every member.
    let map = unsafe { &mut attributes.__bindgen_anon_1 };
    map.map_type = bpf_map_type::BPF_MAP_TYPE_SOCKHASH as u32;
    map.key_size = 4;
    map.value_size = 4;
    map.max_entries = 1;
    bpf::open(bpf_cmd::BPF_MAP_CREATE, &mut attributes)
}

fn load_with_log(hook: Hook, instructions: &[bpf_insn], log: &mut [u8]) -> Result<OwnedFd, Errno> {
    let mut attributes = bpf::attributes();
    // SAFETY: the union was zeroed, which is valid for every member.
    let program = unsafe { &mut attributes.__bindgen_anon_3 };
    program.prog_type = hook.program as u32;
    program.expected_attach_type = hook.attach.map_or(0, |attach| attach as u32);
    program.insns = instructions.as_ptr() as u64;
    program.insn_cnt = instructions.len() as u32;
    program.license = c"GPL".as_ptr() as u64;
    if !log.is_empty() {
        program.log_level = 1;
        program.log_buf = log.as_mut_ptr() as u64;
        program.log_size = log.len() as u32;
    }
    for _ in 1..ATTEMPTS {
        match bpf::open(bpf_cmd::BPF_PROG_LOAD, &mut attributes) {
            Err(Errno::EAGAIN) => {}
            result => return result,
        }
    }
    bpf::open(bpf_cmd::BPF_PROG_LOAD, &mut attributes)
}

/// An instruction with its destination and source registers.
fn insn(code: u32, [destination, source]: [u8; 2], offset: i16, immediate: i32) -> bpf_insn {
    bpf_insn {
        code: code as u8,
        _bitfield_align_1: [],
        _bitfield_1: bpf_insn::new_bitfield_1(destination, source),
        off: offset,
        imm: immediate,
    }
}

fn set_result_to_one() -> bpf_insn {
    insn(BPF_ALU64 | BPF_MOV | BPF_K, [0, 0], 0, 1)
}

fn call(helper: bpf_func_id) -> bpf_insn {
    insn(BPF_JMP | BPF_CALL, [0, 0], 0, helper as i32)
}

fn exit() -> bpf_insn {
    insn(BPF_JMP | BPF_EXIT, [0, 0], 0, 0)
}
