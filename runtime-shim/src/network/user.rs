//! The network of an ordinary user's sandbox: passt speaks for it on the host, with the user's own sockets.
//!
//! A process in a user and network namespace of its own holds two taps, joined as any other tap and interface: one is
//! the VMM's, and the other one's frames it copies to passt's stream and back. So whatever guards a guest's traffic is
//! in a kernel that the guest can't reach, here as with plugins. All addresses are the same in every sandbox.

#![allow(unsafe_code)] // unshare(2), whose safe wrapper is gone

use super::egress::{self, Policy};
use super::look::Seen;
use super::tap;
use crate::network::wish::Mac;
use anyhow::{Context, bail};
use casemate_protocol::netlink::{Request, Socket, kind, link};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use rustix::thread::UnshareFlags;
use std::io;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, OwnedFd};

/// The network's name.
pub const NAME: &str = "passt";
/// The guest's own address.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 189, 0, 2);
/// The way out.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 189, 0, 1);
/// Answers as the host's own resolver does.
pub const RESOLVER: Ipv4Addr = Ipv4Addr::new(10, 189, 0, 3);
/// Of all three.
pub const PREFIX: u8 = 24;
/// passt's largest: it segments itself.
pub const MTU: u16 = 65_520;
/// What says that passt speaks.
pub const READY: &[u8] = b"ready";

const VMMS: &str = "tap0";
const OURS: &str = "tap1";
const IFLA_MTU: u16 = 4;
const IFF_UP: u32 = 1;
/// A frame, with its VLAN tag if it has one.
const MAX_FRAME: usize = 18 + MTU as usize;
/// Before each frame on the stream: its length.
const LENGTH: usize = 4;
/// Read from the stream at once: a few frames.
const BUFFER: usize = 4 * (LENGTH + MAX_FRAME);

/// passt's arguments; `stream` is the number of its end of the stream.
pub fn arguments(stream: i32) -> Vec<String> {
    let mut args: Vec<String> = ["--foreground", "--quiet", "--ipv4-only", "--no-map-gw"]
        .map(str::to_owned)
        .to_vec();
    let mut option = |name: &str, value: String| args.extend([name.to_owned(), value]);
    option("--fd", stream.to_string());
    option("--address", ADDRESS.to_string());
    option("--netmask", PREFIX.to_string());
    option("--gateway", GATEWAY.to_string());
    option("--mtu", MTU.to_string());
    option("--dns-forward", RESOLVER.to_string());
    option("--tcp-ports", "none".to_owned());
    option("--udp-ports", "none".to_owned());
    args
}

/// The process that holds the namespaces: makes them, hands the VMM's tap out over `control` and copies frames until
/// `control` or `stream` ends.
pub fn hold(
    control: OwnedFd,
    stream: OwnedFd,
    guest: Mac,
    policy: Option<Policy>,
) -> anyhow::Result<()> {
    enter_namespaces().context("can't make a user and network namespace")?;
    let vmms = tap::open(VMMS).context("can't make a tap; may this user open /dev/net/tun?")?;
    let ours = tap::open_plain(OURS).context("can't make a tap")?;
    join(policy.as_ref()).context("can't join the taps")?;
    let fds = [vmms.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    let text = [IoSlice::new(b"tap")];
    rustix::net::sendmsg(&control, &text, &mut ancillary, SendFlags::NOSIGNAL)
        .context("can't hand the tap over")?;
    drop(vmms);
    rustix::thread::set_no_new_privs(true)?;
    Relay::new(ours, stream, guest)?.run(&control)
}

fn enter_namespaces() -> io::Result<()> {
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    // SAFETY: no file table is unshared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER | UnshareFlags::NEWNET) }?;
    std::fs::write("/proc/self/setgroups", "deny")?;
    std::fs::write("/proc/self/uid_map", format!("0 {} 1", user.as_raw()))?;
    std::fs::write("/proc/self/gid_map", format!("0 {} 1", group.as_raw()))
}

fn join(policy: Option<&Policy>) -> io::Result<()> {
    let socket = Socket::open()?;
    let missing = || io::Error::from(io::ErrorKind::NotFound);
    let seen = Seen::here(&socket)?;
    let ours = seen.interface(OURS).ok_or_else(missing)?;
    let up = Request::new(kind::NEWLINK, 0, &link(ours.index, IFF_UP, IFF_UP));
    socket.change(up.with(IFLA_MTU, &u32::from(MTU).to_ne_bytes()))?;
    let seen = Seen::here(&socket)?;
    let (vmms, ours) = (seen.interface(VMMS), seen.interface(OURS));
    let (vmms, ours) = (vmms.ok_or_else(missing)?, ours.ok_or_else(missing)?);
    match policy {
        None => tap::join(&socket, vmms, ours, true),
        Some(policy) => {
            egress::enforce(policy, &[IpAddr::V4(ADDRESS)], &[VMMS.to_owned()])?;
            egress::join(&socket, vmms, ours, "join0")
        }
    }
}

/// Asks in the guest's name who has the gateway's address: passt answers as soon as it speaks at all, and knows from
/// then on where the guest is.
fn question(Mac(mac): Mac) -> Vec<u8> {
    let mut frame = [0xff; 6].to_vec();
    frame.extend(mac);
    // ARP; Ethernet, IPv4; lengths of their addresses; a request.
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(mac);
    frame.extend(ADDRESS.octets());
    frame.extend([0; 6]);
    frame.extend(GATEWAY.octets());
    frame
}

/// Frames between a tap and a stream.
struct Relay {
    tap: OwnedFd,
    stream: OwnedFd,
    /// For the stream: a frame with its length before it, and how much of it was sent.
    to_stream: Vec<u8>,
    sent: usize,
    /// From the stream, not yet whole.
    from_stream: Vec<u8>,
}

impl Relay {
    fn new(tap: OwnedFd, stream: OwnedFd, guest: Mac) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&stream, true)?;
        let mut relay = Self {
            tap,
            stream,
            to_stream: Vec::new(),
            sent: 0,
            from_stream: Vec::new(),
        };
        relay.queue(&question(guest));
        Ok(relay)
    }

    /// Until one side is gone.
    fn run(mut self, control: &OwnedFd) -> anyhow::Result<()> {
        let mut buffer = vec![0; BUFFER];
        let mut heard = false;
        loop {
            let idle = self.to_stream.is_empty();
            let from_tap = if idle {
                PollFlags::IN
            } else {
                PollFlags::empty()
            };
            let to_stream = if idle {
                PollFlags::empty()
            } else {
                PollFlags::OUT
            };
            let mut fds = [
                PollFd::new(&self.tap, from_tap),
                PollFd::new(&self.stream, PollFlags::IN | to_stream),
                PollFd::new(control, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Err(Errno::INTR) => continue,
                polled => polled?,
            };
            let [tap, stream, control_ready] = fds.map(|fd| fd.revents());
            if !control_ready.is_empty() {
                return Ok(());
            }
            if tap.intersects(PollFlags::ERR | PollFlags::HUP) {
                bail!("the tap is gone");
            }
            if tap.contains(PollFlags::IN) {
                match rustix::io::read(&self.tap, &mut buffer[..MAX_FRAME]) {
                    Ok(length) => self.queue(&buffer[..length]),
                    Err(Errno::AGAIN) => {}
                    Err(error) => return Err(error).context("can't read from the tap"),
                }
            }
            self.send().context("can't write to passt")?;
            if stream.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
                match rustix::io::read(&self.stream, &mut buffer) {
                    Ok(0) => bail!("passt is gone"),
                    Ok(length) => self.take(&buffer[..length])?,
                    Err(Errno::AGAIN) => {}
                    Err(error) => return Err(error).context("can't read from passt"),
                }
                if !std::mem::replace(&mut heard, true) {
                    rustix::net::send(control, READY, SendFlags::NOSIGNAL)?;
                }
            }
        }
    }

    fn queue(&mut self, frame: &[u8]) {
        self.to_stream
            .extend_from_slice(&(frame.len() as u32).to_be_bytes());
        self.to_stream.extend_from_slice(frame);
    }

    fn send(&mut self) -> io::Result<()> {
        while self.sent < self.to_stream.len() {
            let rest = &self.to_stream[self.sent..];
            match rustix::net::send(&self.stream, rest, SendFlags::NOSIGNAL) {
                Ok(sent) => self.sent += sent,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.to_stream.clear();
        self.sent = 0;
        Ok(())
    }

    /// Gives the tap every frame that is whole. One that it doesn't take is lost, as on any wire.
    fn take(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.from_stream.extend_from_slice(bytes);
        let mut rest = &self.from_stream[..];
        while let Some((frame, behind)) = split_frame(rest)? {
            let _ = rustix::io::write(&self.tap, frame);
            rest = behind;
        }
        let left = rest.len();
        let used = self.from_stream.len() - left;
        self.from_stream.drain(..used);
        Ok(())
    }
}

/// The first whole frame of a stream and what is behind it.
fn split_frame(bytes: &[u8]) -> anyhow::Result<Option<(&[u8], &[u8])>> {
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH>() else {
        return Ok(None);
    };
    let length = u32::from_be_bytes(*length) as usize;
    if length > MAX_FRAME {
        bail!("passt sends a frame of {length} bytes; at most {MAX_FRAME} are possible");
    }
    Ok(rest.split_at_checked(length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_frame_waits_for_the_whole_and_refuses_what_is_too_long() {
        let two = [0, 0, 0, 2, 7, 8, 0, 0, 0, 1];
        let (frame, rest) = split_frame(&two).unwrap().unwrap();
        assert_eq!((frame, rest), (&[7, 8][..], &[0, 0, 0, 1][..]));
        assert!(split_frame(rest).unwrap().is_none());
        assert!(split_frame(&[0, 0]).unwrap().is_none());
        assert!(split_frame(&[0xff; 8]).is_err());
    }

    #[test]
    fn arguments_open_nothing_of_the_container() {
        let line = arguments(7).join(" ");
        assert!(
            line.contains("--fd 7") && line.contains("--no-map-gw"),
            "{line}"
        );
        let none = "--tcp-ports none --udp-ports none";
        assert!(line.contains(none), "{line}");
    }

    #[test]
    fn relay_copies_frames_both_ways() {
        let pair = |kind| {
            rustix::net::socketpair(
                rustix::net::AddressFamily::UNIX,
                kind,
                rustix::net::SocketFlags::CLOEXEC,
                None,
            )
            .unwrap()
        };
        let (guest, tap) = pair(rustix::net::SocketType::SEQPACKET);
        let (passt, stream) = pair(rustix::net::SocketType::STREAM);
        let (shim, control) = pair(rustix::net::SocketType::SEQPACKET);
        let relay = Relay::new(tap, stream, Mac([2; 6])).unwrap();
        let thread = std::thread::spawn(move || relay.run(&control));
        let mut buffer = [0; 128];
        let asked = rustix::io::read(&passt, &mut buffer).unwrap();
        assert_eq!((asked, &buffer[16..18]), (46, &[8, 6][..]));
        rustix::io::write(&guest, b"from the guest").unwrap();
        let mut whole = [0; 18];
        let read = rustix::io::read(&passt, &mut whole).unwrap();
        assert_eq!(&whole[..read], b"\0\0\0\x0efrom the guest");
        rustix::io::write(&passt, b"\0\0\0\x02hi\0\0").unwrap();
        let read = rustix::io::read(&guest, &mut buffer).unwrap();
        assert_eq!(&buffer[..read], b"hi");
        let read = rustix::io::read(&shim, &mut buffer).unwrap();
        assert_eq!(&buffer[..read], READY);
        drop(shim);
        thread.join().unwrap().unwrap();
    }

    proptest::proptest! {
        #[test]
        fn split_frame_of_anything_never_panics(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..64)) {
            let _ = split_frame(&bytes);
        }
    }
}
