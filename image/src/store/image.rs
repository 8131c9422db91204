//! What the store says about an image.

use std::fs::File;
use std::path::PathBuf;

use oci_spec::image::ImageConfiguration;
use serde::Serialize;

use crate::digest::Digest;
use crate::platform::Platform;

/// An image of the store.
#[derive(Clone, Debug, Serialize)]
pub struct Image {
    /// Digest of the configuration: what Docker calls the image id.
    pub id: Digest,
    /// Names that stand for it, in full (`docker.io/library/debian:bookworm`).
    pub names: Vec<String>,
    /// Repositories and manifest digests it was pulled by (`docker.io/library/debian@sha256:…`).
    pub repo_digests: Vec<String>,
    /// Digest of the platform's manifest.
    pub digest: Digest,
    /// When it was built, as its configuration says.
    pub created: Option<String>,
    /// Bytes its layers take on disk, layers shared with other images included.
    pub size: u64,
    /// What it runs on.
    pub platform: Platform,
    /// Diff ids of its layers, bottom first.
    pub layers: Vec<Digest>,
    /// The whole configuration.
    pub config: ImageConfiguration,
    /// Docker's health check, which OCI's configuration doesn't know (moby, image specification 1.2, `Healthcheck`).
    #[serde(skip)]
    pub healthcheck: Option<serde_json::Value>,
}

/// The files that make up an image's root file system: laid end to end, each padded to 4 KiB, they are one EROFS disk.
#[derive(Debug)]
pub struct RootfsDisk {
    /// The merged metadata; comes first.
    pub metadata: PathBuf,
    /// The layers' blobs, in the order the metadata expects them.
    pub layers: Vec<PathBuf>,
    /// Keeps `prune` and `remove` away while it lives.
    pub lease: Lease,
}

/// A shared lock on a root file system: as long as it lives, its files are not removed.
#[derive(Debug)]
pub struct Lease {
    pub(crate) _lock: File,
}

impl Lease {
    /// The locked file. A child that inherits it keeps the lease alive.
    pub fn as_file(&self) -> &File {
        &self._lock
    }
}

/// What `remove` did.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Removed {
    /// Names that were taken away.
    pub untagged: Vec<String>,
    /// Images that are gone.
    pub deleted: Vec<Digest>,
    /// Bytes given back to the disk.
    pub freed: u64,
}

/// What `prune` did.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Pruned {
    /// Images that are gone.
    pub deleted: Vec<Digest>,
    /// Files that are gone: layers, root file systems, left-over partial downloads.
    pub files: usize,
    /// Bytes given back to the disk.
    pub freed: u64,
}
