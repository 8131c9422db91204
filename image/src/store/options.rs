//! What the caller decides.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::limits::Limits;
use crate::platform::Platform;
use crate::progress::{NoProgress, Progress};
use crate::registry::RegistryConfig;

/// When a registry is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PullPolicy {
    /// Always: a tag may have moved. Layers in the store are not fetched again.
    Always,
    /// Only for an image the store hasn't got.
    #[default]
    Missing,
    /// Never; an image that isn't in the store is an error.
    Never,
}

/// How to pull.
#[derive(Clone)]
pub struct PullOptions {
    /// Which variant of a multi-platform image.
    pub platform: Platform,
    /// When to ask the registry.
    pub policy: PullPolicy,
    /// Mirrors, certificates, plain HTTP.
    pub registries: RegistryConfig,
    /// Credentials file instead of Docker's and Podman's usual places.
    pub auth_file: Option<PathBuf>,
    /// Bounds on what the image may cost.
    pub limits: Limits,
    /// Who is told.
    pub progress: Arc<dyn Progress>,
}

impl Default for PullOptions {
    fn default() -> Self {
        Self {
            platform: Platform::host(),
            policy: PullPolicy::default(),
            registries: RegistryConfig::default(),
            auth_file: None,
            limits: Limits::default(),
            progress: Arc::new(NoProgress),
        }
    }
}

impl std::fmt::Debug for PullOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            platform,
            policy,
            registries,
            auth_file,
            limits,
            progress: _,
        } = self;
        f.debug_struct("PullOptions")
            .field("platform", platform)
            .field("policy", policy)
            .field("registries", registries)
            .field("auth_file", auth_file)
            .field("limits", limits)
            .finish_non_exhaustive()
    }
}

/// Where `load` reads.
pub enum LoadSource<'a> {
    /// A file or an OCI layout directory.
    Path(&'a Path),
    /// A pipe; spooled into the store's disk first.
    Reader(Box<dyn std::io::Read + Send + 'a>),
}

/// How to load.
#[derive(Clone)]
pub struct LoadOptions {
    /// Which variant of a multi-platform layout.
    pub platform: Platform,
    /// Bounds on what the archive may cost.
    pub limits: Limits,
    /// Who is told.
    pub progress: Arc<dyn Progress>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            platform: Platform::host(),
            limits: Limits::default(),
            progress: Arc::new(NoProgress),
        }
    }
}

/// Where and in which format `save` writes.
pub enum SaveTarget<'a> {
    /// What `docker save` writes and `docker load`, `podman load` and `skopeo` read.
    DockerArchive(&'a mut (dyn Write + Send)),
    /// An OCI layout as a tar archive.
    OciArchive(&'a mut (dyn Write + Send)),
    /// An OCI layout directory; made if it doesn't exist, refused if it holds something else.
    OciLayout(&'a Path),
}
