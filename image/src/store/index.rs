//! The index: which images there are and what they are called. One small JSON file, replaced whole.

use std::io;

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::platform::Platform;

use super::files::{self, Paths};

/// Format of the data directory. Another number means another version of the program laid it.
const VERSION: u32 = 1;

#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Index {
    version: u32,
    pub(super) images: Vec<Record>,
}

/// One image.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) id: Digest,
    pub(super) manifest: Digest,
    pub(super) names: Vec<String>,
    pub(super) repo_digests: Vec<String>,
    pub(super) platform: Platform,
    pub(super) created: Option<String>,
    pub(super) size: u64,
    pub(super) layers: Vec<Digest>,
}

impl Index {
    /// Reads the index; an empty store has none.
    pub(super) fn read(paths: &Paths) -> Result<Self> {
        let path = paths.index();
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Ok(Self {
                    version: VERSION,
                    images: Vec::new(),
                });
            }
            Err(e) => return Err(Error::io("cannot read", path, e)),
        };
        let index: Self = serde_json::from_slice(&bytes).map_err(|e| Error::Damaged {
            path: path.clone(),
            reason: e.to_string(),
        })?;
        if index.version != VERSION {
            let reason = format!("format {}, this program knows {VERSION}", index.version);
            return Err(Error::Damaged { path, reason });
        }
        Ok(index)
    }

    /// Changes the index under its lock.
    pub(super) fn update<T>(
        paths: &Paths,
        change: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let _lock = files::lock(&paths.index_lock(), FlockOperation::LockExclusive)?;
        let mut index = Self::read(paths)?;
        let result = change(&mut index)?;
        let bytes = serde_json::to_vec(&index).map_err(|e| Error::Damaged {
            path: paths.index(),
            reason: e.to_string(),
        })?;
        files::replace(paths, &paths.index(), &bytes)?;
        Ok(result)
    }

    /// The image of a name in full, or of a digest of one of its manifests.
    pub(super) fn by_name(&self, name: &str) -> Option<&Record> {
        let has = |record: &&Record| {
            record.names.iter().any(|n| n == name) || record.repo_digests.iter().any(|n| n == name)
        };
        self.images.iter().find(has)
    }

    /// Images whose id begins with these hexadecimal digits, or whose manifest has exactly this digest.
    pub(super) fn by_id(&self, text: &str) -> Vec<&Record> {
        let hex = text.strip_prefix("sha256:").unwrap_or(text);
        if hex.is_empty() || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Vec::new();
        }
        let matches =
            |record: &&Record| record.id.hex().starts_with(hex) || record.manifest.hex() == hex;
        self.images.iter().filter(matches).collect()
    }

    /// Adds an image, or what is new about one that is there. Its names are taken from other images.
    pub(super) fn add(&mut self, new: Record) {
        for record in &mut self.images {
            record.names.retain(|name| !new.names.contains(name));
        }
        let Some(old) = self.images.iter_mut().find(|record| record.id == new.id) else {
            self.images.push(new);
            return;
        };
        let merge = |old: &mut Vec<String>, new: Vec<String>| {
            old.extend(new);
            old.sort();
            old.dedup();
        };
        old.manifest = new.manifest;
        old.size = new.size;
        merge(&mut old.names, new.names);
        merge(&mut old.repo_digests, new.repo_digests);
    }
}
