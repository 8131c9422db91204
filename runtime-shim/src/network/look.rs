//! What is in a network namespace: interfaces with their addresses, routes and neighbours.

use casemate_protocol::agent as proto;
use casemate_protocol::netlink::{INET, INET6, Request, Socket, attributes, kind, link};
use std::io;

// linux/if_link.h, if_addr.h, rtnetlink.h, neighbour.h
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_KERNEL: u8 = 2;
const RTN_UNICAST: u8 = 1;
const RT_SCOPE_LINK: u8 = 253;
const RTNH_F_ONLINK: u32 = 4;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;
const IFF_LOOPBACK: u32 = 8;

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its address.
    pub mac: [u8; 6],
    /// Its MTU.
    pub mtu: u32,
}

/// Everything in a namespace but its loopback interface.
#[derive(Debug, Default)]
pub struct Seen {
    /// The interfaces that have a MAC address.
    pub interfaces: Vec<Interface>,
    addresses: Vec<(u32, proto::Address)>,
    routes: Vec<(u32, proto::Route)>,
    neighbours: Vec<(u32, proto::Neighbour)>,
}

fn u32_of(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn value(attributes_of: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(attributes_of)
        .find(|(kind, _)| *kind == wanted)
        .map(|(_, value)| value)
}

impl Seen {
    /// Looks around in the calling thread's namespace.
    pub fn here(socket: &Socket) -> io::Result<Self> {
        let list = |kind, fixed: &[u8]| socket.list(Request::new(kind, 0, fixed));
        let mut seen = Self::default();
        for (_, body) in list(kind::GETLINK, &link(0, 0, 0))? {
            seen.interfaces.extend(interface(&body));
        }
        for (_, body) in list(kind::GETADDR, &[0; 8])? {
            seen.addresses.extend(address(&body));
        }
        for family in [INET, INET6] {
            let mut fixed = [0; 12];
            fixed[0] = family;
            for (_, body) in list(kind::GETROUTE, &fixed)? {
                seen.routes.extend(route(&body));
            }
        }
        for (_, body) in list(kind::GETNEIGH, &[0; 12])? {
            seen.neighbours.extend(neighbour(&body));
        }
        Ok(seen)
    }

    /// The interface of that name.
    pub fn interface(&self, name: &str) -> Option<&Interface> {
        self.interfaces.iter().find(|i| i.name == name)
    }

    /// Tells the guest of an interface: the device that stands for it has the address `device_mac`.
    pub fn tell(
        &self,
        interface: &Interface,
        device_mac: [u8; 6],
        request: &mut proto::NetworkRequest,
    ) {
        let of = |index: &u32| *index == interface.index;
        let mac = match interface.mac == device_mac {
            true => Vec::new(),
            false => interface.mac.to_vec(),
        };
        request.interfaces.push(proto::Interface {
            device_mac: device_mac.to_vec(),
            name: interface.name.clone(),
            mac,
            mtu: interface.mtu,
            addresses: self
                .addresses
                .iter()
                .filter(|(index, _)| of(index))
                .map(|(_, address)| address.clone())
                .collect(),
            ..Default::default()
        });
        let routes = self.routes.iter().filter(|(index, _)| of(index));
        request.routes.extend(routes.map(|(_, route)| proto::Route {
            interface: interface.name.clone(),
            ..route.clone()
        }));
        let neighbours = self.neighbours.iter().filter(|(index, _)| of(index));
        request
            .neighbours
            .extend(neighbours.map(|(_, neighbour)| proto::Neighbour {
                interface: interface.name.clone(),
                ..neighbour.clone()
            }));
    }
}

/// From what follows the header of a RTM_NEWLINK.
fn interface(body: &[u8]) -> Option<Interface> {
    let fixed = body.get(..16)?;
    if u32_of(&fixed[8..12])? & IFF_LOOPBACK != 0 {
        return None;
    }
    let name = value(&body[16..], IFLA_IFNAME)?;
    let name = name.strip_suffix(b"\0").unwrap_or(name);
    Some(Interface {
        index: u32_of(&fixed[4..8])?,
        name: std::str::from_utf8(name).ok()?.to_owned(),
        mac: value(&body[16..], IFLA_ADDRESS)?.try_into().ok()?,
        mtu: value(&body[16..], IFLA_MTU).and_then(u32_of)?,
    })
}

/// From a RTM_NEWADDR. Link-local IPv6 addresses are the kernel's own matter, in the guest too.
fn address(body: &[u8]) -> Option<(u32, proto::Address)> {
    const SCOPE_UNIVERSE: u8 = 0;
    let fixed = body.get(..8)?;
    let attributes = &body[8..];
    let ip = value(attributes, IFA_LOCAL).or_else(|| value(attributes, IFA_ADDRESS))?;
    if fixed[0] == INET6 && fixed[3] != SCOPE_UNIVERSE {
        return None;
    }
    let address = proto::Address {
        ip: ip.to_vec(),
        prefix: fixed[1].into(),
        ..Default::default()
    };
    Some((u32_of(&fixed[4..8])?, address))
}

/// From a RTM_NEWROUTE: those of the main table that the kernel doesn't make by itself.
fn route(body: &[u8]) -> Option<(u32, proto::Route)> {
    let fixed = body.get(..12)?;
    let attributes = &body[12..];
    let [family, prefix, _, _, table, protocol, scope, kind] = *fixed.first_chunk()?;
    if table != RT_TABLE_MAIN || protocol == RTPROT_KERNEL || kind != RTN_UNICAST {
        return None;
    }
    let bytes = |kind| value(attributes, kind).unwrap_or_default().to_vec();
    let any = vec![0; if family == INET { 4 } else { 16 }];
    let gateway = bytes(RTA_GATEWAY);
    let route = proto::Route {
        destination: value(attributes, RTA_DST).map_or(any, <[u8]>::to_vec),
        prefix: prefix.into(),
        // For IPv6 the kernel tells no scope.
        scope: match (family, gateway.is_empty()) {
            (INET, _) => scope.into(),
            (_, true) => RT_SCOPE_LINK.into(),
            (_, false) => 0,
        },
        gateway,
        metric: value(attributes, RTA_PRIORITY)
            .and_then(u32_of)
            .unwrap_or(0),
        source: bytes(RTA_PREFSRC),
        onlink: u32_of(&fixed[8..12])? & RTNH_F_ONLINK != 0,
        ..Default::default()
    };
    Some((value(attributes, RTA_OIF).and_then(u32_of)?, route))
}

/// From a RTM_NEWNEIGH: those that somebody set for good.
fn neighbour(body: &[u8]) -> Option<(u32, proto::Neighbour)> {
    let fixed = body.get(..12)?;
    let state = u16::from_ne_bytes(fixed[8..10].try_into().ok()?);
    if state & NUD_PERMANENT == 0 || ![INET, INET6].contains(&fixed[0]) {
        return None;
    }
    let neighbour = proto::Neighbour {
        ip: value(&body[12..], NDA_DST)?.to_vec(),
        mac: value(&body[12..], NDA_LLADDR)?.to_vec(),
        ..Default::default()
    };
    Some((u32_of(&fixed[4..8])?, neighbour))
}

#[cfg(test)]
mod tests {
    use super::*;
    use casemate_protocol::netlink::attribute;

    fn message(fixed: &[u8], all: &[(u16, &[u8])]) -> Vec<u8> {
        let mut bytes = fixed.to_vec();
        for (kind, value) in all {
            attribute(&mut bytes, *kind, value);
        }
        bytes
    }

    #[test]
    fn interface_is_told_apart_from_the_loopback() {
        let attributes: [(u16, &[u8]); 3] = [
            (IFLA_IFNAME, b"eth0\0"),
            (IFLA_ADDRESS, &[2, 0, 0, 0, 0, 1]),
            (IFLA_MTU, &1450u32.to_ne_bytes()),
        ];
        let seen = interface(&message(&link(7, 1, 0), &attributes)).unwrap();
        assert_eq!((seen.index, seen.mtu, &*seen.name), (7, 1450, "eth0"));
        assert_eq!(
            interface(&message(&link(1, IFF_LOOPBACK, 0), &attributes)),
            None
        );
    }

    #[test]
    fn route_of_the_kernel_is_left_to_the_kernel() {
        let oif = 3u32.to_ne_bytes();
        let gateway: (u16, &[u8]) = (RTA_GATEWAY, &[10, 0, 0, 1]);
        let mut fixed = [INET, 0, 0, 0, RT_TABLE_MAIN, 3, 0, RTN_UNICAST, 0, 0, 0, 0];
        let (index, seen) = route(&message(&fixed, &[(RTA_OIF, &oif), gateway])).unwrap();
        assert_eq!((index, seen.destination, seen.prefix), (3, vec![0; 4], 0));
        assert_eq!(seen.gateway, [10, 0, 0, 1]);
        fixed[5] = RTPROT_KERNEL;
        assert!(route(&message(&fixed, &[(RTA_OIF, &oif)])).is_none());
    }

    proptest::proptest! {
        #[test]
        fn messages_of_anything_never_panic(body in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..96)) {
            let _ = (interface(&body), address(&body), route(&body), neighbour(&body));
        }
    }
}
