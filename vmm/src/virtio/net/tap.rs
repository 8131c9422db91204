//! The host's end of a network device: a tap that carries offload headers.

// The tap's ioctls have no safe wrapper among the crates at hand.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
};

/// `struct virtio_net_hdr_v1`, before each frame in both directions.
pub(super) const VNET_HEADER: usize = 12;

/// What the guest takes, and the tap's word for it (TUN_F_*).
const OFFLOADS: [(u32, libc::c_uint); 6] = [
    (VIRTIO_NET_F_GUEST_CSUM, 0x01),
    (VIRTIO_NET_F_GUEST_TSO4, 0x02),
    (VIRTIO_NET_F_GUEST_TSO6, 0x04),
    (VIRTIO_NET_F_GUEST_ECN, 0x08),
    (VIRTIO_NET_F_GUEST_USO4, 0x20),
    (VIRTIO_NET_F_GUEST_USO6, 0x40),
];
/// TUN_F_USO4 and TUN_F_USO6: known since Linux 6.2.
const USO: libc::c_uint = 0x60;
/// _IOW('T', 208, unsigned int).
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
/// _IOW('T', 216, int).
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;

/// An open tap.
#[derive(Debug)]
pub(super) struct Tap {
    fd: OwnedFd,
    /// The kernel segments UDP too.
    pub(super) uso: bool,
    /// Answers to ioctls: a socket that stands in for it in tests doesn't.
    real: bool,
}

impl Tap {
    /// Sets up a tap that was opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        set_nonblocking(fd.as_fd())?;
        let size = VNET_HEADER as libc::c_int;
        // SAFETY: the kernel reads one int.
        if unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ, &size) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let all = OFFLOADS.iter().fold(0, |all, (_, flag)| all | flag);
        let uso = set_offload(fd.as_fd(), all).is_ok();
        // Until the driver says what it takes.
        set_offload(fd.as_fd(), 0)?;
        Ok(Tap {
            fd,
            uso,
            real: true,
        })
    }

    /// A packet socket in place of a tap.
    #[cfg(any(test, feature = "test-utils"))]
    pub(super) fn mock(fd: OwnedFd) -> io::Result<Self> {
        set_nonblocking(fd.as_fd())?;
        Ok(Tap {
            fd,
            uso: true,
            real: false,
        })
    }

    /// Lets the kernel hand over what the driver agreed to.
    pub(super) fn set_features(&self, features: u64) -> io::Result<()> {
        let known = if self.uso { !0 } else { !USO };
        let flags = OFFLOADS
            .iter()
            .filter(|(bit, _)| features & 1 << bit != 0)
            .fold(0, |set, (_, flag)| set | flag);
        if self.real {
            set_offload(self.fd.as_fd(), flags & known)
        } else {
            Ok(())
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn set_offload(fd: BorrowedFd<'_>, flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: the argument is a number.
    if unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(flags)) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the arguments are numbers.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
