//! What `ps`, `inspect` and `port` show of a container's networks.

use super::args::PortArgs;
use super::{containers, output};
use crate::network::cni::Outcome;
use crate::network::wish::{self, Port, Wish};
use crate::network::{self, NETNS};
use crate::settings::Settings;
use crate::state::Container;
use anyhow::bail;
use serde_json::{Value, json};
use std::net::IpAddr;

fn wish_of(container: &Container) -> Wish {
    let wish = Wish::read(&container.dir);
    wish.ok().flatten().unwrap_or_default()
}

fn host_ip(port: &Port) -> IpAddr {
    port.host_ip.unwrap_or(IpAddr::from([0, 0, 0, 0]))
}

fn shown_host(port: &Port) -> String {
    std::net::SocketAddr::new(host_ip(port), port.host_port).to_string()
}

/// As `ps` shows it: published ports of a container that runs.
pub(super) fn ports(container: &Container) -> String {
    if !container.status.state.is_alive() {
        return String::new();
    }
    let ports = wish_of(container).ports;
    let shown = ports
        .iter()
        .map(|p| format!("{}->{}/{}", shown_host(p), p.container_port, p.protocol));
    shown.collect::<Vec<_>>().join(", ")
}

/// Docker's map from a port of the container to those of the host.
fn bindings(ports: &[Port]) -> Value {
    let mut map = json!({});
    for port in ports {
        let key = format!("{}/{}", port.container_port, port.protocol);
        if map[&key].is_null() {
            map[&key] = json!([]);
        }
        let binding = json!({
            "HostIp": host_ip(port).to_string(),
            "HostPort": port.host_port.to_string(),
        });
        if let Some(list) = map[&key].as_array_mut() {
            list.push(binding);
        }
    }
    map
}

/// `NetworkSettings`, and what of `HostConfig` has to do with them.
pub(super) fn settings(container: &Container) -> (Value, Value) {
    let wish = wish_of(container);
    let alive = container.status.state.is_alive();
    let mut networks = json!({});
    for (number, attachment) in wish.attachments.iter().enumerate() {
        let result = network::result(&container.dir, &wish::interface(number));
        let outcome = result.and_then(|result| serde_json::from_value(result).ok());
        let outcome: Outcome = outcome.unwrap_or_default();
        let find = |four: bool| {
            let parsed = outcome
                .ips
                .iter()
                .filter_map(|ip| Some((ip.parts()?, ip.gateway)));
            parsed.into_iter().find(|((ip, _), _)| ip.is_ipv4() == four)
        };
        let text = |value: Option<IpAddr>| value.map(|ip| ip.to_string()).unwrap_or_default();
        let (four, six) = (find(true), find(false));
        networks[&attachment.network] = json!({
            "Aliases": attachment.aliases,
            "MacAddress": attachment.mac,
            "IPAddress": text(four.map(|((ip, _), _)| ip)),
            "IPPrefixLen": four.map_or(0, |((_, prefix), _)| prefix),
            "Gateway": text(four.and_then(|(_, gateway)| gateway)),
            "GlobalIPv6Address": text(six.map(|((ip, _), _)| ip)),
            "GlobalIPv6PrefixLen": six.map_or(0, |((_, prefix), _)| prefix),
            "IPv6Gateway": text(six.and_then(|(_, gateway)| gateway)),
        });
    }
    let first = wish.attachments.first();
    let of_first = |key: &str| match first {
        Some(first) => networks[&first.network][key].clone(),
        None => json!(""),
    };
    let key = match wish.attachments.is_empty() {
        true => String::new(),
        false => container.dir.join(NETNS).display().to_string(),
    };
    let settings = json!({
        "SandboxKey": key,
        "Ports": if alive { bindings(&wish.ports) } else { json!({}) },
        "IPAddress": of_first("IPAddress"),
        "IPPrefixLen": if first.is_some() { of_first("IPPrefixLen") } else { json!(0) },
        "Gateway": of_first("Gateway"),
        "MacAddress": of_first("MacAddress"),
        "GlobalIPv6Address": of_first("GlobalIPv6Address"),
        "Networks": networks,
    });
    let host = json!({
        "NetworkMode": first.map_or("none", |first| &first.network),
        "PortBindings": bindings(&wish.ports),
    });
    (settings, host)
}

/// `casemate port`
pub(super) fn port(settings: &Settings, args: &PortArgs) -> anyhow::Result<()> {
    let container = containers::state(settings)?.find(&args.container)?;
    let mut ports = wish_of(&container).ports;
    if !container.status.state.is_alive() {
        ports.clear();
    }
    let mut text = String::new();
    let Some(wanted) = &args.port else {
        for port in &ports {
            let (inside, protocol) = (port.container_port, &port.protocol);
            text.push_str(&format!("{inside}/{protocol} -> {}\n", shown_host(port)));
        }
        return output::write(&text);
    };
    let (number, protocol) = wanted.split_once('/').unwrap_or((wanted, "tcp"));
    for port in &ports {
        if port.container_port.to_string() == number && port.protocol == protocol {
            text.push_str(&format!("{}\n", shown_host(port)));
        }
    }
    if text.is_empty() {
        bail!(
            "no public port {number}/{protocol} is published for {}",
            args.container
        );
    }
    output::write(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bindings_have_dockers_shape() {
        let port = |host_port, host_ip: Option<&str>| Port {
            host_port,
            container_port: 80,
            protocol: "tcp".into(),
            host_ip: host_ip.map(|ip| ip.parse().unwrap()),
        };
        let shown = bindings(&[port(8080, None), port(8081, Some("::1"))]);
        let expected = json!({"80/tcp": [
            {"HostIp": "0.0.0.0", "HostPort": "8080"},
            {"HostIp": "::1", "HostPort": "8081"},
        ]});
        assert_eq!(shown, expected);
        assert_eq!(shown_host(&port(1, Some("::1"))), "[::1]:1");
    }
}
