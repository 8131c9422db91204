//! Names among a policy's exceptions: what they look like, and to which addresses they may lead.

use super::egress::{Rule, parse_ports, split_protocol};
use super::tap::METADATA_V6;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// Of a name, without the last dot (RFC 1035, section 2.3.4).
const MAX_NAME: usize = 253;
const MAX_LABEL: usize = 63;
/// Before a domain: all that is in it.
const ALL_OF: &str = "*.";

/// An exception for whatever addresses a name has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameRule {
    /// In small letters; with `*.` in front it means all names in that domain.
    pub name: String,
    /// First and last port; `None`: all.
    pub ports: Option<(u16, u16)>,
    /// "tcp" or "udp"; `None`: both, and without ports anything.
    pub protocol: Option<String>,
}

/// `NAME[:PORT[-PORT]][/tcp|udp]`
impl FromStr for NameRule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        parse(text).ok_or_else(|| {
            format!("{text:?} is not like example.com, example.com:443 or *.example.com:443/tcp")
        })
    }
}

fn parse(text: &str) -> Option<NameRule> {
    let (text, protocol) = split_protocol(text);
    let (name, ports) = match text.split_once(':') {
        Some((name, ports)) => (name, Some(parse_ports(ports)?)),
        None => (text, None),
    };
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    let whole = name.strip_prefix(ALL_OF).unwrap_or(&name);
    let fits = |label: &str| {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_".contains(&b);
        (1..=MAX_LABEL).contains(&label.len()) && label.bytes().all(plain)
    };
    // An address that isn't one is no name either.
    let numeric = |label: &str| label.bytes().all(|b| b.is_ascii_digit());
    let ends_in_number = whole.rsplit('.').next().is_none_or(numeric);
    if name.len() > MAX_NAME || ends_in_number || !whole.split('.').all(fits) {
        return None;
    }
    Some(NameRule {
        name,
        ports,
        protocol,
    })
}

impl NameRule {
    /// Whether that name, in small letters, is meant.
    pub fn matches(&self, name: &str) -> bool {
        match self.name.strip_prefix(ALL_OF) {
            None => self.name == name,
            Some(domain) => name
                .strip_suffix(domain)
                .and_then(|rest| rest.strip_suffix('.'))
                .is_some_and(|rest| !rest.is_empty()),
        }
    }

    /// The same for one of the addresses.
    pub fn at(&self, ip: IpAddr) -> Rule {
        Rule {
            network: (ip, if ip.is_ipv4() { 32 } else { 128 }),
            ports: self.ports,
            protocol: self.protocol.clone(),
        }
    }
}

/// Whether a name may lead there: to a machine on a network. What is the host's own or the link's alone (with clouds'
/// metadata) is reached by no name, whatever its owner answers.
pub fn may_lead_to(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => v4(ip),
        IpAddr::V6(ip) => v6(ip),
    }
}

fn v4(ip: Ipv4Addr) -> bool {
    let first = ip.octets()[0];
    // "This" network, loopback, link-local, multicast and what is reserved behind it.
    !(first == 0 || ip.is_loopback() || ip.is_link_local() || first >= 224)
}

fn v6(ip: Ipv6Addr) -> bool {
    let [a, b, c, d, e, f, high, low] = ip.segments();
    let four = |high, low| v4(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)));
    match [a, b, c, d, e, f] {
        // IPv4 in other clothes: compatible, mapped; by way of a translator, a relay.
        [0, 0, 0, 0, 0, 0 | 0xffff] => false,
        [0x64, 0xff9b, 0, 0, 0, 0] => four(high, low),
        [0x2002, ..] => four(b, c),
        _ => !(ip.is_unicast_link_local() || ip.is_multicast() || METADATA_V6.contains(&ip)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_is_read_in_all_its_forms() {
        for (text, name, ports, protocol) in [
            ("example.com", "example.com", None, None),
            ("Example.COM.", "example.com", None, None),
            ("db", "db", None, None),
            ("a_b.x-1.net:443", "a_b.x-1.net", Some((443, 443)), None),
            (
                "*.example.com:1-2/udp",
                "*.example.com",
                Some((1, 2)),
                Some("udp"),
            ),
            ("3com.com/tcp", "3com.com", None, Some("tcp")),
        ] {
            let rule: NameRule = text.parse().unwrap();
            assert_eq!((&*rule.name, rule.ports), (name, ports), "{text}");
            assert_eq!(rule.protocol.as_deref(), protocol, "{text}");
        }
    }

    #[test]
    fn name_of_nonsense_is_refused() {
        let long = format!("{}com", "a.".repeat(126));
        let label = format!("{}.com", "a".repeat(64));
        for text in [
            "",
            ".",
            "*",
            "*.",
            "a..b",
            "-j ACCEPT",
            "a b.com",
            "10.0.0.256",
            "10.0.0.0/33",
            "*.10",
            "a.*.com",
            "b*.com",
            "example.com:",
            "example.com:0",
            "example.com:443/sctp",
            "example.com\n",
            "b\u{fc}cher.example",
            "fd00::1",
            &long,
            &label,
        ] {
            assert!(text.parse::<NameRule>().is_err(), "{text}");
        }
    }

    #[test]
    fn matches_is_exact_but_for_the_star() {
        let matches = |rule: &str, name: &str| rule.parse::<NameRule>().unwrap().matches(name);
        assert!(matches("example.com", "example.com"));
        assert!(matches("*.example.com", "a.b.example.com"));
        for (rule, name) in [
            ("example.com", "a.example.com"),
            ("example.com", "example.comx"),
            ("*.example.com", "example.com"),
            ("*.example.com", ".example.com"),
            ("*.example.com", "badexample.com"),
            ("*.example.com", ""),
        ] {
            assert!(!matches(rule, name), "{rule} {name}");
        }
    }

    #[test]
    fn names_lead_to_no_metadata_and_nothing_of_the_hosts_own() {
        for ip in [
            "169.254.169.254",
            "169.254.0.1",
            "127.0.0.1",
            "0.0.0.0",
            "0.1.2.3",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:169.254.169.254",
            "::169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "2002:a9fe:a9fe::1",
            "fe80::a9fe:a9fe",
            "fe80::1",
            "fd00:ec2::254",
            "ff02::1",
        ] {
            assert!(!may_lead_to(ip.parse().unwrap()), "{ip}");
        }
        for ip in [
            "8.8.8.8",
            "10.0.0.1",
            "64:ff9b::808:808",
            "2001:db8::1",
            "fd00::1",
        ] {
            assert!(may_lead_to(ip.parse().unwrap()), "{ip}");
        }
    }

    proptest::proptest! {
        #[test]
        fn name_of_anything_is_plain_once_read(text in "[a-zA-Z0-9*._:/ -]{0,40}") {
            if let Ok(rule) = text.parse::<NameRule>() {
                proptest::prop_assert!(rule.name.parse::<NameRule>().unwrap().name == rule.name);
                proptest::prop_assert!(!rule.name.contains(' '));
            }
        }
    }
}
