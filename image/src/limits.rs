//! Bounds on what an image may make us do. An image is untrusted input.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The ratio of a bomb counts from here on: small layers of zeros are common.
const RATIO_FROM: u64 = 1 << 30;

/// Limits of one pull or load, each with its reason. All are keys of `[image.limits]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Uncompressed bytes of one layer: a zip bomb stops here. 64 GiB holds the largest CUDA and model images seen.
    pub layer_bytes: u64,
    /// Uncompressed bytes for each compressed one, looked at from a gigabyte on. Real layers reach some 30; gzip can reach 1032, zstd far more.
    pub layer_ratio: u64,
    /// Entries of one layer; each costs some 150 bytes of memory while the layer is converted.
    pub layer_entries: u64,
    /// Bytes of names, link targets and extended attributes of one layer, all held in memory.
    pub layer_metadata_bytes: u64,
    /// Bytes of one path. Linux itself stops at 4096 per system call; deeper trees can't be opened by most programs.
    pub path_bytes: u64,
    /// Layers of one image. overlayfs stops at 500, Docker at 127; a merged image has no technical bound.
    pub layers: u64,
    /// Bytes of one manifest, index or configuration. Registries cap manifests at 4 MiB.
    pub document_bytes: u64,
    /// Seconds without a byte before a download is given up (and retried).
    pub stall_seconds: u64,
    /// Seconds for a connection to be made.
    pub connect_seconds: u64,
    /// Tries of one request before the pull fails.
    pub attempts: u32,
    /// Layers fetched and converted at the same time.
    pub parallel_layers: usize,
    /// Accept entries named from `/`, as Nix writes them, instead of refusing the layer. They land inside the image's root either way.
    pub allow_absolute_paths: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            layer_bytes: 64 << 30,
            layer_ratio: 200,
            layer_entries: 4_000_000,
            layer_metadata_bytes: 1 << 30,
            path_bytes: 4096,
            layers: 512,
            document_bytes: 4 << 20,
            stall_seconds: 60,
            connect_seconds: 15,
            attempts: 4,
            parallel_layers: 4,
            allow_absolute_paths: false,
        }
    }
}

impl Limits {
    /// Whether `inflated` bytes may come out of `taken` compressed ones (`None`: of a stream that isn't compressed).
    pub(crate) fn inflated(&self, what: &str, inflated: u64, taken: Option<u64>) -> Result<()> {
        let limit = |limit, unit, key| {
            Err(Error::Limit {
                what: format!("{what} inflates to"),
                limit,
                unit,
                key,
            })
        };
        if inflated > self.layer_bytes {
            return limit(self.layer_bytes, "bytes", "layer_bytes");
        }
        match taken {
            Some(taken) if inflated > RATIO_FROM && inflated / taken.max(1) > self.layer_ratio => {
                limit(self.layer_ratio, "times its compressed size", "layer_ratio")
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inflated_bomb_is_refused_from_a_gigabyte_on() {
        let limits = Limits::default();
        let key = |inflated, taken| match limits.inflated("x", inflated, taken) {
            Ok(()) => None,
            Err(Error::Limit { key, .. }) => Some(key),
            Err(e) => panic!("{e}"),
        };
        assert_eq!(key(1 << 30, Some(1)), None);
        assert_eq!(key((1 << 30) + 1, Some(1 << 20)), Some("layer_ratio"));
        assert_eq!(key((1 << 30) + 1, Some(0)), Some("layer_ratio"));
        assert_eq!(key((1 << 30) + 1, Some(6 << 20)), None);
        assert_eq!(key(64 << 30, None), None);
        assert_eq!(key((64 << 30) + 1, None), Some("layer_bytes"));
    }
}
