//! The guest's network: interfaces, addresses, routes and neighbours as the host says.
//!
//! Containers without a network namespace of their own share it.

use casemate_protocol::agent;
use casemate_protocol::netlink::{INET, INET6, Request, Socket, attributes, flag, kind, link};

use crate::error::{Attempt, Error, Result};

/// More than any pod has.
const MAX_INTERFACES: usize = 16;
const MAX_ADDRESSES: usize = 64;
const MAX_ROUTES: usize = 1024;
/// Room for a name, without its NUL (IFNAMSIZ).
const MAX_NAME: usize = 15;

// linux/if_link.h, if_addr.h, rtnetlink.h, neighbour.h
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
/// Usable at once: the host has seen to it that nobody else has the address.
const IFA_F_NODAD: u8 = 0x02;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_STATIC: u8 = 4;
const RTN_UNICAST: u8 = 1;
const RTNH_F_ONLINK: u32 = 4;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;
const IFF_UP: u32 = 1;
/// Where struct ifinfomsg ends.
const LINK_FIXED: usize = 16;

/// Sets all of it up.
pub(crate) fn set(request: &agent::NetworkRequest) -> Result<()> {
    bounded("interfaces", request.interfaces.len(), MAX_INTERFACES)?;
    bounded("routes", request.routes.len(), MAX_ROUTES)?;
    bounded("neighbours", request.neighbours.len(), MAX_ROUTES)?;
    let socket = Socket::open().attempt(|| "talk to the kernel about the network".into())?;
    let links = links(&socket)?;
    let mut named = Vec::new();
    for interface in &request.interfaces {
        let found = links.iter().find(|(_, mac)| *mac == interface.device_mac);
        let Some((index, _)) = found else {
            return Err(Error::invalid(format!(
                "no network device has the address {:02x?}",
                interface.device_mac
            )));
        };
        set_link(&socket, *index, interface)?;
        named.push((interface.name.as_str(), *index));
    }
    let index = |name: &str| {
        let found = named.iter().find(|(named, _)| *named == name);
        found.map(|(_, index)| *index).ok_or_else(|| {
            Error::invalid(format!("there is no interface {name:?} among those given"))
        })
    };
    for neighbour in &request.neighbours {
        add_neighbour(&socket, index(&neighbour.interface)?, neighbour)?;
    }
    // Gateways must be within reach before the routes by way of them.
    let (direct, by_gateway): (Vec<_>, Vec<_>) =
        request.routes.iter().partition(|r| r.gateway.is_empty());
    for route in direct.into_iter().chain(by_gateway) {
        add_route(&socket, index(&route.interface)?, route)?;
    }
    Ok(())
}

fn bounded(what: &str, number: usize, most: usize) -> Result<()> {
    match number <= most {
        true => Ok(()),
        false => Err(Error::invalid(format!(
            "{number} {what}: at most {most} are possible"
        ))),
    }
}

/// Index and address of each link.
fn links(socket: &Socket) -> Result<Vec<(u32, Vec<u8>)>> {
    let all = socket
        .list(Request::new(kind::GETLINK, 0, &link(0, 0, 0)))
        .attempt(|| "list the network devices".into())?;
    let of = |body: &[u8]| {
        let index = u32::from_ne_bytes(body.get(4..8)?.try_into().ok()?);
        let mut attributes = attributes(body.get(LINK_FIXED..)?);
        let mac = attributes.find(|(kind, _)| *kind == IFLA_ADDRESS)?.1;
        Some((index, mac.to_vec()))
    };
    Ok(all.iter().filter_map(|(_, body)| of(body)).collect())
}

fn set_link(socket: &Socket, index: u32, interface: &agent::Interface) -> Result<()> {
    let name = &interface.name;
    let fits = (1..=MAX_NAME).contains(&name.len());
    if !fits || !name.bytes().all(|b| b.is_ascii_graphic() && b != b'/') {
        return Err(Error::invalid(format!("{name:?} is no interface's name")));
    }
    bounded(
        "addresses of an interface",
        interface.addresses.len(),
        MAX_ADDRESSES,
    )?;
    let mut request = Request::new(kind::NEWLINK, 0, &link(index, 0, 0))
        .with(IFLA_IFNAME, &[name.as_bytes(), b"\0"].concat());
    if !interface.mac.is_empty() {
        request = request.with(IFLA_ADDRESS, &interface.mac);
    }
    if interface.mtu != 0 {
        request = request.with(IFLA_MTU, &interface.mtu.to_ne_bytes());
    }
    socket
        .change(request)
        .attempt(|| format!("name interface {name}, MTU {}", interface.mtu))?;
    for address in &interface.addresses {
        add_address(socket, index, name, address)?;
    }
    let up = Request::new(kind::NEWLINK, 0, &link(index, IFF_UP, IFF_UP));
    socket
        .change(up)
        .attempt(|| format!("bring interface {name} up"))
}

/// The family of an address, by its length.
fn family(ip: &[u8], prefix: u32) -> Result<u8> {
    match (ip.len(), prefix) {
        (4, 0..=32) => Ok(INET),
        (16, 0..=128) => Ok(INET6),
        _ => Err(Error::invalid(format!(
            "{ip:?}/{prefix} is no address with a prefix"
        ))),
    }
}

fn add_address(socket: &Socket, index: u32, name: &str, address: &agent::Address) -> Result<()> {
    let (ip, prefix) = (&address.ip, address.prefix);
    let family = family(ip, prefix)?;
    // struct ifaddrmsg: family, prefix, flags, scope, index
    let mut fixed = [family, prefix as u8, 0, 0, 0, 0, 0, 0];
    fixed[2] = if family == INET6 { IFA_F_NODAD } else { 0 };
    fixed[4..].copy_from_slice(&index.to_ne_bytes());
    let mut request = Request::new(kind::NEWADDR, flag::CREATE | flag::REPLACE, &fixed)
        .with(IFA_LOCAL, ip)
        .with(IFA_ADDRESS, ip);
    if let (Ok(ip), 0..=30) = (<[u8; 4]>::try_from(ip.as_slice()), prefix) {
        let broadcast = u32::from_be_bytes(ip) | u32::MAX >> prefix;
        request = request.with(IFA_BROADCAST, &broadcast.to_be_bytes());
    }
    socket
        .change(request)
        .attempt(|| format!("give interface {name} the address {ip:?}/{prefix}"))
}

fn add_route(socket: &Socket, index: u32, route: &agent::Route) -> Result<()> {
    let ip = &route.destination;
    let family = family(ip, route.prefix)?;
    if route.scope > 255 {
        return Err(Error::invalid(format!("{} is no scope", route.scope)));
    }
    let flags = if route.onlink { RTNH_F_ONLINK } else { 0 };
    // struct rtmsg: family, destination's and source's prefix, tos, table, protocol, scope, type, flags
    let mut fixed = [0; 12];
    fixed[0] = family;
    fixed[1] = route.prefix as u8;
    fixed[4..8].copy_from_slice(&[RT_TABLE_MAIN, RTPROT_STATIC, route.scope as u8, RTN_UNICAST]);
    fixed[8..].copy_from_slice(&flags.to_ne_bytes());
    let mut request = Request::new(kind::NEWROUTE, flag::CREATE | flag::REPLACE, &fixed)
        .with(RTA_OIF, &index.to_ne_bytes());
    if route.prefix > 0 {
        request = request.with(RTA_DST, ip);
    }
    for (kind, ip) in [(RTA_GATEWAY, &route.gateway), (RTA_PREFSRC, &route.source)] {
        if !ip.is_empty() {
            request = request.with(kind, ip);
        }
    }
    if route.metric != 0 {
        request = request.with(RTA_PRIORITY, &route.metric.to_ne_bytes());
    }
    socket.change(request).attempt(|| {
        format!(
            "add the route to {ip:?}/{} by way of {:?} on {}",
            route.prefix, route.gateway, route.interface
        )
    })
}

fn add_neighbour(socket: &Socket, index: u32, neighbour: &agent::Neighbour) -> Result<()> {
    let ip = &neighbour.ip;
    // struct ndmsg: family, padding, index, state, flags, type
    let mut fixed = [0; 12];
    fixed[0] = family(ip, 0)?;
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    fixed[8..10].copy_from_slice(&NUD_PERMANENT.to_ne_bytes());
    let request = Request::new(kind::NEWNEIGH, flag::CREATE | flag::REPLACE, &fixed)
        .with(NDA_DST, ip)
        .with(NDA_LLADDR, &neighbour.mac);
    socket
        .change(request)
        .attempt(|| format!("add the neighbour {ip:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(name: &str) -> agent::Interface {
        agent::Interface {
            device_mac: vec![0; 6],
            name: name.into(),
            ..Default::default()
        }
    }

    #[test]
    fn set_of_too_much_or_nonsense_is_refused() {
        for request in [
            agent::NetworkRequest {
                interfaces: vec![interface("eth0"); 17],
                ..Default::default()
            },
            agent::NetworkRequest {
                routes: vec![agent::Route::default(); 1025],
                ..Default::default()
            },
            agent::NetworkRequest {
                interfaces: vec![agent::Interface {
                    device_mac: vec![2, 0xca, 5, 0xe, 0, 1],
                    ..interface("eth0")
                }],
                ..Default::default()
            },
            agent::NetworkRequest {
                routes: vec![agent::Route::default()],
                ..Default::default()
            },
        ] {
            let error = set(&request).unwrap_err();
            assert_eq!(error.kind, crate::error::Kind::Invalid, "{error}");
        }
    }

    #[test]
    fn family_goes_by_length_and_prefix() {
        assert_eq!(family(&[0; 4], 32).unwrap(), INET);
        assert_eq!(family(&[0; 16], 128).unwrap(), INET6);
        for (length, prefix) in [(4, 33), (16, 129), (0, 0), (5, 8)] {
            assert!(family(&vec![0; length], prefix).is_err());
        }
    }
}
