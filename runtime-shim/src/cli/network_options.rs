//! From a container's network options to what the shim is to make of them.

use super::network_args::{Egress, Exception, NetworkArgs};
use super::{publish, resolv};
use crate::network::cni;
use crate::network::egress::{MAX_RULES, Policy};
use crate::network::networks::{self, DEFAULT, Network};
use crate::network::user;
use crate::network::wish::{self, Attachment, Mac, Port, Wish};
use crate::settings::Settings;
use anyhow::{Context, bail};
use casemate_protocol::RESOLVER;
use oci_spec::image::ImageConfiguration;
use std::net::IpAddr;

/// No network at all.
const NONE: &str = "none";
/// A guest has room for that many devices beside its disks.
const MAX_NETWORKS: usize = 8;

/// What the container's networks shall be; `None`: it has none.
pub(super) fn wish(settings: &Settings, args: &NetworkArgs) -> anyhow::Result<Option<Wish>> {
    let names = match (args.networks.as_slice(), &settings.network) {
        ([], Some(name)) => vec![name.clone()],
        ([], None) => default(settings),
        (names, _) => names.to_vec(),
    };
    if names.iter().any(|name| name == NONE) {
        if names.len() > 1 {
            bail!("--network none goes with no other network");
        }
        refuse_without_network(args)?;
        return Ok(None);
    }
    if names.is_empty() {
        refuse_without_network(args).map_err(|error| match check_host(settings) {
            Err(why) => error.context(why),
            Ok(()) => error,
        })?;
        return Ok(None);
    }
    if names.iter().any(|name| name == "host") {
        bail!(
            "--network host: a container has a kernel of its own, so it can't have the host's network"
        );
    }
    if names.len() > MAX_NETWORKS {
        bail!("--network: at most {MAX_NETWORKS} networks are possible");
    }
    if names.iter().any(|name| name == user::NAME) {
        if names.len() > 1 {
            bail!("--network passt goes with no other network");
        }
        return of_user(settings, args).map(Some);
    }
    check_host(settings)?;
    let dir = networks::dir_of(&settings.data_dir);
    let ports = publish::all(&args.publish)?;
    let mut attachments: Vec<Attachment> = Vec::new();
    for name in &names {
        let network = Network::load_or_default(&dir, name).context("--network")?;
        if attachments.iter().any(|a| a.network == network.name) {
            bail!("--network {name} is given twice");
        }
        let first = attachments.is_empty();
        check_wishes(args, &network, first)?;
        if first {
            check_ports(&ports, &network)?;
        }
        let mac = match args.mac_address.filter(|_| first) {
            Some(mac) => mac,
            None => Mac::random().context("no random numbers")?,
        };
        let ips = args.ip.map(IpAddr::V4).into_iter();
        let ips = ips.chain(args.ip6.map(IpAddr::V6)).filter(|_| first);
        attachments.push(Attachment {
            network: network.name,
            mac,
            ips: ips.collect(),
            aliases: args.network_alias.clone(),
        });
    }
    Ok(Some(Wish {
        attachments,
        ports,
        dns: resolv::servers(args)?,
        egress: policy(args)?,
    }))
}

/// Whether the network can do what is asked of it; only the first one is asked for addresses and ports.
fn check_wishes(args: &NetworkArgs, network: &Network, first: bool) -> anyhow::Result<()> {
    let wishes = [
        ("--ip", "ips", args.ip.is_some() || args.ip6.is_some()),
        ("--mac-address", "mac", args.mac_address.is_some()),
        ("--publish", "portMappings", !args.publish.is_empty()),
    ];
    for (option, capability, asked) in wishes {
        if first && asked && !network.can(capability) {
            bail!("{option}: network {} can't do that", network.name);
        }
    }
    Ok(())
}

/// Whether the network's plugins can publish them: they say nothing, and do nothing, if they can't.
fn check_ports(ports: &[Port], network: &Network) -> anyhow::Result<()> {
    let subnets = network.subnets();
    let has_ipv6 = subnets.is_empty() || subnets.iter().any(|(subnet, _)| subnet.contains(':'));
    for ip in ports
        .iter()
        .filter_map(|p| p.host_ip.filter(|ip| ip.is_ipv6()))
    {
        if !has_ipv6 {
            bail!("--publish: {ip}: network {} has no IPv6", network.name);
        }
        if ip.is_loopback() {
            bail!(
                "--publish: {ip}: Linux sends nothing on from there; use 127.0.0.1 or another address"
            );
        }
    }
    Ok(())
}

/// `--egress`; `None`: what every container has.
fn policy(args: &NetworkArgs) -> anyhow::Result<Option<Policy>> {
    if args.egress_allow.len() > MAX_RULES {
        bail!("--egress-allow: at most {MAX_RULES} are possible");
    }
    let mut policy = Policy {
        deny: args.egress == Some(Egress::Deny),
        ..Policy::default()
    };
    for exception in &args.egress_allow {
        match exception.clone() {
            Exception::Addresses(rule) => policy.allow.push(rule),
            // The rest is allowed, and to metadata no name leads.
            Exception::Name(rule) if !policy.deny => {
                bail!("--egress-allow {}: a name needs --egress deny", rule.name);
            }
            Exception::Name(rule) => policy.names.push(rule),
        }
    }
    Ok((policy != Policy::default()).then_some(policy))
}

/// What makes no sense without a network.
fn refuse_without_network(args: &NetworkArgs) -> anyhow::Result<()> {
    for (option, asked) in [
        ("--publish", !args.publish.is_empty() || args.publish_all),
        ("--ip", args.ip.is_some() || args.ip6.is_some()),
        ("--mac-address", args.mac_address.is_some()),
        ("--network-alias", !args.network_alias.is_empty()),
    ] {
        if asked {
            bail!("{option} needs a network, and the container has none");
        }
    }
    Ok(())
}

/// `--publish-all`: each port that the image or the user names, on one that is free.
pub(super) fn publish_exposed(
    args: &NetworkArgs,
    wish: Option<&mut Wish>,
    image: &ImageConfiguration,
) -> anyhow::Result<()> {
    let mut exposed = Vec::new();
    for text in &args.expose {
        exposed.extend(publish::exposed(text)?);
    }
    let (true, Some(wish)) = (args.publish_all, wish) else {
        return Ok(());
    };
    let config = image.config().as_ref();
    for text in config
        .and_then(|c| c.exposed_ports().as_ref())
        .into_iter()
        .flatten()
    {
        exposed.extend(publish::exposed(text).context("the image's ports")?);
    }
    for (container_port, protocol) in exposed {
        let published = |p: &Port| (p.container_port, &p.protocol) == (container_port, &protocol);
        if !wish.ports.iter().any(published) {
            let port = Port {
                host_port: publish::free(&protocol, None)?,
                container_port,
                protocol,
                host_ip: None,
            };
            publish::add(&mut wish.ports, port)?;
        }
    }
    Ok(())
}

/// The networks of a container that names none: what this host can do.
fn default(settings: &Settings) -> Vec<String> {
    let name = match rustix::process::geteuid().is_root() {
        true if cni::are_in(&settings.cni_dir()) => DEFAULT,
        false if settings.passt().exists() => user::NAME,
        _ => return Vec::new(),
    };
    vec![name.to_owned()]
}

/// An ordinary user's network.
fn of_user(settings: &Settings, args: &NetworkArgs) -> anyhow::Result<Wish> {
    let passt = settings.passt();
    if !passt.exists() {
        bail!(
            "{} is missing: install Debian's package passt, set passt in the configuration, or use --network none",
            passt.display()
        );
    }
    if args.ip.is_some() || args.ip6.is_some() {
        bail!("--ip: network passt gives every container the same address");
    }
    let ports = publish::all(&args.publish)?;
    check_users_ports(&ports)?;
    let random = || Mac::random().context("no random numbers");
    let mac = args.mac_address.map_or_else(random, Ok)?;
    let attachment = Attachment {
        network: user::NAME.to_owned(),
        mac,
        ips: Vec::new(),
        aliases: args.network_alias.clone(),
    };
    Ok(Wish {
        attachments: vec![attachment],
        ports,
        dns: resolv::servers(args)?,
        egress: policy(args)?,
    })
}

/// Whether passt can publish them.
fn check_users_ports(ports: &[Port]) -> anyhow::Result<()> {
    for (nth, port) in ports.iter().enumerate() {
        let address = |port: &Port| port.host_ip.map(|ip| ip.to_string()).unwrap_or_default();
        if port.host_ip.is_some_and(|ip| ip.is_ipv6()) && !user::has_ipv6() {
            bail!(
                "--publish: {}: this host has no way out by IPv6, so network passt has IPv4 only",
                address(port)
            );
        }
        // It knows ports of the host by number alone.
        let other = ports[..nth].iter().find(|other| {
            (other.host_port, &other.protocol) == (port.host_port, &port.protocol)
                && other.container_port != port.container_port
        });
        if let Some(other) = other {
            bail!(
                "--publish: network passt can't give port {} of {} and of {} to different ports of the container",
                port.host_port,
                address(other),
                address(port)
            );
        }
    }
    Ok(())
}

/// Whether this host and this user can have networks at all.
fn check_host(settings: &Settings) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("networks of CNI plugins need root; use --network passt or none");
    }
    let dir = settings.cni_dir();
    if !cni::are_in(&dir) {
        bail!(
            "{} holds no CNI plugins: install Debian's package containernetworking-plugins, set cni_dir in the configuration, or use --network none",
            dir.display()
        );
    }
    Ok(())
}

/// The files of the bundle that have to do with it.
pub(super) fn files(
    settings: &Settings,
    args: &NetworkArgs,
    wish: Option<&Wish>,
    hostname: &str,
) -> anyhow::Result<Vec<(&'static str, Vec<u8>)>> {
    let mut hosts = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    let Some(wish) = wish else {
        hosts.push_str(&format!("127.0.0.1\t{hostname}\n"));
        hosts.push_str(&resolv::extra_hosts(&args.add_host, None)?);
        let resolv = std::fs::read("/etc/resolv.conf").unwrap_or_default();
        return Ok(vec![("hosts", hosts.into_bytes()), ("resolv.conf", resolv)]);
    };
    let gateway = match args.add_host.is_empty() {
        true => None,
        false => gateway(settings, wish),
    };
    hosts.push_str(&resolv::extra_hosts(&args.add_host, gateway)?);
    let resolv = resolv::resolv_conf(args, RESOLVER.into(), &resolv::of_host())?;
    Ok(vec![
        ("hosts", hosts.into_bytes()),
        ("resolv.conf", resolv.into_bytes()),
        (wish::FILE, serde_json::to_vec(wish)?),
    ])
}

fn first_is_users(wish: &Wish) -> bool {
    wish.attachments
        .first()
        .is_some_and(|a| a.network == user::NAME)
}

/// The host's address on the container's first network.
fn gateway(settings: &Settings, wish: &Wish) -> Option<IpAddr> {
    let first = wish.attachments.first()?;
    if first_is_users(wish) {
        return None;
    }
    let dir = networks::dir_of(&settings.data_dir);
    let network = Network::load_or_default(&dir, &first.network).ok()?;
    let (_, gateway) = network.subnets().into_iter().next()?;
    gateway.parse().ok()
}
