//! Networks on disk: CNI configuration lists, one file each, for the plugins of a host's own administrator too.
//!
//! What only we know of a network stands in the list beside the plugins, under [`OURS`].

use super::cni::VERSION;
use crate::files::{self, gone_is_fine};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// The network of a container that asks for none in particular.
pub const DEFAULT: &str = "bridge";
/// The default network's bridge.
const DEFAULT_BRIDGE: &str = "casemate0";
/// Docker takes 172.17.0.0/16 and the following, Podman 10.88.0.0/16, Kubernetes often 10.244.0.0/16.
const POOL: [u8; 2] = [10, 188];
/// A list has a handful of plugins.
const MAX_FILE: u64 = 64 << 10;
/// Networks of one host.
const MAX_NETWORKS: usize = 1024;
/// The key of what plugins don't read.
const OURS: &str = "casemate";
const SUFFIX: &str = ".conflist";

/// Why a network can't be had.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A file operation failed.
    #[error("can't {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file is no configuration list.
    #[error("{path} is no CNI configuration list: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why.
        message: String,
    },
    /// There is none by that name.
    #[error("network {0} not found; `casemate network ls` lists those there are")]
    NotFound(String),
    /// There is one already.
    #[error("network with name {0} already exists")]
    Exists(String),
    /// Too many.
    #[error("{dir} holds more than {MAX_NETWORKS} networks")]
    TooMany {
        /// Where.
        dir: PathBuf,
    },
    /// Nothing is left to choose from.
    #[error("all of 10.188.0.0/16 is taken by networks; give one with --subnet")]
    NoSubnet,
}

fn io_error<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> NetworkError + 'a {
    move |source| NetworkError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

/// What the plugins don't need to know.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ours {
    /// 64 hex digits.
    pub id: String,
    /// Nanoseconds since the epoch.
    pub created: u64,
    /// Given by the user.
    pub labels: BTreeMap<String, String>,
    /// As given.
    pub options: BTreeMap<String, String>,
    /// There is no way out.
    pub internal: bool,
    /// It has IPv6.
    pub ipv6: bool,
}

/// A network.
#[derive(Debug, Clone, PartialEq)]
pub struct Network {
    /// Its name, unique on the host.
    pub name: String,
    /// Ours.
    pub ours: Ours,
    /// The whole list.
    pub list: Map<String, Value>,
}

/// A subnet of a network.
#[derive(Debug, Clone, PartialEq)]
pub struct Subnet {
    /// With its prefix's length.
    pub subnet: (IpAddr, u8),
    /// The bridge's own address; `None`: the first.
    pub gateway: Option<IpAddr>,
    /// Only addresses of this part are given out.
    pub range: Option<(IpAddr, u8)>,
}

/// What a new network shall be like.
#[derive(Debug, Default)]
pub struct Wanted {
    /// Its name.
    pub name: String,
    /// IPv4 first; none: one is chosen.
    pub subnets: Vec<Subnet>,
    /// The bridge's name; empty: one is chosen.
    pub bridge: String,
    /// `None`: 1500.
    pub mtu: Option<u16>,
    /// The rest.
    pub ours: Ours,
}

/// The directory of the networks.
pub fn dir_of(data_dir: &Path) -> PathBuf {
    data_dir.join("networks")
}

fn file_of(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}{SUFFIX}"))
}

/// Whether it may name a network: it becomes part of paths and of plugins' own names.
pub fn is_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_.-".contains(&b);
    (1..=64).contains(&name.len())
        && name.bytes().all(plain)
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
}

impl Network {
    /// Reads a network by its name.
    pub fn load(dir: &Path, name: &str) -> Result<Self, NetworkError> {
        if !is_name(name) {
            return Err(NetworkError::NotFound(name.to_owned()));
        }
        let path = file_of(dir, name);
        match files::read(&path, MAX_FILE) {
            Ok(bytes) => parse(&path, name, &bytes),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Err(NetworkError::NotFound(name.to_owned()))
            }
            Err(e) => Err(io_error("read", &path)(e)),
        }
    }

    /// Reads a network; the default one is made if it is not there yet.
    pub fn load_or_default(dir: &Path, name: &str) -> Result<Self, NetworkError> {
        match Self::load(dir, name) {
            Err(NetworkError::NotFound(_)) if name == DEFAULT => {}
            loaded => return loaded,
        }
        let wanted = Wanted {
            name: DEFAULT.to_owned(),
            bridge: DEFAULT_BRIDGE.to_owned(),
            ..Wanted::default()
        };
        match Self::create(dir, wanted) {
            // By another command, at the same time.
            Err(NetworkError::Exists(_)) => Self::load(dir, name),
            created => created,
        }
    }

    /// All networks, by name.
    pub fn all(dir: &Path) -> Result<Vec<Self>, NetworkError> {
        let entries = match std::fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(io_error("list", dir)(e)),
        };
        let mut names: Vec<String> = entries
            .filter_map(|e| e.ok()?.file_name().into_string().ok())
            .filter_map(|name| Some(name.strip_suffix(SUFFIX)?.to_owned()))
            .filter(|name| is_name(name))
            .take(MAX_NETWORKS + 1)
            .collect();
        if names.len() > MAX_NETWORKS {
            return Err(NetworkError::TooMany {
                dir: dir.to_owned(),
            });
        }
        names.sort();
        names.iter().map(|name| Self::load(dir, name)).collect()
    }

    /// Makes a network.
    pub fn create(dir: &Path, mut wanted: Wanted) -> Result<Self, NetworkError> {
        std::fs::create_dir_all(dir).map_err(io_error("create directory", dir))?;
        let lock_path = dir.join(".lock");
        let lock = std::fs::File::create(&lock_path).map_err(io_error("make", &lock_path))?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive)
            .map_err(|e| io_error("lock", &lock_path)(e.into()))?;
        let path = file_of(dir, &wanted.name);
        if path.exists() {
            return Err(NetworkError::Exists(wanted.name));
        }
        if !wanted.subnets.iter().any(|s| s.subnet.0.is_ipv4()) {
            let others = Self::all(dir)?;
            wanted.subnets.insert(0, free_subnet(&others)?);
        }
        if wanted.ours.ipv6 && wanted.subnets.iter().all(|s| s.subnet.0.is_ipv4()) {
            wanted.subnets.push(unique_local(&wanted.ours.id));
        }
        let list = list(&wanted);
        let text = serde_json::to_vec_pretty(&list).unwrap_or_default();
        let whole = dir.join(format!(".{}.new", wanted.name));
        std::fs::write(&whole, &text).map_err(io_error("write", &whole))?;
        std::fs::rename(&whole, &path).map_err(io_error("write", &path))?;
        parse(&path, &wanted.name, &text)
    }

    /// Removes it from the disk.
    pub fn remove(&self, dir: &Path) -> Result<(), NetworkError> {
        let path = file_of(dir, &self.name);
        gone_is_fine(std::fs::remove_file(&path)).map_err(io_error("remove", &path))
    }

    fn plugins(&self) -> impl Iterator<Item = &Value> {
        let plugins = self.list.get("plugins").and_then(Value::as_array);
        plugins.into_iter().flatten()
    }

    /// The bridge that the network's plugin makes; `None`: it makes none.
    pub fn bridge(&self) -> Option<&str> {
        let bridge = self.plugins().find(|p| p["type"] == "bridge")?;
        bridge["bridge"].as_str()
    }

    /// The network's driver, in Docker's word.
    pub fn driver(&self) -> &str {
        let first = self.plugins().next();
        first.and_then(|p| p["type"].as_str()).unwrap_or_default()
    }

    /// Whether one of its plugins has the capability.
    pub fn can(&self, capability: &str) -> bool {
        self.plugins()
            .any(|p| p["capabilities"][capability] == json!(true))
    }

    /// The MTU that its interfaces get.
    pub fn mtu(&self) -> u16 {
        let mtu = self.plugins().find_map(|p| p["mtu"].as_u64());
        mtu.and_then(|m| u16::try_from(m).ok())
            .filter(|m| *m >= 68)
            .unwrap_or(1500)
    }

    /// Subnet and gateway, as its address plugin is told.
    pub fn subnets(&self) -> Vec<(String, String)> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let ranges = self
            .plugins()
            .filter_map(|p| p["ipam"]["ranges"].as_array())
            .flatten()
            .filter_map(|set| set.get(0));
        ranges
            .map(|range| (text(&range["subnet"]), text(&range["gateway"])))
            .collect()
    }

    /// The list as the plugins get it: addresses are kept where they are gone after a reboot, as everything else is.
    pub fn for_plugins(&self, state_dir: &Path) -> Map<String, Value> {
        let mut list = self.list.clone();
        list.remove(OURS);
        let plugins = list.get_mut("plugins").and_then(Value::as_array_mut);
        for plugin in plugins.into_iter().flatten() {
            let ipam = plugin.get_mut("ipam").and_then(Value::as_object_mut);
            if let Some(ipam) = ipam.filter(|ipam| ipam.get("type") == Some(&json!("host-local"))) {
                ipam.entry("dataDir")
                    .or_insert_with(|| json!(addresses_dir(state_dir)));
            }
        }
        list
    }
}

/// Where the addresses in use are kept.
pub fn addresses_dir(state_dir: &Path) -> PathBuf {
    state_dir.join("addresses")
}

fn parse(path: &Path, name: &str, bytes: &[u8]) -> Result<Network, NetworkError> {
    let fail = |message: String| NetworkError::Parse {
        path: path.to_owned(),
        message,
    };
    let list: Map<String, Value> =
        serde_json::from_slice(bytes).map_err(|e| fail(e.to_string()))?;
    if list.get("name").and_then(Value::as_str) != Some(name) {
        return Err(fail(format!("its name is not {name:?}")));
    }
    let plugins = list.get("plugins").and_then(Value::as_array);
    if plugins.is_none_or(|p| p.is_empty() || p.len() > 16 || !p.iter().all(Value::is_object)) {
        return Err(fail("it needs 1 to 16 plugins".to_owned()));
    }
    let ours = match list.get(OURS) {
        Some(ours) => Ours::deserialize(ours).map_err(|e| fail(e.to_string()))?,
        None => Ours::default(),
    };
    Ok(Network {
        name: name.to_owned(),
        ours,
        list,
    })
}

/// The list of a network on a bridge.
fn list(wanted: &Wanted) -> Value {
    let Wanted {
        name,
        subnets,
        bridge,
        mtu,
        ours,
    } = wanted;
    let ranges: Vec<Value> = subnets.iter().map(range).collect();
    let mut ipam = json!({"type": "host-local", "ranges": ranges});
    if !ours.internal {
        let all = |ip: &IpAddr| if ip.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
        let routes: Vec<Value> = subnets
            .iter()
            .map(|s| json!({"dst": all(&s.subnet.0)}))
            .collect();
        ipam["routes"] = routes.into();
    }
    let bridge = match bridge.is_empty() {
        false => bridge.clone(),
        true => format!("casemate-{}", &ours.id[..ours.id.len().min(6)]),
    };
    let plugin = json!({
        "type": "bridge",
        "bridge": bridge,
        "isGateway": !ours.internal,
        "ipMasq": !ours.internal,
        "hairpinMode": true,
        "mtu": mtu.unwrap_or(1500),
        "ipam": ipam,
        "capabilities": {"mac": true, "ips": true},
    });
    let mut plugins = vec![plugin];
    if !ours.internal {
        plugins.push(json!({"type": "portmap", "capabilities": {"portMappings": true}}));
        plugins.push(json!({"type": "firewall"}));
    }
    json!({"cniVersion": VERSION, "name": name, OURS: ours, "plugins": plugins})
}

/// A set of one range, as host-local wants it.
fn range(subnet: &Subnet) -> Value {
    let (network, prefix) = subnet.subnet;
    let gateway = subnet.gateway.unwrap_or_else(|| first_of(network));
    let mut range = json!({"subnet": format!("{network}/{prefix}"), "gateway": gateway});
    if let Some((first, prefix)) = subnet.range {
        range["rangeStart"] = json!(first_of(first));
        range["rangeEnd"] = json!(last_usable(first, prefix));
    }
    json!([range])
}

/// The first address of a subnet that a machine can have.
pub fn first_of(network: IpAddr) -> IpAddr {
    match network {
        IpAddr::V4(ip) => IpAddr::V4((ip.to_bits() | 1).into()),
        IpAddr::V6(ip) => IpAddr::V6((ip.to_bits() | 1).into()),
    }
}

fn last_usable(network: IpAddr, prefix: u8) -> IpAddr {
    match network {
        // The very last one is the broadcast address.
        IpAddr::V4(ip) => {
            let hosts = u32::MAX.checked_shr(prefix.into()).unwrap_or(0);
            IpAddr::V4(
                (ip.to_bits() | hosts)
                    .saturating_sub(u32::from(hosts > 1))
                    .into(),
            )
        }
        IpAddr::V6(ip) => {
            let hosts = u128::MAX.checked_shr(prefix.into()).unwrap_or(0);
            IpAddr::V6((ip.to_bits() | hosts).into())
        }
    }
}

/// The first /24 of ours that no other network has.
fn free_subnet(others: &[Network]) -> Result<Subnet, NetworkError> {
    let taken: Vec<String> = others
        .iter()
        .flat_map(Network::subnets)
        .map(|(subnet, _)| subnet)
        .collect();
    let [a, b] = POOL;
    let free = (0..=255u8)
        .map(|third| IpAddr::from([a, b, third, 0]))
        .find(|ip| !taken.iter().any(|t| overlaps(t, *ip)));
    Ok(Subnet {
        subnet: (free.ok_or(NetworkError::NoSubnet)?, 24),
        gateway: None,
        range: None,
    })
}

/// Whether a /24 has something in common with a subnet.
fn overlaps(subnet: &str, ip: IpAddr) -> bool {
    let parsed = subnet
        .split_once('/')
        .and_then(|(ip, prefix)| Some((ip.parse().ok()?, prefix.parse().ok()?)));
    let (Some((IpAddr::V4(other), prefix)), IpAddr::V4(ip)) = (parsed, ip) else {
        return false;
    };
    let prefix: u32 = prefix;
    let mask = u32::MAX.checked_shl(32 - prefix.min(24)).unwrap_or(0);
    (other.to_bits() ^ ip.to_bits()) & mask == 0
}

/// A subnet of the network's own that nobody else has: RFC 4193, from its random id.
fn unique_local(id: &str) -> Subnet {
    let random = u64::from_str_radix(id.get(..14).unwrap_or_default(), 16).unwrap_or(0);
    let network = (0xfd_u128 << 120) | (u128::from(random) << 64);
    Subnet {
        subnet: (IpAddr::V6(network.into()), 64),
        gateway: None,
        range: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(name: &str) -> Wanted {
        Wanted {
            name: name.to_owned(),
            ours: Ours {
                id: "0123456789abcdef".repeat(4),
                ..Ours::default()
            },
            ..Wanted::default()
        }
    }

    #[test]
    fn default_network_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let networks = dir.path().join("networks");
        let first = Network::load_or_default(&networks, DEFAULT).unwrap();
        assert_eq!(first.bridge(), Some(DEFAULT_BRIDGE));
        assert_eq!(first.subnets()[0].0, "10.188.0.0/24");
        assert!(first.can("portMappings") && first.can("mac"));
        assert_eq!(Network::load_or_default(&networks, DEFAULT).unwrap(), first);
        let missing = Network::load_or_default(&networks, "web");
        assert!(matches!(missing, Err(NetworkError::NotFound(name)) if name == "web"));
    }

    #[test]
    fn create_takes_a_subnet_that_is_free() {
        let dir = tempfile::tempdir().unwrap();
        let first = Network::create(dir.path(), wanted("a")).unwrap();
        let second = Network::create(dir.path(), wanted("b")).unwrap();
        assert_eq!(first.subnets()[0].0, "10.188.0.0/24");
        assert_eq!(second.subnets()[0].0, "10.188.1.0/24");
        let again = Network::create(dir.path(), wanted("a"));
        assert!(matches!(again, Err(NetworkError::Exists(_))));
        assert_eq!(Network::all(dir.path()).unwrap(), [first.clone(), second]);
        first.remove(dir.path()).unwrap();
        first.remove(dir.path()).unwrap();
    }

    #[test]
    fn internal_network_has_no_way_out() {
        let dir = tempfile::tempdir().unwrap();
        let mut wanted = wanted("a");
        wanted.ours.internal = true;
        wanted.ours.ipv6 = true;
        let network = Network::create(dir.path(), wanted).unwrap();
        assert!(!network.can("portMappings"));
        assert_eq!(network.subnets().len(), 2);
        let plugin = network.plugins().next().unwrap();
        assert!(plugin["ipam"]["routes"].is_null());
        assert_eq!(plugin["isGateway"], false);
    }

    #[test]
    fn for_plugins_keeps_addresses_in_the_state() {
        let dir = tempfile::tempdir().unwrap();
        let network = Network::create(dir.path(), wanted("a")).unwrap();
        let list = network.for_plugins(Path::new("/s"));
        assert_eq!(list["plugins"][0]["ipam"]["dataDir"], "/s/addresses");
        assert!(!list.contains_key(OURS));
    }

    #[test]
    fn range_ends_before_the_broadcast_address() {
        let part = ("10.0.0.128".parse().unwrap(), 25);
        assert_eq!(last_usable(part.0, part.1).to_string(), "10.0.0.254");
        assert_eq!(last_usable(part.0, 32).to_string(), "10.0.0.128");
        assert_eq!(
            last_usable("fd00::".parse().unwrap(), 112).to_string(),
            "fd00::ffff"
        );
    }

    #[test]
    fn load_of_names_that_lead_elsewhere_finds_nothing() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["../x", "", ".", "a/b", &"x".repeat(65)] {
            let loaded = Network::load(dir.path(), name);
            assert!(matches!(loaded, Err(NetworkError::NotFound(_))), "{name}");
        }
        let endless = dir.path().join("endless.conflist");
        std::os::unix::fs::symlink("/dev/zero", &endless).unwrap();
        assert!(Network::load(dir.path(), "endless").is_err());
    }

    proptest::proptest! {
        #[test]
        fn parse_of_anything_never_panics(text in "\\{\"name\": ?\"n\", ?\"plugins\": ?.{0,80}\\}") {
            if let Ok(network) = parse(Path::new("/x"), "n", text.as_bytes()) {
                let _ = (network.bridge(), network.mtu(), network.subnets(), network.driver());
                network.for_plugins(Path::new("/s"));
            }
        }

        #[test]
        fn overlaps_of_anything_never_panics(text in "[0-9./]{0,20}") {
            overlaps(&text, IpAddr::from([10, 188, 0, 0]));
        }
    }
}
