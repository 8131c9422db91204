//! The loopback of a pod's network namespace: who connects to a port there means the guest's.
//!
//! containerd's port-forward does so (it dials `localhost` in the namespace), and nobody else has business there: the pod's
//! processes are in the guest. One listener for each family takes the connections to all ports, which the kernel's packet filter
//! leads to it.

use super::egress;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
use std::os::fd::AsFd;

/// Listens, in the calling thread's network namespace, to all ports of the loopback: IPv4's, and IPv6's if there is one.
pub fn listen() -> io::Result<Vec<TcpListener>> {
    let four = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let six = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).ok();
    for (program, is_four) in egress::programs() {
        let (listener, network) = match is_four {
            true => (Some(&four), "127.0.0.0/8"),
            false => (six.as_ref(), "::1/128"),
        };
        if let Some(listener) = listener {
            let port = listener.local_addr()?.port();
            egress::restore(program, &["--noflush"], &rules(network, port))?;
        }
    }
    Ok([Some(four), six].into_iter().flatten().collect())
}

/// In iptables-restore's format.
fn rules(network: &str, port: u16) -> String {
    format!("*nat\n-A OUTPUT -o lo -d {network} -p tcp -j REDIRECT --to-ports {port}\nCOMMIT\n")
}

/// The port that a connection was meant for.
pub fn meant_port(connection: impl AsFd) -> io::Result<u16> {
    use rustix::net::sockopt::{ip_original_dst, ipv6_original_dst};
    let four = ip_original_dst(&connection).map(|address| address.port());
    Ok(four.or_else(|_| ipv6_original_dst(&connection).map(|address| address.port()))?)
}
