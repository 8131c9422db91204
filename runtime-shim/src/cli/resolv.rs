//! The container's resolv.conf and hosts file.

use super::network_args::NetworkArgs;
use anyhow::{Context, bail};
use std::net::{IpAddr, Ipv4Addr};

/// A resolver configuration is a few lines.
const MAX_FILE: u64 = 64 << 10;
/// The host as the container sees it.
const HOST_GATEWAY: &str = "host-gateway";

/// The host's own configuration.
pub(super) fn of_host() -> String {
    crate::files::read_text("/etc/resolv.conf".as_ref(), MAX_FILE).unwrap_or_default()
}

/// `--dns`
pub(super) fn servers(args: &NetworkArgs) -> anyhow::Result<Vec<IpAddr>> {
    let parse = |text: &String| {
        let ip = text.parse();
        ip.with_context(|| format!("--dns: {text:?} is not an address"))
    };
    args.dns.iter().map(parse).collect()
}

/// What a container on a network gets: our resolver, the rest as given, else the host's.
pub(super) fn resolv_conf(
    args: &NetworkArgs,
    server: Ipv4Addr,
    host: &str,
) -> anyhow::Result<String> {
    for word in args.dns_search.iter().chain(&args.dns_option) {
        if word.is_empty() || word.chars().any(|c| c.is_whitespace() || c.is_control()) {
            bail!("--dns-search, --dns-option: {word:?} is not a word");
        }
    }
    let lines = |key: &'static str| {
        let of_key = move |line: &&str| line.split_whitespace().next() == Some(key);
        host.lines().filter(of_key).map(|line| format!("{line}\n"))
    };
    let mut text = format!("nameserver {server}\n");
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

    const SERVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);

    #[test]
    fn resolv_conf_takes_the_hosts_domains_and_options() {
        let text = resolv_conf(&NetworkArgs::default(), SERVER, HOST).unwrap();
        assert_eq!(
            text,
            "nameserver 127.0.0.11\nsearch a.example b.example\noptions edns0\n"
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
        let given: Vec<IpAddr> = ["10.0.0.1", "fd00::1"].map(|ip| ip.parse().unwrap()).into();
        assert_eq!(servers(&args).unwrap(), given);
        let text = resolv_conf(&args, SERVER, HOST).unwrap();
        assert_eq!(text, "nameserver 127.0.0.11\noptions ndots:2\n");
        let args = NetworkArgs {
            dns: strings(&["x"]),
            dns_search: strings(&["a\nnameserver 6.6.6.6"]),
            ..NetworkArgs::default()
        };
        assert!(servers(&args).is_err() && resolv_conf(&args, SERVER, HOST).is_err());
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
            resolv_conf(&NetworkArgs::default(), SERVER, &host).unwrap();
        }
    }
}
