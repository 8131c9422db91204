//! From a container's network options to what the shim is to make of them.

use super::network_args::NetworkArgs;
use crate::network::cni;
use crate::network::networks::{self, DEFAULT, Network};
use crate::network::wish::{self, Attachment, Mac, Wish};
use crate::settings::Settings;
use anyhow::{Context, bail};

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
        return Ok(None);
    }
    if names.is_empty() {
        return Ok(None);
    }
    if names.len() > MAX_NETWORKS {
        bail!("--network: at most {MAX_NETWORKS} networks are possible");
    }
    check_host(settings)?;
    let dir = networks::dir_of(&settings.data_dir);
    let mut attachments: Vec<Attachment> = Vec::new();
    for name in &names {
        let network = Network::load_or_default(&dir, name).context("--network")?;
        if attachments.iter().any(|a| a.network == network.name) {
            bail!("--network {name} is given twice");
        }
        attachments.push(Attachment {
            network: network.name,
            mac: Mac::random().context("no random numbers")?,
            ips: Vec::new(),
            aliases: Vec::new(),
        });
    }
    Ok(Some(Wish {
        attachments,
        ports: Vec::new(),
    }))
}

/// The networks of a container that names none: what this host can do.
fn default(settings: &Settings) -> Vec<String> {
    let able = rustix::process::geteuid().is_root() && cni::are_in(&settings.cni_dir());
    able.then(|| DEFAULT.to_owned()).into_iter().collect()
}

/// Whether this host and this user can have networks at all.
fn check_host(settings: &Settings) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("networks of CNI plugins need root; use --network none");
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
    wish: Option<&Wish>,
    hostname: &str,
) -> anyhow::Result<Vec<(&'static str, Vec<u8>)>> {
    let mut hosts = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n".to_owned();
    if wish.is_none() {
        hosts.push_str(&format!("127.0.0.1\t{hostname}\n"));
    }
    let resolv = std::fs::read("/etc/resolv.conf").unwrap_or_default();
    let mut files = vec![("hosts", hosts.into_bytes()), ("resolv.conf", resolv)];
    if let Some(wish) = wish {
        files.push((wish::FILE, serde_json::to_vec(wish)?));
    }
    Ok(files)
}
