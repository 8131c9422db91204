//! `--publish` and `--expose`: ports of the container that the host has too.

use crate::network::wish::Port;
use anyhow::{Context, bail};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};

/// Of one container: a rule of the host for each.
const MAX_PORTS: usize = 1024;

/// A port or a range of them, from first to last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    first: u16,
    last: u16,
}

impl Range {
    fn parse(text: &str) -> Option<Self> {
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            text.parse::<u16>().ok().filter(|n| digits && *n > 0)
        };
        let (first, last) = match text.split_once('-') {
            Some((first, last)) => (number(first)?, number(last)?),
            None => (number(text)?, number(text)?),
        };
        (first <= last).then_some(Self { first, last })
    }

    fn len(self) -> usize {
        usize::from(self.last - self.first) + 1
    }
}

/// Port and protocol of `80`, `80-90/udp`.
fn container_ports(text: &str) -> Option<(Range, String)> {
    let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = protocol.to_ascii_lowercase();
    let known = ["tcp", "udp"].contains(&protocol.as_str());
    Some((Range::parse(ports)?, protocol)).filter(|_| known)
}

/// `[[HOSTIP:][HOSTPORT]:]PORT[/PROTOCOL]`: the host's address and ports, if they are given, and the container's.
fn split(text: &str) -> Option<(Option<IpAddr>, Option<Range>, Range, String)> {
    let (host, container) = match text.rsplit_once(':') {
        None => (None, text),
        Some((host, container)) => (Some(host), container),
    };
    let (range, protocol) = container_ports(container)?;
    let Some(host) = host else {
        return Some((None, None, range, protocol));
    };
    let (ip, ports) = match host.rsplit_once(':') {
        None => (None, host),
        Some((ip, ports)) => {
            let bare = ip.strip_prefix('[').and_then(|ip| ip.strip_suffix(']'));
            let ip: Option<IpAddr> = match bare {
                Some(ip) => ip.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
                None => ip.parse::<std::net::Ipv4Addr>().ok().map(IpAddr::V4),
            };
            (Some(ip?), ports)
        }
    };
    let ports = match ports.is_empty() {
        true => None,
        false => Some(Range::parse(ports)?),
    };
    Some((ip, ports, range, protocol))
}

/// The ports that one `--publish` means; those that the host shall choose are chosen.
pub(super) fn parse(text: &str) -> anyhow::Result<Vec<Port>> {
    let split = split(text).with_context(|| {
        format!("--publish: {text:?} is not like [[ADDRESS:]HOSTPORT:]PORT[/tcp|udp]")
    })?;
    let (host_ip, host, container, protocol) = split;
    // A single port may be any of a range of the host's; we take the first.
    if let Some(host) = host
        && host.len() != container.len()
    {
        bail!(
            "--publish: {text}: {} ports of the host for {} of the container",
            host.len(),
            container.len()
        );
    }
    let ports = container.first..=container.last;
    ports
        .zip(0u16..)
        .map(|(container_port, nth)| {
            Ok(Port {
                host_port: match host {
                    Some(host) => host.first + nth,
                    None => free(&protocol, host_ip)?,
                },
                container_port,
                protocol: protocol.clone(),
                host_ip,
            })
        })
        .collect()
}

/// All that is published, each port of the host once.
pub(super) fn all(given: &[String]) -> anyhow::Result<Vec<Port>> {
    let mut ports: Vec<Port> = Vec::new();
    for text in given {
        for port in parse(text)? {
            add(&mut ports, port)?;
        }
    }
    Ok(ports)
}

/// Adds a port unless another one of the container has it.
pub(super) fn add(ports: &mut Vec<Port>, port: Port) -> anyhow::Result<()> {
    let clash = ports.iter().any(|p| {
        let everywhere = |ip: Option<IpAddr>| ip.is_none_or(|ip| ip.is_unspecified());
        (p.host_port, &p.protocol) == (port.host_port, &port.protocol)
            && (p.host_ip == port.host_ip || everywhere(p.host_ip) || everywhere(port.host_ip))
    });
    if clash {
        bail!(
            "--publish: port {} of the host is given twice",
            port.host_port
        );
    }
    if ports.len() == MAX_PORTS {
        bail!("--publish: at most {MAX_PORTS} ports are possible");
    }
    ports.push(port);
    Ok(())
}

/// `--expose`: the container's ports that `--publish-all` publishes.
pub(super) fn exposed(text: &str) -> anyhow::Result<Vec<(u16, String)>> {
    let (range, protocol) = container_ports(text)
        .with_context(|| format!("--expose: {text:?} is not like 80, 80-90 or 53/udp"))?;
    let ports = range.first..=range.last;
    Ok(ports.map(|port| (port, protocol.clone())).collect())
}

/// A port that nothing has now.
pub(super) fn free(protocol: &str, ip: Option<IpAddr>) -> anyhow::Result<u16> {
    let any = SocketAddr::new(ip.unwrap_or(IpAddr::from([0, 0, 0, 0])), 0);
    let address = match protocol {
        "udp" => UdpSocket::bind(any).and_then(|s| s.local_addr()),
        _ => TcpListener::bind(any).and_then(|s| s.local_addr()),
    };
    let address = address.with_context(|| format!("--publish: no port is free at {}", any.ip()))?;
    Ok(address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Port {
        let mut ports = parse(text).unwrap();
        assert_eq!(ports.len(), 1);
        ports.remove(0)
    }

    #[test]
    fn parse_understands_what_docker_does() {
        let port = one("8080:80");
        assert_eq!(
            (port.host_port, port.container_port, port.host_ip),
            (8080, 80, None)
        );
        assert_eq!(one("127.0.0.1:53:5353/udp").protocol, "udp");
        assert_eq!(one("[::1]:8080:80").host_ip, Some("::1".parse().unwrap()));
        assert!(one("80").host_port > 0);
        assert!(one("127.0.0.1::80/TCP").host_port > 0);
        let range = parse("8000-8002:9000-9002").unwrap();
        let pairs: Vec<_> = range
            .iter()
            .map(|p| (p.host_port, p.container_port))
            .collect();
        assert_eq!(pairs, [(8000, 9000), (8001, 9001), (8002, 9002)]);
    }

    #[test]
    fn parse_of_nonsense_is_refused() {
        for text in [
            "",
            ":",
            "80:",
            "0:80",
            "80:0",
            "80:65536",
            "a:80",
            "80:80/sctp",
            "1.2.3:80:80",
            "::1:80:80",
            "8000-8002:80",
            "90-80:90-80",
            "+80:80",
            "1.2.3.4:80:80:80",
            "80-:80",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn all_with_a_port_given_twice_is_refused() {
        let given = |list: &[&str]| all(&list.iter().map(|s| s.to_string()).collect::<Vec<_>>());
        assert_eq!(given(&["80:80", "80:80/udp"]).unwrap().len(), 2);
        assert_eq!(
            given(&["127.0.0.1:80:80", "127.0.0.2:80:80"])
                .unwrap()
                .len(),
            2
        );
        assert!(given(&["80:80", "127.0.0.1:80:81"]).is_err());
        assert!(given(&["1-2000:1-2000"]).is_err());
    }

    #[test]
    fn exposed_are_ports_of_the_container() {
        assert_eq!(
            exposed("80-81/udp").unwrap(),
            [(80, "udp".into()), (81, "udp".into())]
        );
        assert!(exposed("8080:80").is_err());
    }

    proptest::proptest! {
        #[test]
        fn split_of_anything_never_panics(text in "[0-9a-z:./\\[\\]-]{0,40}") {
            let _ = split(&text);
        }

        #[test]
        fn split_of_what_was_written_is_the_same(ip: [u8; 4], host in 1u16.., container in 1u16..) {
            let ip = IpAddr::from(ip);
            let (parsed, ports, range, protocol) = split(&format!("{ip}:{host}:{container}/udp")).unwrap();
            assert_eq!((parsed, ports.unwrap().first, range.first), (Some(ip), host, container));
            assert_eq!(protocol, "udp");
        }
    }
}
