//! `casemate network`: the networks that containers can be on.

use super::network_args::{
    NetworkCommand, NetworkCreateArgs, NetworkInspectArgs, NetworkLsArgs, NetworkPruneArgs,
    NetworkRmArgs,
};
use super::{containers, create, output};
use crate::network::networks::{self, DEFAULT, Network, NetworkError, Ours, Subnet, Wanted};
use crate::network::wish::{self, Wish};
use crate::network::{self, cni};
use crate::settings::Settings;
use crate::state::{Container, now_ns};
use crate::times;
use anyhow::{Context, bail};
use casemate_protocol::netlink::{Request, Socket, kind, link};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::net::IpAddr;
use std::path::PathBuf;

/// Room for an interface's name, without its NUL (IFNAMSIZ).
const MAX_INTERFACE: usize = 15;

/// Does one of them.
pub(super) fn run(settings: &Settings, command: &NetworkCommand) -> anyhow::Result<()> {
    match command {
        NetworkCommand::Create(args) => create(settings, args),
        NetworkCommand::Ls(args) => ls(settings, args),
        NetworkCommand::Rm(args) => rm(settings, args),
        NetworkCommand::Inspect(args) => inspect(settings, args),
        NetworkCommand::Prune(args) => prune(settings, args),
    }
}

fn dir(settings: &Settings) -> PathBuf {
    networks::dir_of(&settings.data_dir)
}

/// All networks, the default one too where it can be had.
fn all(settings: &Settings) -> anyhow::Result<Vec<Network>> {
    if rustix::process::geteuid().is_root() && cni::are_in(&settings.cni_dir()) {
        Network::load_or_default(&dir(settings), DEFAULT)?;
    }
    Ok(Network::all(&dir(settings))?)
}

/// The network of a name, an id or the beginning of one.
fn find(settings: &Settings, name: &str) -> anyhow::Result<Network> {
    match Network::load_or_default(&dir(settings), name) {
        Err(NetworkError::NotFound(_)) => {}
        loaded => return Ok(loaded?),
    }
    let mut fitting = all(settings)?
        .into_iter()
        .filter(|n| !name.is_empty() && n.ours.id.starts_with(name));
    match (fitting.next(), fitting.next()) {
        (Some(network), None) => Ok(network),
        (Some(_), Some(_)) => bail!("{name:?} is the beginning of more than one network's id"),
        (None, _) => Err(NetworkError::NotFound(name.to_owned()).into()),
    }
}

/// Containers that have the network, running or not, with what they want of it.
fn users(settings: &Settings, name: &str) -> anyhow::Result<Vec<(Container, usize)>> {
    let all = containers::state(settings)?.containers()?;
    let place = |container: &Container| {
        let wish = Wish::read(&container.dir).ok().flatten()?;
        wish.attachments.iter().position(|a| a.network == name)
    };
    Ok(all
        .into_iter()
        .filter_map(|c| place(&c).map(|number| (c, number)))
        .collect())
}

/// `NAME=VALUE` pairs, or names alone.
fn pairs(option: &str, given: &[String]) -> anyhow::Result<BTreeMap<String, String>> {
    let pair = |text: &String| {
        let (name, value) = text.split_once('=').unwrap_or((text, ""));
        if name.is_empty() {
            bail!("{option}: {text:?} has no name");
        }
        Ok((name.to_owned(), value.to_owned()))
    };
    given.iter().map(pair).collect()
}

/// An address with its prefix's length; bits behind the prefix must be zero.
fn cidr(option: &str, text: &str) -> anyhow::Result<(IpAddr, u8)> {
    let parsed = text
        .split_once('/')
        .and_then(|(ip, prefix)| Some((ip.parse().ok()?, prefix.parse().ok()?)));
    let Some((ip, prefix)) = parsed else {
        bail!("{option}: {text:?} is not like 10.1.2.0/24");
    };
    let (bits, most) = match ip {
        IpAddr::V4(ip) => (u128::from(ip.to_bits()) << 96, 32),
        IpAddr::V6(ip) => (ip.to_bits(), 128),
    };
    let behind = u128::MAX.checked_shr(u32::from(prefix)).unwrap_or(0);
    // An IPv4 address lies in the upper 32 bits.
    let behind = if most == 32 {
        behind >> 96 << 96
    } else {
        behind
    };
    if prefix > most || bits & behind != 0 {
        bail!("{option}: {text} is not a network: bits behind its prefix are set");
    }
    Ok((ip, prefix))
}

fn contains((network, prefix): (IpAddr, u8), ip: IpAddr) -> bool {
    match (network, ip) {
        (IpAddr::V4(a), IpAddr::V4(b)) => {
            let shift = 32 - u32::from(prefix.min(32));
            u64::from(a.to_bits()) >> shift == u64::from(b.to_bits()) >> shift
        }
        (IpAddr::V6(a), IpAddr::V6(b)) => {
            let shift = 128 - u32::from(prefix.min(128));
            let cut = |ip: std::net::Ipv6Addr| ip.to_bits().checked_shr(shift).unwrap_or(0);
            cut(a) == cut(b)
        }
        _ => false,
    }
}

/// The subnets that are asked for, each with its gateway and range.
fn subnets(args: &NetworkCreateArgs) -> anyhow::Result<Vec<Subnet>> {
    let mut all: Vec<Subnet> = Vec::new();
    for text in &args.subnet {
        let subnet = cidr("--subnet", text)?;
        let (most, family) = if subnet.0.is_ipv4() {
            (30, 4)
        } else {
            (126, 6)
        };
        if subnet.1 > most {
            bail!("--subnet: {text} has no room for containers");
        }
        if all
            .iter()
            .any(|s| s.subnet.0.is_ipv4() == subnet.0.is_ipv4())
        {
            bail!("--subnet: more than one for IPv{family}");
        }
        all.push(Subnet {
            subnet,
            gateway: None,
            range: None,
        });
    }
    for text in &args.gateway {
        let ip: IpAddr = text
            .parse()
            .with_context(|| format!("--gateway: {text:?} is not an address"))?;
        let subnet = all.iter_mut().find(|s| contains(s.subnet, ip));
        let subnet = subnet.with_context(|| format!("--gateway: {ip} is in no --subnet"))?;
        subnet.gateway = Some(ip);
    }
    for text in &args.ip_range {
        let range = cidr("--ip-range", text)?;
        let subnet = all
            .iter_mut()
            .find(|s| contains(s.subnet, range.0) && s.subnet.1 <= range.1);
        let subnet = subnet.with_context(|| format!("--ip-range: {text} is in no --subnet"))?;
        subnet.range = Some(range);
    }
    all.sort_by_key(|s| s.subnet.0.is_ipv6());
    Ok(all)
}

fn create(settings: &Settings, args: &NetworkCreateArgs) -> anyhow::Result<()> {
    if !networks::is_name(&args.name) || ["none", "host", "default"].contains(&&*args.name) {
        bail!(
            "{:?} can't be a network's name; it takes 1 to 64 of [a-zA-Z0-9_.-], a letter or digit first, and no name of Docker's own",
            args.name
        );
    }
    let subnets = subnets(args)?;
    let mut wanted = Wanted {
        name: args.name.clone(),
        ours: Ours {
            id: create::new_id()?,
            created: now_ns(),
            labels: pairs("--label", &args.labels)?,
            options: pairs("--opt", &args.options)?,
            internal: args.internal,
            ipv6: args.ipv6 || subnets.iter().any(|s| s.subnet.0.is_ipv6()),
        },
        subnets,
        ..Wanted::default()
    };
    for (name, value) in &wanted.ours.options {
        match name.as_str() {
            "mtu" | "com.docker.network.driver.mtu" => {
                let mtu = value.parse().ok().filter(|mtu| (68..=65_535).contains(mtu));
                wanted.mtu = Some(mtu.with_context(|| {
                    format!("--opt mtu: {value:?} is no number from 68 to 65535")
                })?);
            }
            "bridge" | "com.docker.network.bridge.name" => {
                let plain = |b: u8| b.is_ascii_alphanumeric() || b"_.-".contains(&b);
                if !(1..=MAX_INTERFACE).contains(&value.len()) || !value.bytes().all(plain) {
                    bail!("--opt bridge: {value:?} is no interface's name");
                }
                wanted.bridge = value.clone();
            }
            _ => bail!("--opt: {name:?} is neither mtu nor bridge"),
        }
    }
    let network = Network::create(&dir(settings), wanted)?;
    output::write(&format!("{}\n", network.ours.id))
}

fn row(network: &Network, no_trunc: bool) -> Value {
    let mut id = network.ours.id.clone();
    if !no_trunc {
        id.truncate(12);
    }
    let labels = &network.ours.labels;
    let labels: Vec<String> = labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
    json!({
        "ID": id,
        "Name": network.name,
        "Driver": network.driver(),
        "Scope": "local",
        "IPv6": network.ours.ipv6,
        "Internal": network.ours.internal,
        "Labels": labels.join(","),
        "CreatedAt": times::rfc3339(network.ours.created),
    })
}

fn ls(settings: &Settings, args: &NetworkLsArgs) -> anyhow::Result<()> {
    let none = json!({
        "ID": "", "Name": "none", "Driver": "null", "Scope": "local",
        "IPv6": false, "Internal": false, "Labels": "", "CreatedAt": "",
    });
    let networks = all(settings)?;
    let rows = networks.iter().map(|n| row(n, args.no_trunc));
    if args.quiet {
        let rows: Vec<Value> = rows.collect();
        return output::print(Some("{{.ID}}"), "NETWORK", &[], &rows);
    }
    let rows: Vec<Value> = rows.chain([none]).collect();
    let columns = ["ID", "Name", "Driver", "Scope"];
    output::print(args.format.format.as_deref(), "NETWORK", &columns, &rows)
}

/// Removes a network and its bridge.
fn remove(settings: &Settings, network: &Network) -> anyhow::Result<()> {
    let users = users(settings, &network.name)?;
    let running = users.iter().find(|(c, _)| c.status.state.is_alive());
    if let Some((container, _)) = running {
        bail!(
            "network {} is in use by container {}; stop it first",
            network.name,
            container.meta.name
        );
    }
    if let Some(bridge) = network.bridge() {
        remove_link(bridge).with_context(|| format!("can't remove the bridge {bridge}"))?;
    }
    Ok(network.remove(&dir(settings))?)
}

/// Removes a link of the host; one that is gone is fine.
fn remove_link(name: &str) -> std::io::Result<()> {
    const IFLA_IFNAME: u16 = 3;
    let name = [name.as_bytes(), b"\0"].concat();
    let request = Request::new(kind::DELLINK, 0, &link(0, 0, 0)).with(IFLA_IFNAME, &name);
    match Socket::open()?.change(request) {
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        done => done,
    }
}

fn rm(settings: &Settings, args: &NetworkRmArgs) -> anyhow::Result<()> {
    let mut failed = Vec::new();
    for name in &args.networks {
        let removed = find(settings, name).and_then(|network| {
            remove(settings, &network)?;
            output::write(&format!("{name}\n"))
        });
        match removed {
            Err(error) if args.force && is_missing(&error) => {}
            Err(error) => failed.push(format!("{error:#}")),
            Ok(()) => {}
        }
    }
    match failed.is_empty() {
        true => Ok(()),
        false => bail!("{}", failed.join("\n")),
    }
}

fn is_missing(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(NetworkError::NotFound(_)))
}

fn prune(settings: &Settings, args: &NetworkPruneArgs) -> anyhow::Result<()> {
    if !args.force {
        if !std::io::stdin().is_terminal() {
            bail!("there is no terminal to ask on; use --force");
        }
        eprint!("This removes all networks that no container is on. Go on? [y/N] ");
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer)?;
        if !matches!(answer.trim(), "y" | "Y" | "yes") {
            return Ok(());
        }
    }
    let mut text = String::new();
    for network in Network::all(&dir(settings))? {
        if network.name != DEFAULT && users(settings, &network.name)?.is_empty() {
            remove(settings, &network)?;
            text.push_str(&format!("Deleted: {}\n", network.name));
        }
    }
    output::write(&text)
}

/// What `inspect` shows of a network, in Docker's shape.
fn inspected(settings: &Settings, network: &Network) -> anyhow::Result<Value> {
    let ours = &network.ours;
    let mut containers = json!({});
    for (container, number) in users(settings, &network.name)? {
        let interface = wish::interface(number);
        let Some(result) = network::result(&container.dir, &interface) else {
            continue;
        };
        let outcome: cni::Outcome = serde_json::from_value(result).unwrap_or_default();
        let address = |four: bool| {
            let ips = outcome.ips.iter();
            let fitting = ips.filter(|ip| ip.parts().is_some_and(|(ip, _)| ip.is_ipv4() == four));
            fitting.map(|ip| ip.address.clone()).next()
        };
        let mac = Wish::read(&container.dir).ok().flatten();
        let mac = mac.and_then(|wish| Some(wish.attachments.get(number)?.mac));
        containers[&container.meta.id] = json!({
            "Name": container.meta.name,
            "MacAddress": mac,
            "IPv4Address": address(true).unwrap_or_default(),
            "IPv6Address": address(false).unwrap_or_default(),
        });
    }
    let subnets = network.subnets();
    let config: Vec<Value> = subnets
        .iter()
        .map(|(subnet, gateway)| json!({"Subnet": subnet, "Gateway": gateway}))
        .collect();
    Ok(json!({
        "Name": network.name,
        "Id": ours.id,
        "Created": times::rfc3339(ours.created),
        "Scope": "local",
        "Driver": network.driver(),
        "EnableIPv6": ours.ipv6,
        "IPAM": {"Driver": "default", "Options": {}, "Config": config},
        "Internal": ours.internal,
        "Containers": containers,
        "Options": ours.options,
        "Labels": ours.labels,
        "Bridge": network.bridge(),
    }))
}

fn inspect(settings: &Settings, args: &NetworkInspectArgs) -> anyhow::Result<()> {
    let (mut found, mut missing) = (Vec::new(), None);
    for name in &args.networks {
        match find(settings, name) {
            Ok(network) => found.push(inspected(settings, &network)?),
            Err(error) if is_missing(&error) => missing = missing.or(Some(error)),
            Err(error) => return Err(error),
        }
    }
    match args.format.format.as_deref() {
        None => output::write(&format!("{}\n", serde_json::to_string_pretty(&found)?))?,
        Some(format) => output::print(Some(format), "NETWORK", &[], &found)?,
    }
    missing.map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(subnet: &str, gateway: &str, range: &str) -> NetworkCreateArgs {
        let list = |text: &str| text.split_whitespace().map(str::to_owned).collect();
        NetworkCreateArgs {
            subnet: list(subnet),
            gateway: list(gateway),
            ip_range: list(range),
            ipv6: false,
            internal: false,
            driver: "bridge".into(),
            options: Vec::new(),
            labels: Vec::new(),
            name: "net".into(),
        }
    }

    #[test]
    fn subnets_get_the_gateways_and_ranges_within_them() {
        let both = args(
            "fd00:1::/64 10.1.2.0/24",
            "10.1.2.254 fd00:1::9",
            "10.1.2.128/25",
        );
        let all = subnets(&both).unwrap();
        assert_eq!(all[0].gateway, Some("10.1.2.254".parse().unwrap()));
        assert_eq!(all[0].range.unwrap().1, 25);
        assert_eq!(all[1].gateway, Some("fd00:1::9".parse().unwrap()));
    }

    #[test]
    fn subnets_that_make_no_sense_are_refused() {
        for (subnet, gateway, range) in [
            ("10.1.2.3/24", "", ""),
            ("10.1.2.0", "", ""),
            ("10.1.2.0/31", "", ""),
            ("10.0.0.0/33", "", ""),
            ("fd00::/129", "", ""),
            ("10.1.2.0/24 10.1.3.0/24", "", ""),
            ("10.1.2.0/24", "10.1.3.1", ""),
            ("10.1.2.0/24", "x", ""),
            ("10.1.2.0/24", "", "10.1.0.0/16"),
            ("", "10.1.2.1", ""),
        ] {
            assert!(
                subnets(&args(subnet, gateway, range)).is_err(),
                "{subnet} {gateway} {range}"
            );
        }
    }

    #[test]
    fn contains_goes_by_the_prefix() {
        let inside = |network, ip: &str| contains(cidr("x", network).unwrap(), ip.parse().unwrap());
        assert!(inside("10.1.2.0/24", "10.1.2.255") && inside("0.0.0.0/0", "8.8.8.8"));
        assert!(inside("::/0", "fd00::1") && inside("fd00::/64", "fd00::1"));
        assert!(!inside("10.1.2.0/24", "10.1.3.0") && !inside("0.0.0.0/0", "::1"));
    }

    proptest::proptest! {
        #[test]
        fn cidr_of_anything_never_panics(text in "[0-9a-f:./]{0,30}") {
            if let Ok(network) = cidr("x", &text) {
                assert!(contains(network, network.0));
            }
        }
    }
}
