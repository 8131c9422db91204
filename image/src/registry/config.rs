//! How registries are reached: the `[registries]` table of the configuration file.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Hosts that want something else than TLS on port 443, by `host[:port]`.
///
/// ```toml
/// [registries."docker.io"]
/// mirrors = ["http://mirror.example:5000"]
///
/// [registries."registry.example:5000"]
/// ca_files = ["/etc/casemate/example.pem"]
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RegistryConfig {
    /// Host, with its port where it isn't 443, to its settings.
    pub hosts: BTreeMap<String, RegistryHost>,
}

/// Settings of one registry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryHost {
    /// Tried in order before the registry itself: `host[:port]`, `http://host[:port]` or `https://host[:port]`.
    pub mirrors: Vec<String>,
    /// Speak plain HTTP. Unset means yes on a loopback address and no elsewhere.
    pub plain_http: Option<bool>,
    /// Certificate authorities (PEM files) trusted besides the system's.
    pub ca_files: Vec<PathBuf>,
}
