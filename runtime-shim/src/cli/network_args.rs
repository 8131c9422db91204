//! The grammar of everything about networks.

use super::args::FormatArgs;
use crate::network::egress::Rule;
use crate::network::named::NameRule;
use clap::{Args, Subcommand, ValueEnum};
use std::str::FromStr;

/// `--egress`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Egress {
    /// Everywhere but to clouds' metadata
    Allow,
    /// Nowhere but where --egress-allow says
    Deny,
}

/// `--egress-allow`
#[derive(Debug, Clone)]
pub(super) enum Exception {
    /// By address.
    Addresses(Rule),
    /// By name.
    Name(NameRule),
}

impl FromStr for Exception {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text.parse(), text.parse()) {
            (Ok(rule), _) => Ok(Self::Addresses(rule)),
            (_, Ok(rule)) => Ok(Self::Name(rule)),
            (Err(error), _) => Err(format!("{error}, nor like example.com:443")),
        }
    }
}

/// A container's network.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Network")]
pub(super) struct NetworkArgs {
    /// The network: none, bridge, or another one's name
    #[arg(long = "network", alias = "net", value_name = "NETWORK")]
    pub(super) networks: Vec<String>,
    /// Give the host a port of the container: [[ADDRESS:]HOSTPORT:]PORT[/tcp|udp], ranges too
    #[arg(short, long, value_name = "PORTS")]
    pub(super) publish: Vec<String>,
    /// Publish all ports that the image or --expose names
    #[arg(short = 'P', long)]
    pub(super) publish_all: bool,
    /// Name a port for --publish-all: PORT[/tcp|udp], ranges too
    #[arg(long, value_name = "PORTS")]
    pub(super) expose: Vec<String>,
    /// A resolver's address, instead of the host's
    #[arg(long, value_name = "ADDRESS")]
    pub(super) dns: Vec<String>,
    /// A domain that short names are looked for in; . for none
    #[arg(long, value_name = "DOMAIN")]
    pub(super) dns_search: Vec<String>,
    /// An option of the resolver
    #[arg(long, alias = "dns-opt", value_name = "OPTION")]
    pub(super) dns_option: Vec<String>,
    /// Add a name to /etc/hosts: NAME:ADDRESS, or NAME:host-gateway for the host
    #[arg(long, value_name = "NAME:ADDRESS")]
    pub(super) add_host: Vec<String>,
    /// The container's IPv4 address on its network
    #[arg(long, value_name = "ADDRESS")]
    pub(super) ip: Option<std::net::Ipv4Addr>,
    /// Its IPv6 address there
    #[arg(long, value_name = "ADDRESS")]
    pub(super) ip6: Option<std::net::Ipv6Addr>,
    /// Its MAC address there
    #[arg(long, value_name = "ADDRESS")]
    pub(super) mac_address: Option<crate::network::wish::Mac>,
    /// Where it may send to: everywhere but to clouds' metadata, or nowhere (replies are no sending)
    #[arg(long, value_name = "POLICY", value_enum)]
    pub(super) egress: Option<Egress>,
    /// An exception: CIDR[:PORT[-PORT]][/tcp|udp], IPv6 with a port in brackets; or a name or *.DOMAIN instead of CIDR
    #[arg(long, value_name = "DESTINATION")]
    pub(super) egress_allow: Vec<Exception>,
    /// A further name of the container on its network
    #[arg(long, alias = "net-alias", value_name = "NAME")]
    pub(super) network_alias: Vec<String>,
}

/// `casemate network`
#[derive(Debug, Subcommand)]
pub(super) enum NetworkCommand {
    /// Make a network
    Create(NetworkCreateArgs),
    /// List networks
    #[command(alias = "list")]
    Ls(NetworkLsArgs),
    /// Remove networks
    #[command(alias = "remove")]
    Rm(NetworkRmArgs),
    /// Show everything about networks, as JSON
    Inspect(NetworkInspectArgs),
    /// Remove the networks that no container is on
    Prune(NetworkPruneArgs),
}

/// `casemate network create`
#[derive(Debug, Args)]
pub(super) struct NetworkCreateArgs {
    /// Its addresses, like 10.1.2.0/24; at most one for IPv4 and one for IPv6
    #[arg(long, value_name = "CIDR")]
    pub(super) subnet: Vec<String>,
    /// The bridge's own address in a subnet
    #[arg(long, value_name = "ADDRESS")]
    pub(super) gateway: Vec<String>,
    /// Containers get addresses of this part of a subnet only
    #[arg(long, value_name = "CIDR")]
    pub(super) ip_range: Vec<String>,
    /// IPv6 too
    #[arg(long)]
    pub(super) ipv6: bool,
    /// No way out of the network
    #[arg(long)]
    pub(super) internal: bool,
    /// The driver
    #[arg(short, long, default_value = "bridge", value_parser = ["bridge"])]
    pub(super) driver: String,
    /// An option: mtu=NUMBER, bridge=NAME
    #[arg(short, long = "opt", value_name = "NAME=VALUE")]
    pub(super) options: Vec<String>,
    /// Set a label: NAME[=VALUE]
    #[arg(long = "label", value_name = "NAME[=VALUE]")]
    pub(super) labels: Vec<String>,
    /// The network's name
    pub(super) name: String,
}

/// `casemate network ls`
#[derive(Debug, Args)]
pub(super) struct NetworkLsArgs {
    /// How to print.
    #[command(flatten)]
    pub(super) format: FormatArgs,
    /// Print ids only
    #[arg(short, long)]
    pub(super) quiet: bool,
    /// Don't shorten ids
    #[arg(long)]
    pub(super) no_trunc: bool,
}

/// `casemate network rm`
#[derive(Debug, Args)]
pub(super) struct NetworkRmArgs {
    /// A network that is not there is no error
    #[arg(short, long)]
    pub(super) force: bool,
    /// Their names
    #[arg(required = true)]
    pub(super) networks: Vec<String>,
}

/// `casemate network inspect`
#[derive(Debug, Args)]
pub(super) struct NetworkInspectArgs {
    /// How to print.
    #[command(flatten)]
    pub(super) format: FormatArgs,
    /// Their names
    #[arg(required = true)]
    pub(super) networks: Vec<String>,
}

/// `casemate network prune`
#[derive(Debug, Args)]
pub(super) struct NetworkPruneArgs {
    /// Don't ask
    #[arg(short, long)]
    pub(super) force: bool,
}
