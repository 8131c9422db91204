//! Taps, and how each is joined with an interface: whatever comes out of one goes into the other (tc(8), as Kata does).

#![allow(unsafe_code)] // the tap's ioctl, which no safe wrapper has

use super::look::Interface;
use casemate_protocol::netlink::{Request, Socket, attribute, flag, kind, link};
use rustix::fs::{Mode, OFlags};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};

// linux/if_tun.h
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const IFF_TAP: libc::c_short = 0x0002;
const IFF_NO_PI: libc::c_short = 0x1000;
const IFF_VNET_HDR: libc::c_short = 0x4000;
// linux/if_link.h
const IFLA_MTU: u16 = 4;
const IFF_UP: u32 = 1;
const IFF_NOARP: u32 = 0x80;
// linux/pkt_sched.h, pkt_cls.h, tc_act/tc_mirred.h
const INGRESS: u32 = 0xffff_0000;
const PARENT_INGRESS: u32 = 0xffff_fff1;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_U32_SEL: u16 = 5;
const TCA_U32_ACT: u16 = 7;
const TCA_ACT_KIND: u16 = 1;
const TCA_ACT_OPTIONS: u16 = 2;
const TCA_MIRRED_PARMS: u16 = 2;
const TC_U32_TERMINAL: u8 = 1;
const TC_ACT_STOLEN: i32 = 4;
const EGRESS_REDIRECT: i32 = 1;
// linux/if_ether.h
const ETH_P_ALL: u16 = 0x0003;
const ETH_P_IP: u16 = 0x0800;
const ETH_P_8021Q: u16 = 0x8100;
const ETH_P_8021AD: u16 = 0x88a8;
const ETH_P_IPV6: u16 = 0x86dd;

/// Where the destination's address lies in a packet.
const IPV4_DESTINATION: i32 = 16;
const IPV6_DESTINATION: i32 = 24;

/// Addresses at which clouds tell a machine its secrets: of no container's business.
pub const METADATA_V4: (Ipv4Addr, u8) = (Ipv4Addr::new(169, 254, 0, 0), 16);
/// The same for IPv6: AWS, OpenStack.
pub const METADATA_V6: [Ipv6Addr; 2] = [
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254),
    Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0xa9fe, 0xa9fe),
];

/// Makes a tap in the calling thread's network namespace. It goes with its last open file.
pub fn open(name: &str) -> io::Result<OwnedFd> {
    open_with(name, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)
}

/// The same without offload headers: its frames are complete.
pub fn open_plain(name: &str) -> io::Result<OwnedFd> {
    open_with(name, IFF_TAP | IFF_NO_PI)
}

fn open_with(name: &str, kind: libc::c_short) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = rustix::fs::open("/dev/net/tun", flags, Mode::empty())?;
    // SAFETY: zeros are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(15)) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = kind;
    // SAFETY: the kernel reads and writes an ifreq.
    if unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETIFF, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fd)
}

/// Joins a tap with an interface of the calling thread's namespace. What the guest sends to where clouds tell
/// secrets goes nowhere if `guarded`.
pub fn join(
    socket: &Socket,
    tap: &Interface,
    interface: &Interface,
    guarded: bool,
) -> io::Result<()> {
    mute(&tap.name)?;
    bring_up(socket, tap, interface.mtu)?;
    for index in [tap.index, interface.index] {
        let qdisc = Request::new(
            kind::NEWQDISC,
            flag::CREATE | flag::EXCL,
            &control(index, INGRESS, PARENT_INGRESS, 0),
        );
        socket.change(qdisc.with(TCA_KIND, b"ingress\0"))?;
    }
    if guarded {
        for guard in guards(tap.index) {
            socket.change(guard)?;
        }
    }
    let all = &[Key::default()];
    socket.change(filter(tap.index, 9, ETH_P_ALL, all, Some(interface.index)))?;
    socket.change(filter(interface.index, 9, ETH_P_ALL, all, Some(tap.index)))
}

/// Nothing of the namespace's own comes from this interface, or takes what nobody else did. One that isn't there is fine.
pub fn mute(name: &str) -> io::Result<()> {
    for (key, value) in [
        (format!("ipv4/conf/{name}/forwarding"), "0"),
        (format!("ipv6/conf/{name}/disable_ipv6"), "1"),
    ] {
        // A kernel may have no IPv6.
        crate::files::gone_is_fine(std::fs::write(format!("/proc/sys/net/{key}"), value))?;
    }
    Ok(())
}

/// Brings a tap up.
pub fn bring_up(socket: &Socket, tap: &Interface, mtu: u32) -> io::Result<()> {
    let flags = IFF_UP | IFF_NOARP;
    let up = Request::new(kind::NEWLINK, 0, &link(tap.index, flags, flags));
    socket.change(up.with(IFLA_MTU, &mtu.to_ne_bytes()))
}

/// Filters that keep packets from being redirected: without that they end here. Tagged frames would pass the others.
fn guards(tap: u32) -> Vec<Request> {
    let (network, prefix) = METADATA_V4;
    let key = Key {
        mask: u32::MAX << (32 - prefix),
        value: network.to_bits(),
        offset: IPV4_DESTINATION,
    };
    let mut all = vec![
        filter(tap, 1, ETH_P_8021Q, &[Key::default()], None),
        filter(tap, 2, ETH_P_8021AD, &[Key::default()], None),
        filter(tap, 3, ETH_P_IP, &[key], None),
    ];
    for (ip, priority) in METADATA_V6.iter().zip(4..) {
        let words = ip.octets();
        let keys = [0, 1, 2, 3].map(|word| Key {
            mask: u32::MAX,
            value: u32::from_be_bytes([0, 1, 2, 3].map(|byte| words[word * 4 + byte])),
            offset: IPV6_DESTINATION + word as i32 * 4,
        });
        all.push(filter(tap, priority, ETH_P_IPV6, &keys, None));
    }
    all
}

/// struct tcmsg
fn control(index: u32, handle: u32, parent: u32, info: u32) -> [u8; 20] {
    let mut fixed = [0; 20];
    for (at, word) in [index, handle, parent, info].into_iter().enumerate() {
        fixed[4 + at * 4..8 + at * 4].copy_from_slice(&word.to_ne_bytes());
    }
    fixed
}

/// A word of a packet that must have a value; by default any packet's will do.
#[derive(Debug, Clone, Copy, Default)]
struct Key {
    mask: u32,
    value: u32,
    /// From the network header on.
    offset: i32,
}

/// A filter for what comes in from interface `index`: what has all of `keys` goes to `redirect`, or nowhere.
fn filter(
    index: u32,
    priority: u16,
    protocol: u16,
    keys: &[Key],
    redirect: Option<u32>,
) -> Request {
    let info = u32::from(priority) << 16 | u32::from(protocol.to_be());
    // struct tc_u32_sel
    let mut selector = vec![TC_U32_TERMINAL, 0, keys.len() as u8, 0];
    selector.resize(16, 0);
    for key in keys {
        selector.extend_from_slice(&key.mask.to_be_bytes());
        selector.extend_from_slice(&key.value.to_be_bytes());
        selector.extend_from_slice(&key.offset.to_ne_bytes());
        selector.extend_from_slice(&[0; 4]);
    }
    let mut options = Vec::new();
    attribute(&mut options, TCA_U32_SEL, &selector);
    if let Some(target) = redirect {
        // struct tc_mirred
        let mut mirred = [0; 28];
        mirred[8..12].copy_from_slice(&TC_ACT_STOLEN.to_ne_bytes());
        mirred[20..24].copy_from_slice(&EGRESS_REDIRECT.to_ne_bytes());
        mirred[24..].copy_from_slice(&target.to_ne_bytes());
        let (mut parameters, mut action, mut actions) = (Vec::new(), Vec::new(), Vec::new());
        attribute(&mut parameters, TCA_MIRRED_PARMS, &mirred);
        attribute(&mut action, TCA_ACT_KIND, b"mirred\0");
        attribute(&mut action, TCA_ACT_OPTIONS, &parameters);
        // Actions are numbered from 1.
        attribute(&mut actions, 1, &action);
        attribute(&mut options, TCA_U32_ACT, &actions);
    }
    let fixed = control(index, 0, INGRESS, info);
    Request::new(kind::NEWTFILTER, flag::CREATE | flag::EXCL, &fixed)
        .with(TCA_KIND, b"u32\0")
        .with(TCA_OPTIONS, &options)
}
