//! The container's resolv.conf and hosts file.

use super::network_args::NetworkArgs;
use anyhow::{Context, bail};
use std::net::IpAddr;

/// Where systemd-resolved tells the resolvers that it asks itself.
const UPSTREAM: &str = "/run/systemd/resolve/resolv.conf";
/// A resolver configuration is a few lines.
const MAX_FILE: u64 = 64 << 10;
/// The host as the container sees it.
const HOST_GATEWAY: &str = "host-gateway";

/// The host's own configuration.
pub(super) fn of_host() -> String {
    let read = |path: &str| crate::files::read_text(path.as_ref(), MAX_FILE).unwrap_or_default();
    let own = read("/etc/resolv.conf");
    let usable = nameservers(&own).any(|ip| !is_loopback(ip));
    let upstream = if usable {
        String::new()
    } else {
        read(UPSTREAM)
    };
    if upstream.is_empty() { own } else { upstream }
}

/// The host's own configuration with one resolver in place of its own.
pub(super) fn with_resolver(resolver: std::net::Ipv4Addr) -> String {
    let host = of_host();
    let others = host
        .lines()
        .filter(|line| !line.trim_start().starts_with("nameserver"));
    let others = others.map(|line| format!("{line}\n"));
    format!("nameserver {resolver}\n{}", others.collect::<String>())
}

fn nameservers(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .filter_map(|line| line.trim_start().strip_prefix("nameserver"))
        .map(str::trim)
}

/// An address that means the host only on the host.
fn is_loopback(nameserver: &str) -> bool {
    let ip = nameserver.split('%').next().unwrap_or_default();
    ip.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// What a container on a network gets: what was given, else the host's, without resolvers that are out of its reach.
pub(super) fn resolv_conf(args: &NetworkArgs, host: &str) -> anyhow::Result<String> {
    for address in &args.dns {
        address
            .parse::<IpAddr>()
            .with_context(|| format!("--dns: {address:?} is not an address"))?;
    }
    for word in args.dns_search.iter().chain(&args.dns_option) {
        if word.is_empty() || word.chars().any(|c| c.is_whitespace() || c.is_control()) {
            bail!("--dns-search, --dns-option: {word:?} is not a word");
        }
    }
    let mut text = String::new();
    let lines = |key: &'static str| {
        let of_key = move |line: &&str| line.split_whitespace().next() == Some(key);
        host.lines().filter(of_key).map(|line| format!("{line}\n"))
    };
    match args.dns.is_empty() {
        true => {
            let reachable = nameservers(host).filter(|ip| !is_loopback(ip));
            text.extend(reachable.map(|ip| format!("nameserver {ip}\n")));
        }
        false => text.extend(args.dns.iter().map(|ip| format!("nameserver {ip}\n"))),
    }
    match args.dns_search.as_slice() {
        [] => text.extend(lines("search")),
        // Docker's way to say that there is none.
        [dot] if dot == "." => {}
        domains => text.push_str(&format!("search {}\n", domains.join(" "))),
    }
    match args.dns_option.is_empty() {
        true => text.extend(lines("options")),
        false => text.push_str(&format!("options {}\n", args.dns_option.join(" "))),
    }
    Ok(text)
}

/// The lines of `--add-host`; `gateway` is the host as the container reaches it.
pub(super) fn extra_hosts(given: &[String], gateway: Option<IpAddr>) -> anyhow::Result<String> {
    let mut text = String::new();
    for wish in given {
        let (name, ip) = wish
            .split_once([':', '='])
            .with_context(|| format!("--add-host: {wish:?} is not like NAME:ADDRESS"))?;
        if name.is_empty() || name.chars().any(|c| c.is_whitespace() || c.is_control()) {
            bail!("--add-host: {name:?} is not a name");
        }
        let ip = match ip {
            HOST_GATEWAY => gateway.context("--add-host: there is no gateway to the host")?,
            ip => ip
                .trim_start_matches('[')
                .trim_end_matches(']')
                .parse()
                .with_context(|| format!("--add-host: {ip:?} is not an address"))?,
        };
        text.push_str(&format!("{ip}\t{name}\n"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str = "# made by hand\nnameserver 127.0.0.53\nnameserver 9.9.9.9\nsearch a.example b.example\noptions edns0\n";

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| s.to_string()).collect()
    }

    #[test]
    fn resolv_conf_takes_the_hosts_but_for_its_loopback() {
        let text = resolv_conf(&NetworkArgs::default(), HOST).unwrap();
        assert_eq!(
            text,
            "nameserver 9.9.9.9\nsearch a.example b.example\noptions edns0\n"
        );
    }

    #[test]
    fn resolv_conf_takes_what_is_given_instead() {
        let args = NetworkArgs {
            dns: strings(&["10.0.0.1", "fd00::1"]),
            dns_search: strings(&["."]),
            dns_option: strings(&["ndots:2"]),
            ..NetworkArgs::default()
        };
        let text = resolv_conf(&args, HOST).unwrap();
        assert_eq!(
            text,
            "nameserver 10.0.0.1\nnameserver fd00::1\noptions ndots:2\n"
        );
        for (dns, search) in [("x", "a"), ("1.1.1.1", "a\nnameserver 6.6.6.6")] {
            let args = NetworkArgs {
                dns: strings(&[dns]),
                dns_search: strings(&[search]),
                ..NetworkArgs::default()
            };
            assert!(resolv_conf(&args, HOST).is_err());
        }
    }

    #[test]
    fn extra_hosts_know_the_gateway() {
        let given = strings(&[
            "db:10.0.0.9",
            "host:host-gateway",
            "six:fd00::1",
            "eq=1.2.3.4",
        ]);
        let gateway = "10.188.0.1".parse().unwrap();
        let text = extra_hosts(&given, Some(gateway)).unwrap();
        assert_eq!(
            text,
            "10.0.0.9\tdb\n10.188.0.1\thost\nfd00::1\tsix\n1.2.3.4\teq\n"
        );
        assert!(extra_hosts(&given, None).is_err());
        for bad in ["db", "db:x", ":1.2.3.4", "a b:1.2.3.4"] {
            assert!(extra_hosts(&strings(&[bad]), None).is_err(), "{bad}");
        }
    }

    proptest::proptest! {
        #[test]
        fn resolv_conf_of_anything_never_panics(host in ".{0,200}") {
            resolv_conf(&NetworkArgs::default(), &host).unwrap();
        }
    }
}
