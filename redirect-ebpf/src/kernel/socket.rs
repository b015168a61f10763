//! Looks sockets up in the network namespace of the packet, or of the hook's socket.

use core::ffi::c_void;
use core::mem::size_of;
use core::ptr::{self, NonNull, addr_of};

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{BPF_F_CURRENT_NETNS, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock, bpf_sock_tuple};
use aya_ebpf::btf_maps::SkStorage;
use aya_ebpf::helpers::{
    bpf_sk_assign, bpf_sk_lookup_tcp, bpf_sk_lookup_udp, bpf_sk_release, bpf_sk_storage_get,
    bpf_skc_lookup_tcp,
};
use aya_ebpf::programs::TcContext;
use redirect_ebpf::decide;
use redirect_ebpf::family::Address;
use redirect_ebpf::maps::ConfigFlags;
use redirect_ebpf::packet::Segment;

use super::{config, notes};

/// A socket with a reference that is dropped with the value.
pub(super) struct Socket(NonNull<bpf_sock>);

/// `struct bpf_sock_tuple` of one family: the kernel distinguishes the families by its size.
#[repr(C, packed)]
struct Tuple<A> {
    source: A,
    destination: A,
    source_port: [u8; 2],
    destination_port: [u8; 2],
}

/// The kernel's state of a 4-tuple.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// A connection, or a handshake in progress. A hint: it may have ended by the time the stack has the
    /// packet.
    Connected,
    /// A connection that this end opens and the other end has not answered yet.
    Opening,
    /// A closed connection whose tuple is not free yet.
    TimeWait,
    /// Only a listener, or nothing.
    Open,
}

/// The source port of our own lookups of a listener, from [`Address::NOBODY`]: [`super::lookup`] sees them as well.
pub(super) const NO_PORT: [u8; 2] = [0; 2];

const TCP_SYN_SENT: u32 = 2;
const TCP_TIME_WAIT: u32 = 6;
const TCP_LISTEN: u32 = 10;

/// The state of a segment's 4-tuple.
#[inline(always)]
pub(super) fn state<A: Copy>(ctx: &TcContext, segment: &Segment<A>) -> State {
    match Socket::existing(ctx, segment).map(|socket| socket.state()) {
        None | Some(TCP_LISTEN) => State::Open,
        Some(TCP_TIME_WAIT) => State::TimeWait,
        Some(TCP_SYN_SENT) => State::Opening,
        Some(_) => State::Connected,
    }
}

/// The state of the reversed tuple, of which this segment is the answer.
#[inline(always)]
pub(super) fn answered<A: Copy>(ctx: &TcContext, segment: &Segment<A>) -> State {
    state(ctx, &segment.reversed())
}

/// Whether a connection of the host's namespace has the segment's 4-tuple (placement `node`). If its local end is not an
/// address of the host, it is one of the proxy's.
#[inline(always)]
pub(super) fn is_known<A: Copy>(ctx: &TcContext, segment: &Segment<A>) -> bool {
    Socket::existing(ctx, segment).is_some_and(|socket| socket.state() != TCP_LISTEN)
}

/// One of the kernel's helpers that look TCP sockets up.
type Helper = unsafe fn(*mut c_void, *mut bpf_sock_tuple, u32, u64, u64) -> *mut bpf_sock;

/// Looks up a TCP socket by a packet's tuple. If no connection has it, the kernel looks for a listener and runs the programs of
/// the socket lookup, which must not count this lookup.
#[inline(always)]
fn find_of_packet<A>(ctx: &TcContext, tuple: &mut Tuple<A>, helper: Helper) -> Option<Socket> {
    let _asking = notes::Asking::new();
    find(ctx, tuple, helper)
}

#[inline(always)]
fn find<A>(ctx: &impl EbpfContext, tuple: &mut Tuple<A>, helper: Helper) -> Option<Socket> {
    // SAFETY: the tuple lives for the length of the call, and its size is right.
    let socket = unsafe {
        helper(
            ctx.as_ptr(),
            ptr::from_mut(tuple).cast(),
            size_of::<Tuple<A>>() as u32,
            BPF_F_CURRENT_NETNS as u64,
            0,
        )
    };
    NonNull::new(socket).map(Socket)
}

impl Socket {
    /// The kernel's socket for a segment's 4-tuple: a connection in any state, or a listener.
    #[inline(always)]
    pub(super) fn existing<A: Copy>(ctx: &TcContext, segment: &Segment<A>) -> Option<Self> {
        let mut tuple = Tuple {
            source: segment.source,
            destination: segment.destination,
            source_port: segment.source_port,
            destination_port: segment.destination_port,
        };
        find_of_packet(ctx, &mut tuple, bpf_skc_lookup_tcp)
    }

    /// The full socket that sent a segment that opens a connection, if it is in this namespace.
    #[inline(always)]
    pub(super) fn sender<A: Copy>(ctx: &TcContext, segment: &Segment<A>) -> Option<Self> {
        Self::full(ctx, &segment.reversed())
    }

    /// The full socket that a segment is for, if it is in this namespace: a connection's, else a listener's.
    #[inline(always)]
    pub(super) fn full<A: Copy>(ctx: &TcContext, segment: &Segment<A>) -> Option<Self> {
        let &Segment { source, destination, source_port, destination_port, .. } = segment;
        let mut tuple = Tuple { source, destination, source_port, destination_port };
        find_of_packet(ctx, &mut tuple, bpf_sk_lookup_tcp)
    }

    /// The listener on `port` for the segment's connection, if it seems to be the proxy's. [`super::capture`] verifies that.
    #[inline(always)]
    pub(super) fn listener<A: Address>(ctx: &TcContext, segment: &Segment<A>, port: u16) -> Option<Self> {
        let socket = Self::listening(ctx, segment.destination, port)?;
        (socket.is_marked() || config::flags().contains(ConfigFlags::UNMARKED_PROXY)).then_some(socket)
    }

    /// The proxy's listener on `port`, for connections to an address. If several proxies listen, the kernel picks one when it
    /// accepts the connection.
    #[inline(always)]
    pub(super) fn listener_for<A: Address>(
        ctx: &impl EbpfContext,
        destination: A,
        port: u16,
    ) -> Option<Self> {
        let socket = Self::listening(ctx, destination, port)?;
        socket.is_marked().then_some(socket)
    }

    #[inline(always)]
    fn listening<A: Address>(ctx: &impl EbpfContext, destination: A, port: u16) -> Option<Self> {
        let destination_port = port.to_be_bytes();
        let mut tuple = Tuple { source: A::NOBODY, destination, source_port: NO_PORT, destination_port };
        let socket = find(ctx, &mut tuple, bpf_sk_lookup_tcp)?;
        (socket.state() == TCP_LISTEN).then_some(socket)
    }

    /// Whether any process listens on `port` for the segment's connection.
    #[inline(always)]
    pub(super) fn is_listening<A: Address>(ctx: &TcContext, segment: &Segment<A>, port: u16) -> bool {
        Self::listening(ctx, segment.destination, port).is_some()
    }

    /// The proxy's socket for datagrams on `port`.
    #[inline(always)]
    pub(super) fn datagrams<A: Copy>(ctx: &TcContext, segment: &Segment<A>, port: u16) -> Option<Self> {
        Self::receiving(ctx, segment, port).filter(Self::is_marked)
    }

    /// Any process's datagram socket on `port`.
    #[inline(always)]
    pub(super) fn receiving<A: Copy>(ctx: &TcContext, segment: &Segment<A>, port: u16) -> Option<Self> {
        let mut tuple = Tuple {
            source: segment.source,
            destination: segment.destination,
            source_port: segment.source_port,
            destination_port: port.to_be_bytes(),
        };
        // SAFETY: the tuple lives for the length of the call, and its size is right.
        let socket = unsafe {
            bpf_sk_lookup_udp(
                ctx.as_ptr(),
                (&raw mut tuple).cast(),
                size_of::<Tuple<A>>() as u32,
                BPF_F_CURRENT_NETNS as u64,
                0,
            )
        };
        NonNull::new(socket).map(Self)
    }

    #[inline(always)]
    fn state(&self) -> u32 {
        // SAFETY: the reference is held.
        unsafe { addr_of!((*self.0.as_ptr()).state).read_volatile() }
    }

    /// Whether it has the proxy's mark. For full sockets only, e.g. listeners.
    #[inline(always)]
    pub(super) fn is_marked(&self) -> bool {
        decide::is_proxy_mark(self.mark())
    }

    /// The mark of a full socket.
    #[inline(always)]
    pub(super) fn mark(&self) -> u32 {
        // SAFETY: the reference is held.
        unsafe { addr_of!((*self.0.as_ptr()).mark).read_volatile() }
    }

    /// The value in the storage of a full socket, if any.
    #[inline(always)]
    pub(super) fn stored(&self, storage: &'static SkStorage<u64>) -> Option<u64> {
        self.storage(storage, ptr::null_mut(), 0)
    }

    /// The same. Initializes the value if there is none.
    #[inline(always)]
    pub(super) fn stored_or(&self, storage: &'static SkStorage<u64>, mut value: u64) -> Option<u64> {
        self.storage(storage, &raw mut value, BPF_SK_STORAGE_GET_F_CREATE.into())
    }

    #[inline(always)]
    fn storage(&self, storage: &'static SkStorage<u64>, value: *mut u64, flags: u64) -> Option<u64> {
        // SAFETY: the map, the socket and the initial value are valid for the length of the call.
        let value = unsafe {
            bpf_sk_storage_get((&raw const *storage).cast_mut().cast(), self.as_ptr(), value.cast(), flags)
        };
        // SAFETY: the kernel returns the value of the socket, or null.
        unsafe { value.cast::<u64>().as_ref() }.copied()
    }

    /// For helpers that take the socket.
    #[inline(always)]
    pub(super) fn as_ptr(&self) -> *mut core::ffi::c_void {
        self.0.as_ptr().cast()
    }

    /// Gives the packet to the socket.
    #[inline(always)]
    pub(super) fn assign(&self, ctx: &TcContext) -> Result<(), i64> {
        // SAFETY: the reference is held.
        match unsafe { bpf_sk_assign(ctx.as_ptr(), self.as_ptr(), 0) } {
            0 => Ok(()),
            error => Err(error),
        }
    }
}

impl Drop for Socket {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: the reference is ours and is given back once.
        unsafe { bpf_sk_release(self.as_ptr()) };
    }
}
