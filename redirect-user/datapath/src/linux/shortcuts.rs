//! Detects `bpf_redirect_peer`: a TC program that uses it hands packets directly to the pod's end of a device, past the host end.

use std::fs::File;
use std::io::{self, BufReader};

use aya_obj::generated::bpf_insn;
use redirect_linux::link;

const HELPER: &str = "bpf_redirect_peer";

/// The kernel's base of helper addresses.
const BASE: &str = "__bpf_call_base";

/// The immediate value of a call of the helper in a loaded program.
pub(super) struct Shortcut(i32);

impl Shortcut {
    pub(super) fn known() -> io::Result<Self> {
        call(BufReader::new(File::open("/proc/kallsyms")?)).map(Self)
    }

    /// Whether the program calls it; `false` if the program is gone.
    pub(super) fn is_taken_by(&self, program: u32) -> io::Result<bool> {
        /// `BPF_JMP | BPF_CALL`.
        const CALL: u8 = 0x85;
        let is_call = |instruction: &bpf_insn| {
            instruction.code == CALL && instruction.src_reg() == 0 && instruction.imm == self.0
        };
        Ok(link::program_instructions(program)?.iter().any(is_call))
    }
}

/// Computes that value from the kernel's symbol table.
fn call(symbols: impl io::BufRead) -> io::Result<i32> {
    let (mut base, mut helper) = (None, None);
    for line in symbols.lines() {
        let line = line?;
        let mut words = line.split_ascii_whitespace();
        let (Some(address), Some(_), Some(name)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        match name {
            BASE => base = u64::from_str_radix(address, 16).ok(),
            HELPER => helper = u64::from_str_radix(address, 16).ok(),
            _ => {}
        }
    }
    match (base, helper) {
        (Some(base), Some(helper)) if base != 0 && helper != 0 => Ok(helper.wrapping_sub(base) as i32),
        _ => Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "/proc/kallsyms hides the kernel's addresses",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_relative_to_the_base() {
        let symbols = "ffffffff81200010 T __bpf_call_base\nffffffff81200310 t bpf_redirect_peer\n\
                       ffffffff81200400 t bpf_redirect_peer_proto\tmodule\n";
        assert_eq!(call(symbols.as_bytes()).unwrap(), 0x300);
        let hidden = "0000000000000000 T __bpf_call_base\n0000000000000000 t bpf_redirect_peer\n";
        for symbols in [hidden, ""] {
            assert_eq!(call(symbols.as_bytes()).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        }
    }
}
