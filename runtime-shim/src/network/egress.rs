//! Where a guest may send to: rules of the host's kernel, between the guest's tap and what it is joined with.
//!
//! With a policy a tap and its interface are joined by a bridge instead of redirects, and the kernel's packet filter sees
//! what crosses it (br_netfilter), so that replies are told from what the guest begins. Rules and connections belong to
//! the sandbox's network namespace: the guest can't reach them, and they go with it.

use super::look::Interface;
use super::tap::{self, METADATA_V4, METADATA_V6};
use crate::fds;
use casemate_protocol::netlink::{Request, Socket, attribute, flag, kind, link};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::str::FromStr;

/// Of one container: each is walked through for each new connection.
pub const MAX_RULES: usize = 256;
/// Where the kernel says whether its filter sees what crosses a bridge.
const BRIDGE_FILTER: &str = "/proc/sys/net/bridge";
/// What is told of iptables' words.
const MAX_WORDS: usize = 1024;

// linux/if_link.h, if.h
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_BR_MCAST_SNOOPING: u16 = 23;
const IFF_UP: u32 = 1;
const IFF_NOARP: u32 = 0x80;

/// Where a guest may send to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Nowhere but where `allow` says; otherwise everywhere but to clouds' metadata.
    pub deny: bool,
    /// Exceptions.
    pub allow: Vec<Rule>,
}

/// An exception.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// The destination.
    pub network: (IpAddr, u8),
    /// First and last port; `None`: all.
    pub ports: Option<(u16, u16)>,
    /// "tcp" or "udp"; `None`: both, and without ports anything.
    pub protocol: Option<String>,
}

/// `CIDR[:PORT[-PORT]][/tcp|udp]`; an IPv6 network with a port stands in brackets.
impl FromStr for Rule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        parse(text).ok_or_else(|| {
            format!(
                "{text:?} is not like 10.0.0.0/8, 10.0.0.1:443, 10.0.0.0/8:80-90/tcp or [fd00::/8]:53/udp"
            )
        })
    }
}

fn parse(text: &str) -> Option<Rule> {
    let (text, protocol) = match text.rsplit_once('/') {
        Some((rest, protocol @ ("tcp" | "udp"))) => (rest, Some(protocol.to_owned())),
        _ => (text, None),
    };
    let (network, ports) = match text.strip_prefix('[') {
        Some(rest) => {
            let (network, rest) = rest.split_once(']')?;
            let network = network.contains(':').then_some(network)?;
            match rest.is_empty() {
                true => (network, None),
                false => (network, Some(rest.strip_prefix(':')?)),
            }
        }
        None if text.matches(':').count() == 1 => {
            let (network, ports) = text.split_once(':')?;
            (network, Some(ports))
        }
        None => (text, None),
    };
    let number = |text: &str| text.parse::<u16>().ok().filter(|n| *n > 0);
    let ports = match ports {
        None => None,
        Some(ports) => {
            let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
            let range = (number(first)?, number(last)?);
            Some(Some(range).filter(|(first, last)| first <= last)?)
        }
    };
    if text.ends_with(':') {
        return None;
    }
    let (ip, prefix) = match network.split_once('/') {
        Some((ip, prefix)) => (ip.parse().ok()?, prefix.parse().ok()?),
        None => {
            let ip: IpAddr = network.parse().ok()?;
            (ip, if ip.is_ipv4() { 32 } else { 128 })
        }
    };
    let most = if ip.is_ipv4() { 32 } else { 128 };
    (prefix <= most).then_some(Rule {
        network: (ip, prefix),
        ports,
        protocol,
    })
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ip, prefix) = self.network;
        match ip {
            IpAddr::V4(ip) => write!(f, "{ip}/{prefix}")?,
            IpAddr::V6(ip) => write!(f, "[{ip}/{prefix}]")?,
        }
        if let Some((first, last)) = self.ports {
            write!(f, ":{first}-{last}")?;
        }
        self.protocol.iter().try_for_each(|p| write!(f, "/{p}"))
    }
}

impl Rule {
    /// As iptables takes it.
    fn lines(&self) -> String {
        let (ip, prefix) = self.network;
        let protocols: Vec<&str> = match (&self.protocol, self.ports) {
            (Some(protocol), _) => vec![protocol],
            (None, Some(_)) => vec!["tcp", "udp"],
            (None, None) => return format!("-A FORWARD -d {ip}/{prefix} -j ACCEPT\n"),
        };
        let ports = self.ports.map(|(a, b)| format!(" --dport {a}:{b}"));
        let ports = ports.unwrap_or_default();
        let line = |p| format!("-A FORWARD -d {ip}/{prefix} -p {p}{ports} -j ACCEPT\n");
        protocols.into_iter().map(line).collect()
    }
}

/// The rules for what crosses a bridge, in iptables-restore's format. Whatever comes from a tap of a guest is the guest's
/// and bears one of its addresses, or is dropped.
fn rules(policy: &Policy, ips: &[IpAddr], taps: &[String], four: bool) -> String {
    let mut text = "*filter\n:INPUT DROP\n:FORWARD DROP\n:OUTPUT ACCEPT\n:GUEST -\n".to_owned();
    for tap in taps {
        text.push_str(&format!(
            "-A FORWARD -m physdev --physdev-in {tap} -j GUEST\n"
        ));
    }
    text.push_str("-A FORWARD -j ACCEPT\n");
    if !four {
        // Neighbours are found by what ARP is for IPv4.
        for kind in ["neighbour-solicitation", "neighbour-advertisement"] {
            text.push_str(&format!(
                "-A GUEST -p ipv6-icmp -m icmp6 --icmpv6-type {kind} -j ACCEPT\n"
            ));
        }
    }
    for ip in ips.iter().filter(|ip| ip.is_ipv4() == four) {
        text.push_str(&format!("-A GUEST -s {ip} -j OURS\n"));
    }
    text.push_str("-A GUEST -j DROP\n");
    text = text.replacen(":GUEST -\n", ":GUEST -\n:OURS -\n", 1);
    text.push_str("-A OURS -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT\n");
    for rule in &policy.allow {
        if rule.network.0.is_ipv4() == four {
            text.push_str(&rule.lines().replace("-A FORWARD", "-A OURS"));
        }
    }
    if !policy.deny {
        let (network, prefix) = METADATA_V4;
        match four {
            true => text.push_str(&format!("-A OURS -d {network}/{prefix} -j DROP\n")),
            false => text.extend(METADATA_V6.map(|ip| format!("-A OURS -d {ip} -j DROP\n"))),
        }
        text.push_str("-A OURS -j ACCEPT\n");
    }
    text.push_str("COMMIT\n");
    text
}

/// Loads the rules into the calling thread's network namespace and makes sure that they are asked.
pub fn enforce(policy: &Policy, ips: &[IpAddr], taps: &[String]) -> io::Result<()> {
    ask_the_filter()?;
    restore("iptables-restore", &rules(policy, ips, taps, true))?;
    if std::path::Path::new("/proc/sys/net/ipv6").exists() {
        restore("ip6tables-restore", &rules(policy, ips, taps, false))?;
    }
    Ok(())
}

/// Without its module the kernel lets everything across a bridge.
fn ask_the_filter() -> io::Result<()> {
    if !std::path::Path::new(BRIDGE_FILTER).exists() {
        // Only root may; whether it did, the next lines tell.
        let _ = Command::new("modprobe").arg("br_netfilter").status();
    }
    for name in ["call-iptables", "call-ip6tables", "filter-vlan-tagged"] {
        let path = format!("{BRIDGE_FILTER}/bridge-nf-{name}");
        let set = std::fs::write(&path, "1").and_then(|()| std::fs::read_to_string(&path));
        if set.is_ok_and(|value| value.trim() == "1") {
            continue;
        }
        return Err(io::Error::other(
            "an egress policy needs the kernel's module br_netfilter: run `modprobe br_netfilter` as root",
        ));
    }
    Ok(())
}

fn restore(program: &str, rules: &str) -> io::Result<()> {
    let input = fds::memory_file("rules", rules.as_bytes())?;
    let mut command = Command::new(program);
    command
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .current_dir("/")
        .stdin(input)
        .stdout(Stdio::null());
    let ended = command.output();
    let ended = ended.map_err(|e| io::Error::new(e.kind(), format!("{program}: {e}")))?;
    if ended.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&ended.stderr);
    let words: String = words.trim().chars().take(MAX_WORDS).collect();
    Err(io::Error::other(format!("{program}: {words}")))
}

/// Joins a tap with an interface by a bridge called `name`.
pub fn join(socket: &Socket, tap: &Interface, interface: &Interface, name: &str) -> io::Result<()> {
    let (mut data, mut info) = (Vec::new(), Vec::new());
    attribute(&mut data, IFLA_BR_MCAST_SNOOPING, &[0]);
    attribute(&mut info, IFLA_INFO_KIND, b"bridge\0");
    attribute(&mut info, IFLA_INFO_DATA, &data);
    let bridge = Request::new(kind::NEWLINK, flag::CREATE | flag::EXCL, &link(0, 0, 0))
        .with(IFLA_IFNAME, &[name.as_bytes(), b"\0"].concat())
        .with(IFLA_LINKINFO, &info);
    socket.change(bridge)?;
    let seen = super::look::Seen::here(socket)?;
    let bridge = seen.interface(name).ok_or(io::ErrorKind::NotFound)?;
    for name in [name, tap.name.as_str()] {
        tap::mute(name)?;
    }
    tap::bring_up(socket, tap, interface.mtu)?;
    // The address is the guest's now: a bridge keeps to itself what is for one of its own ports.
    let mut other = interface.mac;
    other[0] = other[0] ^ 0x04 | 0x02;
    let renamed = Request::new(kind::NEWLINK, 0, &link(interface.index, 0, 0));
    socket.change(renamed.with(IFLA_ADDRESS, &other))?;
    for port in [tap.index, interface.index] {
        let up = Request::new(kind::NEWLINK, 0, &link(port, IFF_UP, IFF_UP));
        socket.change(up.with(IFLA_MASTER, &bridge.index.to_ne_bytes()))?;
    }
    // It answers for nobody.
    let flags = IFF_UP | IFF_NOARP;
    socket.change(Request::new(
        kind::NEWLINK,
        0,
        &link(bridge.index, flags, flags),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rule_is_read_in_all_its_forms() {
        for (text, shown) in [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("10.0.0.1", "10.0.0.1/32"),
            ("10.0.0.1:443", "10.0.0.1/32:443-443"),
            ("10.0.0.0/8:80-90/tcp", "10.0.0.0/8:80-90/tcp"),
            ("10.0.0.1/udp", "10.0.0.1/32/udp"),
            ("fd00::/8", "[fd00::/8]"),
            ("[fd00::1]:53/udp", "[fd00::1/128]:53-53/udp"),
        ] {
            assert_eq!(text.parse::<Rule>().unwrap().to_string(), shown);
        }
    }

    #[test]
    fn rule_of_nonsense_is_refused() {
        for text in [
            "",
            "10.0.0.0/33",
            "10.0.0.1:",
            "10.0.0.1:0",
            "10.0.0.1:9-8",
            "10.0.0.1:80/sctp",
            "example.com",
            "[10.0.0.1]:80",
            "fd00::/129",
            "[fd00::1",
            "10.0.0.1:80:90",
            "/tcp",
            "10.0.0.1 -j ACCEPT",
            "10.0.0.1\n:80",
        ] {
            assert!(text.parse::<Rule>().is_err(), "{text}");
        }
    }

    #[test]
    fn rules_of_a_denying_policy_accept_nothing_else() {
        let policy = Policy {
            deny: true,
            allow: vec!["10.0.0.1:443".parse().unwrap(), "fd00::/8".parse().unwrap()],
        };
        let ips = ["10.188.0.2".parse().unwrap()];
        let text = rules(&policy, &ips, &["tap0".into()], true);
        assert!(text.contains("-A OURS -d 10.0.0.1/32 -p tcp --dport 443:443 -j ACCEPT\n"));
        assert!(text.contains("-A GUEST -s 10.188.0.2 -j OURS\n-A GUEST -j DROP\n"));
        assert!(!text.contains("-A OURS -j ACCEPT") && !text.contains("fd00"));
        let six = rules(&policy, &ips, &["tap0".into()], false);
        assert!(six.contains("fd00::/8") && !six.contains("10."));
    }

    #[test]
    fn rules_of_an_allowing_policy_keep_metadata_away() {
        let text = rules(&Policy::default(), &[], &[], true);
        let (drop, accept) = (
            text.find("169.254.0.0/16 -j DROP"),
            text.find("-A OURS -j ACCEPT"),
        );
        assert!(drop.unwrap() < accept.unwrap());
    }

    proptest::proptest! {
        #[test]
        fn rule_of_anything_is_read_as_it_is_shown(text in "[0-9a-f:./\\[\\]tcpud-]{0,30}") {
            if let Ok(rule) = text.parse::<Rule>() {
                proptest::prop_assert_eq!(rule.to_string().parse::<Rule>().unwrap(), rule);
            }
        }
    }
}
