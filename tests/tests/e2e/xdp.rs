//! Sends a frame through an AF_XDP socket, which skips the queueing discipline and so TC. `CAP_NET_RAW` is
//! enough.

use std::io;
use std::num::NonZero;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, ensure};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use redirect_tests::wait::{self, SOON};
use socket2::{Domain, Socket, Type};

/// One frame, and one place in each ring.
const CHUNK: usize = 4096;
const PLACES: u32 = 1;

/// From the namespace of the calling thread.
pub(crate) fn send(device: &str, frame: &[u8]) -> Result<()> {
    let socket = Socket::new(Domain::from(libc::AF_XDP), Type::RAW, None).context("AF_XDP")?;
    let memory = Memory::anonymous(CHUNK)?;
    // SAFETY: the memory is as long, and nobody else's.
    unsafe { memory.start.cast::<u8>().copy_from(NonNull::from(frame).cast(), frame.len().min(CHUNK)) };
    // SAFETY: integers only: zero is a valid value.
    let mut region: libc::xdp_umem_reg = unsafe { std::mem::zeroed() };
    region.addr = memory.start.as_ptr() as u64;
    region.len = CHUNK as u64;
    region.chunk_size = CHUNK as u32;
    set(&socket, libc::XDP_UMEM_REG, &region)?;
    for ring in [libc::XDP_UMEM_FILL_RING, libc::XDP_UMEM_COMPLETION_RING, libc::XDP_TX_RING] {
        set(&socket, ring, &PLACES)?;
    }
    let ring = offsets(&socket)?.tx;
    let length = ring.desc as usize + size_of::<libc::xdp_desc>();
    let transmit = Memory::of_ring(&socket, length)?;
    bind(&socket, device)?;

    let descriptor = libc::xdp_desc { addr: 0, len: frame.len() as u32, options: 0 };
    // SAFETY: the kernel says that the only place of the ring is there.
    unsafe { transmit.at(ring.desc).cast::<libc::xdp_desc>().write(descriptor) };
    // SAFETY: the kernel says that its counter is there.
    unsafe { transmit.at(ring.producer).cast::<AtomicU32>().as_ref() }.store(1, Ordering::Release);
    // SAFETY: there is nothing that the call would read.
    let sent = unsafe {
        libc::sendto(socket.as_raw_fd(), std::ptr::null(), 0, libc::MSG_DONTWAIT, std::ptr::null(), 0)
    };
    ensure!(sent == 0, "AF_XDP: {}", io::Error::last_os_error());
    // SAFETY: as above.
    let taken = unsafe { transmit.at(ring.consumer).cast::<AtomicU32>().as_ref() }.load(Ordering::Acquire);
    ensure!(taken == 1, "the kernel has not taken the frame");
    Ok(())
}

fn bind(socket: &Socket, device: &str) -> Result<()> {
    let address = libc::sockaddr_xdp {
        sxdp_family: libc::AF_XDP as libc::c_ushort,
        sxdp_flags: libc::XDP_COPY,
        sxdp_ifindex: nix::net::if_::if_nametoindex(device)?,
        sxdp_queue_id: 0,
        sxdp_shared_umem_fd: 0,
    };
    let length = size_of_val(&address) as libc::socklen_t;
    // The kernel releases the device some time after another socket was closed.
    wait::until("queue of the device", SOON, || {
        // SAFETY: the address lives for the length of the call, and its size is right.
        let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
        match Errno::result(result) {
            Err(Errno::EBUSY) => Ok(None),
            result => Ok(Some(result.with_context(|| format!("bind to {device}"))?)),
        }
    })?;
    Ok(())
}

fn set<T>(socket: &Socket, option: libc::c_int, value: &T) -> Result<()> {
    let length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the value lives for the length of the call, and its size is right.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_XDP, option, (&raw const *value).cast(), length)
    };
    ensure!(result == 0, "option {option}: {}", io::Error::last_os_error());
    Ok(())
}

fn offsets(socket: &Socket) -> Result<libc::xdp_mmap_offsets> {
    // SAFETY: integers only: zero is a valid value.
    let mut offsets: libc::xdp_mmap_offsets = unsafe { std::mem::zeroed() };
    let mut length = size_of_val(&offsets) as libc::socklen_t;
    // SAFETY: the value lives for the length of the call, and its size is right.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_XDP,
            libc::XDP_MMAP_OFFSETS,
            (&raw mut offsets).cast(),
            &raw mut length,
        )
    };
    ensure!(result == 0, "XDP_MMAP_OFFSETS: {}", io::Error::last_os_error());
    Ok(offsets)
}

/// Pages, unmapped with this value.
struct Memory {
    start: NonNull<libc::c_void>,
    length: usize,
}

impl Memory {
    fn anonymous(length: usize) -> Result<Self> {
        let size = NonZero::new(length).context("a length")?;
        // SAFETY: new pages, which nobody else has.
        let start = unsafe { mmap_anonymous(None, size, Self::ACCESS, MapFlags::MAP_PRIVATE) }?;
        Ok(Self { start, length })
    }

    fn of_ring(socket: &Socket, length: usize) -> Result<Self> {
        let (size, place) = (NonZero::new(length).context("a length")?, libc::XDP_PGOFF_TX_RING);
        // SAFETY: new pages, which the kernel shares.
        let start = unsafe {
            mmap(None, size, Self::ACCESS, MapFlags::MAP_SHARED, socket.as_fd(), place as libc::off_t)
        }?;
        Ok(Self { start, length })
    }

    const ACCESS: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

    fn at(&self, offset: u64) -> NonNull<u8> {
        assert!((offset as usize) < self.length);
        // SAFETY: that is inside.
        unsafe { self.start.cast::<u8>().add(offset as usize) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the pages any more.
        let _unmapped = unsafe { munmap(self.start, self.length) };
    }
}
