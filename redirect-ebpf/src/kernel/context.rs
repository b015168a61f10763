//! Reads the fields of a context. The verifier accepts only word-sized reads at known offsets, hence the volatile reads, which
//! the compiler neither merges nor splits.

use redirect_ebpf::family::{Ip as _, Ipv4};

const AF_INET: u32 = 2;

/// The offsets of one end of a connection in a context, by family.
#[derive(Clone, Copy)]
pub(super) struct End {
    pub(super) ipv4: usize,
    pub(super) ipv6: usize,
}

/// The word at the offset of a field.
#[inline(always)]
pub(super) fn word<C>(context: *const C, offset: usize) -> u32 {
    // SAFETY: the offset is that of a word of the context.
    let field = unsafe { context.byte_add(offset) };
    // SAFETY: as above.
    unsafe { field.cast::<u32>().read_volatile() }
}

#[inline(always)]
fn words<C>(context: *const C, offset: usize) -> [u8; 16] {
    let mut address = [0; 16];
    for (place, bytes) in address.chunks_exact_mut(4).enumerate() {
        bytes.copy_from_slice(&word(context, offset + 4 * place).to_ne_bytes());
    }
    address
}

/// The addresses of two ends, IPv4 in its v4-mapped form. `family` is the offset of the context's family.
///
/// Reads without a branch: the compiler would merge the branches' reads into one at a variable offset, which the verifier
/// rejects. The fields of the other family read as zero.
#[inline(always)]
pub(super) fn addresses<C>(context: *const C, family: usize, ends: [End; 2]) -> [[u8; 16]; 2] {
    let ipv4 = ends.map(|end| Ipv4::widen(word(context, end.ipv4).to_ne_bytes()));
    let ipv6 = ends.map(|end| words(context, end.ipv6));
    if word(context, family) == AF_INET { ipv4 } else { ipv6 }
}
