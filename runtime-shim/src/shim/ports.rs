//! Ports of the host that a container gets.

use crate::network::wish::Port;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

/// The first port that anybody may have.
const FIRST_FREE: &str = "/proc/sys/net/ipv4/ip_unprivileged_port_start";

/// A port can't be had.
#[derive(Debug, thiserror::Error)]
#[error("port {port} of the host can't be had{hint}")]
pub(super) struct PortError {
    /// With its address and protocol.
    port: String,
    /// What would help.
    hint: String,
    source: io::Error,
}

impl PortError {
    fn new(port: &Port, source: io::Error) -> Self {
        let ip = port.host_ip.unwrap_or(IpAddr::from([0; 4]));
        let address = SocketAddr::new(ip, port.host_port);
        let hint = match source.kind() {
            io::ErrorKind::PermissionDenied => {
                let first = std::fs::read_to_string(FIRST_FREE).unwrap_or_default();
                format!(
                    " by an ordinary user, whose first is {} (net.ipv4.ip_unprivileged_port_start)",
                    first.trim()
                )
            }
            _ => String::new(),
        };
        Self {
            port: format!("{address}/{}", port.protocol),
            hint,
            source,
        }
    }
}

/// Takes a port without serving it: plugins send on what comes for it, and wouldn't say that another container has it
/// already.
pub(super) fn keep(port: &Port) -> Result<OwnedFd, PortError> {
    let taken = match port.host_ip {
        Some(ip) => take(port, ip, false),
        // A host without IPv6 has the other one.
        None => match take(port, IpAddr::from([0; 16]), false) {
            Err(e) if e.kind() != io::ErrorKind::AddrInUse => {
                take(port, IpAddr::from([0; 4]), false)
            }
            taken => taken,
        },
    };
    taken.map_err(|source| PortError::new(port, source))
}

/// Whether passt, with IPv6 if `six`, can have a port: it says so less clearly, or doesn't notice that somebody has it
/// (UDP).
pub(super) fn can_be_had(port: &Port, six: bool) -> Result<(), PortError> {
    // As passt does it: connections of a container that has ended are in nobody's way.
    let all = if six { [0; 16].into() } else { [0; 4].into() };
    let ip = port.host_ip.unwrap_or(all);
    let taken = take(port, ip, port.protocol == "tcp");
    taken
        .map(drop)
        .map_err(|source| PortError::new(port, source))
}

fn take(port: &Port, ip: IpAddr, again: bool) -> io::Result<OwnedFd> {
    let (family, kind) = (
        if ip.is_ipv4() {
            AddressFamily::INET
        } else {
            AddressFamily::INET6
        },
        if port.protocol == "udp" {
            SocketType::DGRAM
        } else {
            SocketType::STREAM
        },
    );
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseaddr(&socket, again)?;
    if ip.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, port.host_ip.is_some())?;
    }
    bind(&socket, &SocketAddr::new(ip, port.host_port))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, UdpSocket};

    fn port(address: SocketAddr, protocol: &str) -> Port {
        Port {
            host_port: address.port(),
            container_port: 80,
            protocol: protocol.into(),
            host_ip: Some(address.ip()),
        }
    }

    #[test]
    fn port_that_somebody_has_is_told() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        for port in [
            port(tcp.local_addr().unwrap(), "tcp"),
            port(udp.local_addr().unwrap(), "udp"),
        ] {
            let text = can_be_had(&port, false).unwrap_err().to_string();
            let shown = format!("port 127.0.0.1:{}/{}", port.host_port, port.protocol);
            assert_eq!(text, format!("{shown} of the host can't be had"));
            keep(&port).unwrap_err();
        }
    }

    #[test]
    fn port_of_connections_that_ended_can_be_had() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = port(listener.local_addr().unwrap(), "tcp");
        let other = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        // Who closes first waits (TIME_WAIT).
        drop(listener.accept().unwrap());
        drop((listener, other));
        can_be_had(&port, false).unwrap();
    }

    #[test]
    fn port_that_needs_root_is_told_with_the_first_that_does_not() {
        let denied = io::ErrorKind::PermissionDenied.into();
        let port = port("10.0.0.1:80".parse().unwrap(), "tcp");
        let text = PortError::new(&port, denied).to_string();
        assert!(text.contains("10.0.0.1:80/tcp of the host can't be had by an ordinary user"));
    }
}
