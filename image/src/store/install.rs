//! Bringing layers, root file systems and images into the store.

use std::collections::HashSet;
use std::fs::File;
use std::io::BufRead;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use oci_spec::image::ImageConfiguration;
use rustix::fs::{FlockOperation, flock};

use crate::convert::{Expected, convert};
use crate::digest::Digest;
use crate::erofs::Reader;
use crate::error::{Error, Result, printable};
use crate::limits::Limits;
use crate::merge::{LayerFile, merge};
use crate::platform::Platform;
use crate::progress::{Event, Progress};
use crate::recipe::archive_length;

use super::files::{self, Partial};
use super::index::{Index, Record};
use super::{Image, Lease, RootfsDisk, Store};

/// Keeps `prune` from removing files that no image names yet.
pub(crate) struct UseLock {
    _lock: File,
}

/// How often a layer that another process writes is looked for.
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// Whose a layer is that is needed.
enum LayerClaim {
    /// It is in the store.
    Cached,
    /// Ours to write.
    Ours(LayerWriter),
    /// Somebody else is writing it now.
    Taken,
}

/// The right to write a layer.
pub(crate) struct LayerWriter {
    blob: Partial,
    recipe: Partial,
}

/// A verified configuration with what the store needs of it.
pub(crate) struct Config {
    pub(crate) id: Digest,
    pub(crate) bytes: Vec<u8>,
    pub(crate) parsed: ImageConfiguration,
    pub(crate) diff_ids: Vec<Digest>,
    pub(crate) platform: Platform,
}

impl Config {
    /// Parses a configuration whose digest was verified; its layers must be `layers` many.
    pub(crate) fn parse(
        what: &str,
        id: Digest,
        bytes: Vec<u8>,
        layers: usize,
        limits: &Limits,
    ) -> Result<Self> {
        let bad = |reason: String| Error::BadDocument {
            what: format!("configuration of {what}"),
            reason,
        };
        let parsed: ImageConfiguration =
            serde_json::from_slice(&bytes).map_err(|e| bad(printable(e.to_string().as_bytes())))?;
        let diff_ids = parsed
            .rootfs()
            .diff_ids()
            .iter()
            .map(|text| text.parse())
            .collect::<Result<Vec<Digest>>>()?;
        if diff_ids.len() != layers {
            return Err(bad(format!(
                "{} diff ids for {layers} layers",
                diff_ids.len()
            )));
        }
        if layers as u64 > limits.layers {
            return Err(Error::Limit {
                what: what.to_owned(),
                limit: limits.layers,
                unit: "layers",
                key: "layers",
            });
        }
        let platform = Platform {
            os: parsed.os().to_string(),
            architecture: parsed.architecture().to_string(),
            variant: parsed
                .variant()
                .clone()
                .filter(|variant| !variant.is_empty()),
        };
        Ok(Self {
            id,
            bytes,
            parsed,
            diff_ids,
            platform,
        })
    }
}

/// Digest of a list of layers, as OCI defines it; an image without layers has the digest of nothing.
pub(crate) fn chain_id(layers: &[Digest]) -> Digest {
    let mut layers = layers.iter();
    let Some(first) = layers.next() else {
        return Digest::of(b"");
    };
    layers.fold(*first, |chain, layer| {
        Digest::of(format!("{chain} {layer}").as_bytes())
    })
}

impl Store {
    /// To be held while files are added.
    pub(crate) fn use_lock(&self) -> Result<UseLock> {
        let _lock = files::lock(&self.paths.use_lock(), FlockOperation::LockShared)?;
        files::clean_tmp(&self.paths)?;
        Ok(UseLock { _lock })
    }

    /// Bytes of a layer's blob, if the store has it.
    pub fn layer_bytes(&self, diff_id: &Digest) -> Option<u64> {
        std::fs::metadata(self.paths.layer(diff_id))
            .ok()
            .map(|metadata| metadata.len())
    }

    /// Bytes of a layer's archive.
    pub(crate) fn archive_bytes(&self, diff_id: &Digest) -> Result<u64> {
        let path = self.paths.recipe(diff_id);
        let recipe =
            File::open(&path).map_err(|e| Error::io("cannot open layer recipe", &path, e))?;
        archive_length(&recipe).map_err(|e| Error::Damaged {
            path,
            reason: e.to_string(),
        })
    }

    /// A file to put an archive into while it is loaded; gone when dropped.
    pub(crate) fn spool_file(&self) -> Result<Partial> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        loop {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let name = format!("load-{}-{number}", std::process::id());
            if let Some(file) = Partial::try_new(&self.paths, &self.paths.tmp().join(name))? {
                return Ok(file);
            }
        }
    }

    /// Waits until the layer is in the store (`None`) or ours to write, asking again after each `pause`.
    pub(crate) async fn claim_layer(
        &self,
        index: usize,
        layer: &Digest,
        progress: &dyn Progress,
        pause: impl AsyncFn(Duration),
    ) -> Result<Option<LayerWriter>> {
        let mut told = false;
        loop {
            match self.try_claim(layer)? {
                LayerClaim::Ours(writer) => return Ok(Some(writer)),
                LayerClaim::Cached => {
                    progress.event(Event::LayerCached { index, layer });
                    return Ok(None);
                }
                LayerClaim::Taken if !told => {
                    progress.event(Event::LayerWaiting { index, layer });
                    told = true;
                }
                LayerClaim::Taken => {}
            }
            pause(ASK_AGAIN).await;
        }
    }

    /// Takes the right to write a layer, if it is still to be had.
    fn try_claim(&self, diff_id: &Digest) -> Result<LayerClaim> {
        if self.layer_bytes(diff_id).is_some() {
            return Ok(LayerClaim::Cached);
        }
        let Some(blob) = Partial::try_new(&self.paths, &self.paths.layer(diff_id))? else {
            return Ok(LayerClaim::Taken);
        };
        let Some(recipe) = Partial::try_new(&self.paths, &self.paths.recipe(diff_id))? else {
            return Ok(LayerClaim::Taken);
        };
        // It may have come to be just before the right became free.
        match self.layer_bytes(diff_id) {
            Some(_) => Ok(LayerClaim::Cached),
            None => Ok(LayerClaim::Ours(LayerWriter { blob, recipe })),
        }
    }

    /// Converts, verifies and publishes a layer. Returns its blob's bytes.
    pub(crate) fn write_layer(
        &self,
        writer: LayerWriter,
        input: impl BufRead + Send,
        expected: &Expected,
        limits: &Limits,
    ) -> Result<u64> {
        let LayerWriter { blob, recipe } = writer;
        let converted = convert(
            input,
            expected,
            (&blob.file, &blob.path),
            (&recipe.file, &recipe.path),
            limits,
        )?;
        tracing::debug!(layer = %expected.diff_id, entries = converted.entries, bytes = converted.blob_bytes, "layer converted");
        // The recipe first: a blob in its place means that the layer is whole.
        recipe.publish(&self.paths.recipe(&expected.diff_id))?;
        blob.publish(&self.paths.layer(&expected.diff_id))?;
        Ok(converted.blob_bytes)
    }

    /// Makes a whole image visible: its layers are there, its documents are verified.
    pub(crate) fn add_image(
        &self,
        _lock: &UseLock,
        config: &Config,
        manifest: &[u8],
        names: Vec<String>,
        repo_digests: Vec<String>,
        progress: &Arc<dyn Progress>,
    ) -> Result<Image> {
        progress.event(Event::Merging);
        self.build_rootfs(&config.diff_ids)?;
        let manifest_digest = Digest::of(manifest);
        for (digest, bytes) in [
            (&config.id, config.bytes.as_slice()),
            (&manifest_digest, manifest),
        ] {
            let path = self.paths.document(digest);
            if !path.exists() {
                files::replace(&self.paths, &path, bytes)?;
            }
        }
        let unique: HashSet<&Digest> = config.diff_ids.iter().collect();
        let record = Record {
            id: config.id,
            manifest: manifest_digest,
            names,
            repo_digests,
            platform: config.platform.clone(),
            created: config.parsed.created().clone(),
            size: unique
                .into_iter()
                .filter_map(|layer| self.layer_bytes(layer))
                .sum(),
            layers: config.diff_ids.clone(),
        };
        let record = Index::update(&self.paths, |index| {
            index.add(record);
            super::require(index, &config.id.to_string()).cloned()
        })?;
        progress.event(Event::Done { id: &record.id });
        self.image(&record)
    }

    fn build_rootfs(&self, layers: &[Digest]) -> Result<PathBuf> {
        let chain = chain_id(layers);
        let target = self.paths.rootfs(&chain);
        loop {
            if target.exists() {
                return Ok(target);
            }
            let Some(partial) = Partial::try_new(&self.paths, &target)? else {
                // Another process merges the same layers; it takes milliseconds.
                std::thread::sleep(std::time::Duration::from_millis(2));
                continue;
            };
            let layers: Vec<LayerFile> = layers
                .iter()
                .map(|id| LayerFile {
                    diff_id: *id,
                    path: self.paths.layer(id),
                })
                .collect();
            merge(&layers, &chain, &partial.file).map_err(|e| e.at(&partial.path))?;
            partial.publish(&target)?;
        }
    }

    /// The disk of an image, leased.
    pub fn rootfs(&self, image: &Image) -> Result<RootfsDisk> {
        let path = self.paths.rootfs(&chain_id(&image.layers));
        loop {
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                    let _lock = self.use_lock()?;
                    self.build_rootfs(&image.layers)?;
                    continue;
                }
                Err(e) => return Err(Error::io("cannot open", path, e)),
            };
            flock(&file, FlockOperation::LockShared)
                .map_err(|e| Error::io("cannot lock", &path, e.into()))?;
            let links = file
                .metadata()
                .map_err(|e| Error::io("cannot read", &path, e))?
                .nlink();
            if links == 0 {
                continue;
            }
            let damaged = |e: Error| Error::Damaged {
                path: path.clone(),
                reason: e.to_string(),
            };
            let reader = Reader::open(&file).map_err(damaged)?;
            let layers = reader
                .devices()
                .iter()
                .map(|device| {
                    Ok(self
                        .paths
                        .layer(&format!("sha256:{}", device.tag).parse().map_err(damaged)?))
                })
                .collect::<Result<_>>()?;
            drop(reader);
            return Ok(RootfsDisk {
                metadata: path,
                layers,
                lease: Lease { _lock: file },
            });
        }
    }
}
