//! The network of an ordinary user's sandbox: passt speaks for it on the host, with the user's own sockets.
//!
//! A process in a user and network namespace of its own holds two taps, joined as any other tap and interface: one is
//! the VMM's, and the other one's frames it copies to passt's stream and back. So whatever guards a guest's traffic is
//! in a kernel that the guest can't reach, here as with plugins. All addresses are the same in every sandbox.

#![allow(unsafe_code)] // unshare(2), whose safe wrapper is gone

use super::egress::{self, Policy, Rule};
use super::handshake;
use super::look::Seen;
use super::tap;
use crate::files;
use crate::network::wish::{Mac, Port};
use anyhow::{Context, bail};
use casemate_protocol::netlink::{Request, Socket, kind, link};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use rustix::thread::UnshareFlags;
use std::io;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

/// The network's name.
pub const NAME: &str = "passt";
/// The guest's own address.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 189, 0, 2);
/// Its IPv6 address, where the host has IPv6.
pub const ADDRESS6: Ipv6Addr = Ipv6Addr::new(0xfdca, 0x5e3a, 0x7e00, 0, 0, 0, 0, 2);
/// The way out.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 189, 0, 1);
/// The same for IPv6. With passt's own address of the link it speaks for clients on the host's loopback.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// Of the IPv4 addresses.
pub const PREFIX: u8 = 24;
/// Of the IPv6 address.
pub const PREFIX6: u8 = 64;
/// passt's largest: it segments itself.
pub const MTU: u16 = 65_520;
/// What says that passt speaks.
pub const READY: &[u8] = b"ready";
/// What says that rules for names are set.
pub const DONE: &str = "done";

const VMMS: &str = "tap0";
const OURS: &str = "tap1";
const IFLA_MTU: u16 = 4;
const IFF_UP: u32 = 1;
/// A frame, with its VLAN tag if it has one.
const MAX_FRAME: usize = 18 + MTU as usize;
/// Rules for names on their way to the holder: hundreds, of at most 150 bytes each.
const MAX_RULES_TEXT: usize = 128 << 10;
/// Before each frame on the stream: its length.
const LENGTH: usize = 4;
/// Read from the stream at once: a few frames.
const BUFFER: usize = 4 * (LENGTH + MAX_FRAME);

/// Whether this host has a way out by IPv6: passt looks for the same.
pub fn has_ipv6() -> bool {
    const MAX_FILE: u64 = 4 << 20;
    let read = |name| files::read_text(Path::new(name), MAX_FILE).unwrap_or_default();
    is_way_out(&read("/proc/net/ipv6_route")) && is_address(&read("/proc/net/if_inet6"))
}

/// Whether one of the routes is a default route. A line is: destination, prefix, two more, next hop, metric, two more,
/// flags, interface; numbers are hexadecimal.
fn is_way_out(routes: &str) -> bool {
    routes.lines().any(|line| {
        let mut fields = line.split_ascii_whitespace();
        let prefix = fields.nth(1);
        prefix == Some("00") && fields.nth(7).is_some_and(|interface| interface != "lo")
    })
}

/// Whether one of the addresses is good everywhere. A line is: address, interface's number, prefix, scope, flags,
/// interface.
fn is_address(addresses: &str) -> bool {
    const EVERYWHERE: &str = "00";
    addresses
        .lines()
        .any(|line| line.split_ascii_whitespace().nth(3) == Some(EVERYWHERE))
}

/// The address that the guest's kernel gives its interface on the link by itself (RFC 4291, appendix A).
fn of_link(Mac([a, b, c, d, e, f]): Mac) -> Ipv6Addr {
    let word = |high, low| u16::from_be_bytes([high, low]);
    let host = [word(a ^ 2, b), word(c, 0xff), word(0xfe, d), word(e, f)];
    Ipv6Addr::new(0xfe80, 0, 0, 0, host[0], host[1], host[2], host[3])
}

/// passt's arguments; `stream` is the number of its end of the stream, and it speaks IPv6 too if `six`.
pub fn arguments(stream: i32, ports: &[Port], six: bool) -> Vec<String> {
    let mut args: Vec<String> = ["--foreground", "--quiet", "--no-map-gw"]
        .map(str::to_owned)
        .to_vec();
    // The guest is told its addresses by the agent, and takes no other ones.
    match six {
        true => args.extend(["--no-ra", "--no-dhcpv6"].map(str::to_owned)),
        false => args.push("--ipv4-only".to_owned()),
    }
    let mut option = |name: &str, value: String| args.extend([name.to_owned(), value]);
    option("--fd", stream.to_string());
    option("--address", ADDRESS.to_string());
    option("--netmask", PREFIX.to_string());
    option("--gateway", GATEWAY.to_string());
    if six {
        option("--address", ADDRESS6.to_string());
        option("--gateway", GATEWAY6.to_string());
    }
    option("--mtu", MTU.to_string());
    // The sandbox's resolver is the shim.
    option("--dns", "none".to_owned());
    for (name, protocol) in [("--tcp-ports", "tcp"), ("--udp-ports", "udp")] {
        let mut published = ports.iter().filter(|p| p.protocol == protocol).peekable();
        if published.peek().is_none() {
            option(name, "none".to_owned());
        }
        // Each one by itself: of several passt is content with those that it can have.
        for port in published {
            // All addresses of both families it has by itself.
            let ip = port
                .host_ip
                .filter(|ip| !six || *ip != IpAddr::from([0; 16]));
            let ip = ip.map(|ip| format!("{ip}/")).unwrap_or_default();
            option(
                name,
                format!("{ip}{}:{}", port.host_port, port.container_port),
            );
        }
    }
    args
}

/// The process that holds the namespaces: makes them, hands the VMM's tap out over `control` and copies frames until
/// `control` or `stream` ends. Over `gate` it is told the rules for names.
pub fn hold(
    [control, stream, gate]: [OwnedFd; 3],
    guest: Mac,
    policy: Option<Policy>,
) -> anyhow::Result<()> {
    let six = has_ipv6();
    enter_namespaces().context("can't make a user and network namespace")?;
    let vmms = tap::open(VMMS).context("can't make a tap; may this user open /dev/net/tun?")?;
    let ours = tap::open_plain(OURS).context("can't make a tap")?;
    join(policy.as_ref(), guest).context("can't join the taps")?;
    let fds = [vmms.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    let text = [IoSlice::new(b"tap")];
    rustix::net::sendmsg(&control, &text, &mut ancillary, SendFlags::NOSIGNAL)
        .context("can't hand the tap over")?;
    drop(vmms);
    rustix::thread::set_no_new_privs(true)?;
    if policy.is_some_and(|policy| !policy.names.is_empty()) {
        std::thread::spawn(move || tend(&gate));
    }
    let mut first = vec![question(guest)];
    if six {
        // The address that is good everywhere last.
        first.extend([of_link(guest), ADDRESS6].map(|ip| solicitation(guest, ip)));
    }
    Relay::new(ours, stream, &first)?.run(&control)
}

/// Sets the rules for names that come over `gate`, and answers, until it ends.
fn tend(gate: &OwnedFd) {
    let mut buffer = vec![0; MAX_RULES_TEXT];
    while let Ok((length @ 1.., _)) = rustix::net::recv(gate, &mut buffer, RecvFlags::empty()) {
        let rules = serde_json::from_slice::<Vec<Rule>>(&buffer[..length]);
        let set = rules
            .map_err(io::Error::from)
            .and_then(|rules| egress::set_named(&rules));
        let said = set.map_or_else(|e| e.to_string(), |()| DONE.to_owned());
        if rustix::net::send(gate, said.as_bytes(), SendFlags::NOSIGNAL).is_err() {
            return;
        }
    }
}

fn enter_namespaces() -> io::Result<()> {
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    // SAFETY: no file table is unshared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER | UnshareFlags::NEWNET) }?;
    std::fs::write("/proc/self/setgroups", "deny")?;
    std::fs::write("/proc/self/uid_map", format!("0 {} 1", user.as_raw()))?;
    std::fs::write("/proc/self/gid_map", format!("0 {} 1", group.as_raw()))
}

fn join(policy: Option<&Policy>, guest: Mac) -> io::Result<()> {
    let socket = Socket::open()?;
    let missing = || io::Error::from(io::ErrorKind::NotFound);
    let seen = Seen::here(&socket)?;
    let ours = seen.interface(OURS).ok_or_else(missing)?;
    // Or else passt takes its addresses for the guest's.
    tap::mute(OURS)?;
    let up = Request::new(kind::NEWLINK, 0, &link(ours.index, IFF_UP, IFF_UP));
    socket.change(up.with(IFLA_MTU, &u32::from(MTU).to_ne_bytes()))?;
    let seen = Seen::here(&socket)?;
    let (vmms, ours) = (seen.interface(VMMS), seen.interface(OURS));
    let (vmms, ours) = (vmms.ok_or_else(missing)?, ours.ok_or_else(missing)?);
    match policy {
        None => tap::join(&socket, vmms, ours, true),
        Some(policy) => {
            // Its address of the link answers clients on the host's loopback.
            let ips = [ADDRESS.into(), ADDRESS6.into(), of_link(guest).into()];
            egress::enforce(policy, &ips, &[VMMS.to_owned()])?;
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

/// Asks the same by IPv6, in the guest's name and with one of its addresses: passt sends what comes for the guest to the
/// address that it saw last.
fn solicitation(Mac(mac): Mac, from: Ipv6Addr) -> Vec<u8> {
    // RFC 4291, section 2.7.1: whoever may have an address with this end.
    const ASKED: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 1);
    const ICMPV6: u8 = 58;
    // RFC 4861, section 4.3: a question, with the link's address of who asks.
    let mut message = vec![135, 0, 0, 0, 0, 0, 0, 0];
    message.extend(GATEWAY6.octets());
    message.extend([1, 1]);
    message.extend(mac);
    let length = message.len() as u8;
    let addresses = [from.octets(), ASKED.octets()].concat();
    let sum = handshake::checksum(&[&addresses, &[0, ICMPV6, 0, length], &message]);
    message[2..4].copy_from_slice(&sum);

    let mut frame = vec![0x33, 0x33, 0xff, 0, 0, 1];
    frame.extend(mac);
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, length, ICMPV6, 255]);
    frame.extend(addresses);
    frame.extend(message);
    frame
}

/// Whether an IPv6 packet comes from no address: its sender makes sure that nobody else has the one it is to get, and
/// nobody has. Debian 12's passt would send there what comes for the guest.
fn is_nobodys(frame: &[u8]) -> bool {
    frame.get(12..14) == Some(&[0x86, 0xdd]) && frame.get(22..38) == Some(&[0; 16])
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
    /// Passt is sent `first` before anything of the guest's.
    fn new(tap: OwnedFd, stream: OwnedFd, first: &[Vec<u8>]) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&stream, true)?;
        let mut relay = Self {
            tap,
            stream,
            to_stream: Vec::new(),
            sent: 0,
            from_stream: Vec::new(),
        };
        first.iter().for_each(|frame| relay.queue(frame));
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
                    Ok(length) if is_nobodys(&buffer[..length]) => {}
                    Ok(length) => {
                        let frame = &buffer[..length];
                        self.queue(frame);
                        if let Some(answer) = handshake::acknowledgement(frame) {
                            let _ = rustix::io::write(&self.tap, &answer);
                        }
                    }
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
        let line = arguments(7, &[], false).join(" ");
        assert!(
            line.contains("--fd 7") && line.contains("--no-map-gw"),
            "{line}"
        );
        let none = "--tcp-ports none --udp-ports none";
        assert!(line.contains(none), "{line}");
    }

    #[test]
    fn arguments_open_each_published_port() {
        let port = |host_port, host_ip: Option<&str>, protocol: &str| Port {
            host_port,
            container_port: 80,
            protocol: protocol.into(),
            host_ip: host_ip.map(|ip| ip.parse().unwrap()),
        };
        let ports = [
            port(8080, None, "tcp"),
            port(8081, Some("127.0.0.1"), "tcp"),
            port(8082, Some("0.0.0.0"), "tcp"),
            port(8083, Some("::1"), "tcp"),
            port(8084, Some("::"), "tcp"),
        ];
        let line = arguments(7, &ports, true).join(" ");
        let expected = "--tcp-ports 8080:80 --tcp-ports 127.0.0.1/8081:80 --tcp-ports 0.0.0.0/8082:80 --tcp-ports ::1/8083:80 --tcp-ports 8084:80 --udp-ports none";
        assert!(line.contains(expected), "{line}");
    }

    #[test]
    fn way_out_is_a_default_route_of_a_real_interface() {
        let zero = "0".repeat(32);
        let route = |prefix: &str, interface: &str| {
            format!(
                "{zero} {prefix} {zero} 00 {zero} ffffffff 00000001 00000000 00200200 {interface}\n"
            )
        };
        assert!(is_way_out(
            &[route("40", "eth0"), route("00", "eth0")].concat()
        ));
        assert!(!is_way_out(
            &[route("00", "lo"), route("40", "eth0")].concat()
        ));
        for bad in ["", "\n", "x", "x 00", &zero] {
            assert!(!is_way_out(bad) && !is_address(bad), "{bad}");
        }
        let address = "fd000000000000000000000000000002 04 40 00 82 eth0\n";
        let local = "fe8000000000000000fc00fffe000001 04 40 20 80 eth0\n";
        assert!(is_address(address) && !is_address(local));
    }

    #[test]
    fn of_link_is_as_the_kernel_has_it() {
        let mac = "02:fc:00:00:00:01".parse().unwrap();
        assert_eq!(of_link(mac).to_string(), "fe80::fc:ff:fe00:1");
    }

    #[test]
    fn solicitation_has_a_right_checksum() {
        let frame = solicitation(Mac([2; 6]), ADDRESS6);
        assert_eq!(frame.len(), 14 + 40 + 32);
        let (addresses, message) = (&frame[22..54], &frame[54..]);
        assert_eq!(addresses[..16], ADDRESS6.octets());
        let sum = handshake::checksum(&[addresses, &[0, 58, 0, 32], message]);
        assert_eq!(sum, [0, 0]);
    }

    #[test]
    fn is_nobodys_is_ipv6_from_no_address() {
        let none = solicitation(Mac([2; 6]), Ipv6Addr::UNSPECIFIED);
        assert!(is_nobodys(&none) && !is_nobodys(&none[..37]));
        assert!(!is_nobodys(&solicitation(Mac([2; 6]), ADDRESS6)));
        assert!(!is_nobodys(&[0; 60]) && !is_nobodys(&[]));
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
        let relay = Relay::new(tap, stream, &[question(Mac([2; 6]))]).unwrap();
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
