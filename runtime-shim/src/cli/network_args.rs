//! The grammar of everything about networks.

use super::args::FormatArgs;
use clap::{Args, Subcommand};

/// A container's network.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Network")]
pub(super) struct NetworkArgs {
    /// The network: none, bridge, or another one's name
    #[arg(long = "network", alias = "net", value_name = "NETWORK")]
    pub(super) networks: Vec<String>,
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
