//! Where a guest may send to: rules of the host's kernel, between the guest's tap and what it is joined with.
//!
//! With a policy a tap and its interface are joined by a bridge instead of redirects, and the kernel's packet filter sees
//! what crosses it (br_netfilter), so that replies are told from what the guest begins. Rules and connections belong to
//! the sandbox's network namespace: the guest can't reach them, and they go with it.

use super::look::Interface;
use super::named::NameRule;
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
const IFLA_BR_AGEING_TIME: u16 = 4;
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
    /// Exceptions by name: the addresses that they have.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<NameRule>,
}

impl Policy {
    /// Whether an exception lets it send there.
    pub fn allows(&self, ip: IpAddr, port: u16, protocol: &str) -> bool {
        self.allow.iter().any(|rule| {
            rule.contains(ip)
                && rule
                    .ports
                    .is_none_or(|(first, last)| (first..=last).contains(&port))
                && rule.protocol.as_ref().is_none_or(|p| p == protocol)
        })
    }
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

/// Cuts `/tcp` or `/udp` off.
pub(super) fn split_protocol(text: &str) -> (&str, Option<String>) {
    match text.rsplit_once('/') {
        Some((rest, protocol @ ("tcp" | "udp"))) => (rest, Some(protocol.to_owned())),
        _ => (text, None),
    }
}

/// `PORT` or `PORT-PORT`
pub(super) fn parse_ports(text: &str) -> Option<(u16, u16)> {
    let number = |text: &str| text.parse::<u16>().ok().filter(|n| *n > 0);
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let range = (number(first)?, number(last)?);
    Some(range).filter(|(first, last)| first <= last)
}

fn parse(text: &str) -> Option<Rule> {
    let (text, protocol) = split_protocol(text);
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
    let ports = match ports {
        None => None,
        Some(ports) => Some(parse_ports(ports)?),
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
    fn contains(&self, ip: IpAddr) -> bool {
        let prefix = u32::from(self.network.1);
        match (self.network.0, ip) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                let behind = u32::MAX.checked_shr(prefix).unwrap_or(0);
                (a.to_bits() ^ b.to_bits()) & !behind == 0
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => {
                let behind = u128::MAX.checked_shr(prefix).unwrap_or(0);
                (a.to_bits() ^ b.to_bits()) & !behind == 0
            }
            _ => false,
        }
    }

    /// As iptables takes it.
    fn lines(&self, chain: &str) -> String {
        let (ip, prefix) = self.network;
        let protocols: Vec<&str> = match (&self.protocol, self.ports) {
            (Some(protocol), _) => vec![protocol],
            (None, Some(_)) => vec!["tcp", "udp"],
            (None, None) => return format!("-A {chain} -d {ip}/{prefix} -j ACCEPT\n"),
        };
        let ports = self.ports.map(|(a, b)| format!(" --dport {a}:{b}"));
        let ports = ports.unwrap_or_default();
        let line = |p| format!("-A {chain} -d {ip}/{prefix} -p {p}{ports} -j ACCEPT\n");
        protocols.into_iter().map(line).collect()
    }
}

/// Those of the rules that are of one family, for a chain.
fn lines(rules: &[Rule], four: bool, chain: &str) -> String {
    let of_family = rules.iter().filter(|r| r.network.0.is_ipv4() == four);
    of_family.map(|rule| rule.lines(chain)).collect()
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
    text.push_str(&lines(&policy.allow, four, "OURS"));
    let named = !policy.names.is_empty();
    // Before the names: whoever answers for one must not give away what is in these places.
    if !policy.deny || named {
        let (network, prefix) = METADATA_V4;
        match four {
            true => text.push_str(&format!("-A OURS -d {network}/{prefix} -j DROP\n")),
            false => text.extend(METADATA_V6.map(|ip| format!("-A OURS -d {ip} -j DROP\n"))),
        }
    }
    if named {
        text = text.replacen(":GUEST -\n", ":GUEST -\n:NAMED -\n", 1);
        text.push_str("-A OURS -j NAMED\n");
    }
    if !policy.deny {
        text.push_str("-A OURS -j ACCEPT\n");
    }
    text.push_str("COMMIT\n");
    text
}

/// What replaces the rules for addresses that names have, and leaves all others.
fn named_rules(rules: &[Rule], four: bool) -> String {
    format!("*filter\n:NAMED -\n{}COMMIT\n", lines(rules, four, "NAMED"))
}

/// Loads the rules into the calling thread's network namespace and makes sure that they are asked.
pub fn enforce(policy: &Policy, ips: &[IpAddr], taps: &[String]) -> io::Result<()> {
    ask_the_filter()?;
    for (program, four) in programs() {
        restore(program, &[], &rules(policy, ips, taps, four))?;
    }
    Ok(())
}

/// Where the names among a policy's exceptions lead from now on, in the calling thread's network namespace, in which
/// it is enforced.
pub fn set_named(allowed: &[Rule]) -> io::Result<()> {
    for (program, four) in programs() {
        restore(program, &["--noflush"], &named_rules(allowed, four))?;
    }
    Ok(())
}

/// Who loads rules, and whether those are IPv4's.
pub(super) fn programs() -> impl Iterator<Item = (&'static str, bool)> {
    let six = std::path::Path::new("/proc/sys/net/ipv6").exists();
    [("iptables-restore", true), ("ip6tables-restore", false)]
        .into_iter()
        .filter(move |(_, four)| *four || six)
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

pub(super) fn restore(program: &str, options: &[&str], rules: &str) -> io::Result<()> {
    let input = fds::memory_file("rules", rules.as_bytes())?;
    let mut command = Command::new(program);
    command
        .args(options)
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
    // It learns nothing: what comes into one port goes out of the other. A network that sends frames back to where
    // they came from (hairpin) would teach it that the guest is outside.
    attribute(&mut data, IFLA_BR_AGEING_TIME, &[0; 4]);
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
    fn policy_allows_what_its_rules_name() {
        let policy = Policy {
            deny: true,
            allow: vec![
                "10.0.0.0/8:53/udp".parse().unwrap(),
                "fd00::/8".parse().unwrap(),
            ],
            names: Vec::new(),
        };
        let allows = |ip: &str, port, protocol| policy.allows(ip.parse().unwrap(), port, protocol);
        assert!(allows("10.9.9.9", 53, "udp") && allows("fd12::1", 1, "tcp"));
        assert!(!allows("10.9.9.9", 53, "tcp") && !allows("11.0.0.1", 53, "udp"));
        assert!(!allows("10.9.9.9", 54, "udp") && !allows("fe00::1", 1, "tcp"));
    }

    #[test]
    fn rules_of_a_denying_policy_accept_nothing_else() {
        let policy = Policy {
            deny: true,
            allow: vec!["10.0.0.1:443".parse().unwrap(), "fd00::/8".parse().unwrap()],
            names: Vec::new(),
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

    #[test]
    fn rules_of_a_policy_with_names_keep_them_from_metadata() {
        let policy = Policy {
            deny: true,
            names: vec!["example.com".parse().unwrap()],
            ..Policy::default()
        };
        for (four, metadata) in [(true, "169.254.0.0/16"), (false, "fd00:ec2::254")] {
            let text = rules(&policy, &[], &[], four);
            let at = |what: &str| text.find(what).unwrap();
            assert!(at(&format!("{metadata} -j DROP")) < at("-A OURS -j NAMED"));
            assert!(at(":NAMED -\n") < at("-A OURS"));
            assert!(!text.contains("-A OURS -j ACCEPT"));
        }
        let pinned = ["10.0.0.1:443/tcp".parse().unwrap()];
        let text = named_rules(&pinned, true);
        let line = "-A NAMED -d 10.0.0.1/32 -p tcp --dport 443:443 -j ACCEPT";
        assert_eq!(text, format!("*filter\n:NAMED -\n{line}\nCOMMIT\n"));
        assert_eq!(named_rules(&pinned, false), "*filter\n:NAMED -\nCOMMIT\n");
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
