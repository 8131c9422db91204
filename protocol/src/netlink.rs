//! The kernel's network interfaces, addresses and routes, over rtnetlink.
//!
//! By hand: a guest's network takes ten messages, which the crates for it would have an actor of their own send,
//! for 400 KiB more in every guest's initrd. Messages are built and taken apart here; what they mean is the caller's.

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use std::io;
use std::os::fd::OwnedFd;

/// Kinds of messages (linux/rtnetlink.h).
pub mod kind {
    #![allow(missing_docs)]
    pub const NEWLINK: u16 = 16;
    pub const DELLINK: u16 = 17;
    pub const GETLINK: u16 = 18;
    pub const NEWADDR: u16 = 20;
    pub const GETADDR: u16 = 22;
    pub const NEWROUTE: u16 = 24;
    pub const GETROUTE: u16 = 26;
    pub const NEWNEIGH: u16 = 28;
    pub const GETNEIGH: u16 = 30;
    pub const NEWQDISC: u16 = 36;
    pub const NEWTFILTER: u16 = 44;
}

/// Flags of a request (linux/netlink.h).
pub mod flag {
    #![allow(missing_docs)]
    pub const REQUEST: u16 = 0x1;
    pub const ACK: u16 = 0x4;
    pub const DUMP: u16 = 0x300;
    pub const REPLACE: u16 = 0x100;
    pub const EXCL: u16 = 0x200;
    pub const CREATE: u16 = 0x400;
}

/// IPv4 in a message (AF_INET).
pub const INET: u8 = 2;
/// IPv6 in a message (AF_INET6).
pub const INET6: u8 = 10;

const HEADER: usize = 16;
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// A nested attribute, or one in network byte order: not part of its kind.
const ATTRIBUTE_FLAGS: u16 = 0xc000;
/// The kernel sends at most 32 KiB at once.
const BUFFER: usize = 64 << 10;
/// No network namespace of a container has more.
const MAX_DUMP: usize = 4 << 20;

/// A message to the kernel.
#[derive(Debug, Clone)]
pub struct Request {
    bytes: Vec<u8>,
}

impl Request {
    /// A message of a [`kind`] whose fixed part is `fixed`.
    pub fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flag::REQUEST | flags).to_ne_bytes());
        bytes.extend_from_slice(fixed);
        Self { bytes }
    }

    /// The same with an attribute.
    #[must_use]
    pub fn with(mut self, kind: u16, value: &[u8]) -> Self {
        attribute(&mut self.bytes, kind, value);
        self
    }

    fn finished(&self) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        let length = bytes.len() as u32;
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        bytes
    }
}

/// Appends an attribute to a message or to the value of another attribute.
pub fn attribute(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = 4 + value.len() as u16;
    bytes.extend_from_slice(&length.to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// The attributes in `bytes`, as far as they are well-formed.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & !ATTRIBUTE_FLAGS;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// The fixed part of a message about a link (struct ifinfomsg); only the flags in `change` count.
pub fn link(index: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut fixed = [0; 16];
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    fixed[8..12].copy_from_slice(&flags.to_ne_bytes());
    fixed[12..].copy_from_slice(&change.to_ne_bytes());
    fixed
}

/// A connection to the kernel, for the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
}

impl Socket {
    /// Opens one.
    pub fn open() -> io::Result<Self> {
        let fd = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None, // NETLINK_ROUTE
        )?;
        rustix::net::bind(&fd, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self { fd })
    }

    /// Has a request done.
    pub fn change(&self, request: Request) -> io::Result<()> {
        let mut bytes = request.finished();
        bytes[6] |= flag::ACK as u8;
        self.send(&bytes)?;
        self.answers(|_, _| Ok(()))
    }

    /// Everything that answers a request: each message's kind and what follows its header.
    pub fn list(&self, request: Request) -> io::Result<Vec<(u16, Vec<u8>)>> {
        let mut bytes = request.finished();
        bytes[6..8].copy_from_slice(&(flag::REQUEST | flag::DUMP).to_ne_bytes());
        self.send(&bytes)?;
        let mut all = Vec::new();
        let mut size = 0;
        self.answers(|kind, body| {
            size += body.len();
            if size > MAX_DUMP {
                return Err(io::Error::other("the kernel lists too much"));
            }
            all.push((kind, body.to_vec()));
            Ok(())
        })?;
        Ok(all)
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let kernel = SocketAddrNetlink::new(0, 0);
        rustix::net::sendto(&self.fd, bytes, SendFlags::empty(), &kernel)?;
        Ok(())
    }

    /// Reads until the kernel says that it is done, or that it failed.
    fn answers(&self, mut each: impl FnMut(u16, &[u8]) -> io::Result<()>) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER];
        loop {
            let (_, length) = match rustix::net::recv(&self.fd, &mut buffer[..], RecvFlags::empty())
            {
                Err(Errno::INTR) => continue,
                received => received?,
            };
            let mut rest = &buffer[..length.min(BUFFER)];
            while let (Some(length), Some(kind)) = (u32_at(rest, 0), u16_at(rest, 4)) {
                let length = length as usize;
                let Some(body) = rest.get(HEADER..length) else {
                    break;
                };
                match kind {
                    DONE => return Ok(()),
                    ERROR => {
                        // A negative errno, 0: done.
                        return match u32_at(body, 0).unwrap_or(0) as i32 {
                            0 => Ok(()),
                            code => Err(io::Error::from_raw_os_error(code.wrapping_neg())),
                        };
                    }
                    kind => each(kind, body)?,
                }
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_of_links_has_the_loopback() {
        let socket = Socket::open().unwrap();
        let links = socket
            .list(Request::new(kind::GETLINK, 0, &link(0, 0, 0)))
            .unwrap();
        const NAME: u16 = 3;
        let names: Vec<&[u8]> = links
            .iter()
            .filter(|(kind, _)| *kind == kind::NEWLINK)
            .filter_map(|(_, body)| attributes(&body[16..]).find(|(kind, _)| *kind == NAME))
            .map(|(_, name)| name)
            .collect();
        assert!(names.contains(&&b"lo\0"[..]), "{names:?}");
    }

    #[test]
    fn change_of_what_is_not_there_tells_the_kernels_error() {
        let socket = Socket::open().unwrap();
        let up = Request::new(kind::NEWLINK, 0, &link(0x7fff_fff0, 1, 1));
        assert!(socket.change(up).is_err());
    }

    #[test]
    fn attributes_of_what_was_built_are_the_same() {
        let mut bytes = Vec::new();
        attribute(&mut bytes, 1, b"a");
        attribute(&mut bytes, 2, b"");
        attribute(&mut bytes, 3, b"12345678");
        let all: Vec<_> = attributes(&bytes).collect();
        assert_eq!(all, [(1, &b"a"[..]), (2, b""), (3, b"12345678")]);
    }

    #[test]
    fn attributes_of_a_length_that_lies_end() {
        assert_eq!(attributes(&[3, 0, 1, 0]).count(), 0);
        assert_eq!(attributes(&[200, 0, 1, 0, 1, 2]).count(), 0);
        assert_eq!(attributes(&[0; 64]).count(), 0);
    }
}
