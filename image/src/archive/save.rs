//! Images out of the store.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};

use crate::digest::{Digest, Hasher};
use crate::error::{Error, Result};
use crate::recipe::{ArchiveReader, archive_length};
use crate::reference::parse_reference;
use crate::store::{SaveTarget, Saved, Store};

use super::output::{DirectoryOutput, Output, TarOutput};
use super::*;

impl Store {
    /// Writes images out. Blocking: call it from a thread that may block.
    ///
    /// Layers are written as they were built, uncompressed, and verified against their diff ids, so image ids stay the same.
    /// A docker-archive is an OCI layout with Docker's index beside OCI's.
    pub fn save(&self, names_or_ids: &[&str], target: SaveTarget<'_>) -> Result<()> {
        let images = self.saved(names_or_ids)?;
        match target {
            SaveTarget::DockerArchive(out) => write(&images, true, &mut TarOutput::new(out)),
            SaveTarget::OciArchive(out) => write(&images, false, &mut TarOutput::new(out)),
            SaveTarget::OciLayout(path) => {
                write(&images, false, &mut DirectoryOutput::create(path)?)
            }
        }
    }
}

fn write(images: &[Saved], docker: bool, output: &mut impl Output) -> Result<()> {
    let mut written: HashSet<Digest> = HashSet::new();
    let mut oci_index = Vec::new();
    let mut docker_index = Vec::new();
    output.file(
        OCI_LAYOUT,
        OCI_LAYOUT_TEXT.len() as u64,
        &mut &OCI_LAYOUT_TEXT[..],
    )?;
    for image in images {
        let mut layers = Vec::new();
        for layer in &image.layers {
            let size = layer_size(layer)?;
            layers.push((layer.diff_id, size));
            if written.insert(layer.diff_id) {
                write_layer(layer, size, output)?;
            }
        }
        let manifest = plain_manifest((&image.id, image.config.len() as u64), &layers);
        let manifest_digest = Digest::of(&manifest);
        for (digest, bytes) in [(image.id, &image.config), (manifest_digest, &manifest)] {
            if written.insert(digest) {
                output.file(
                    &blob_path(&digest),
                    bytes.len() as u64,
                    &mut bytes.as_slice(),
                )?;
            }
        }
        let entry = |annotations: serde_json::Value| {
            serde_json::json!({
                "mediaType": MANIFEST_TYPE,
                "digest": manifest_digest,
                "size": manifest.len(),
                "annotations": annotations,
            })
        };
        for name in &image.names {
            let tag = parse_reference(name)?.tag().unwrap_or("latest").to_owned();
            oci_index.push(entry(serde_json::json!({REF_NAME: tag, FULL_NAME: name})));
        }
        if image.names.is_empty() {
            oci_index.push(entry(serde_json::json!({})));
        }
        docker_index.push(DockerImage {
            config: blob_path(&image.id),
            names: Some(image.names.clone()),
            layers: image
                .layers
                .iter()
                .map(|layer| blob_path(&layer.diff_id))
                .collect(),
        });
    }
    let index =
        serde_json::json!({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": oci_index})
            .to_string();
    output.file(OCI_INDEX, index.len() as u64, &mut index.as_bytes())?;
    if docker {
        let index = serde_json::to_vec(&docker_index).map_err(|e| Error::BadDocument {
            what: DOCKER_INDEX.into(),
            reason: e.to_string(),
        })?;
        output.file(DOCKER_INDEX, index.len() as u64, &mut index.as_slice())?;
    }
    output.finish()
}

/// A layer's files in the store.
pub(crate) struct SavedLayer {
    pub(crate) diff_id: Digest,
    pub(crate) blob: std::path::PathBuf,
    pub(crate) recipe: std::path::PathBuf,
}

fn layer_size(layer: &SavedLayer) -> Result<u64> {
    let recipe = File::open(&layer.recipe)
        .map_err(|e| Error::io("cannot open layer recipe", &layer.recipe, e))?;
    archive_length(&recipe).map_err(|e| Error::Damaged {
        path: layer.recipe.clone(),
        reason: e.to_string(),
    })
}

fn write_layer(layer: &SavedLayer, size: u64, output: &mut impl Output) -> Result<()> {
    let open = |path| File::open(path).map_err(|e| Error::io("cannot open layer", path, e));
    let (recipe, blob) = (open(&layer.recipe)?, open(&layer.blob)?);
    let damaged = |reason: String| Error::Damaged {
        path: layer.recipe.clone(),
        reason,
    };
    let reader = ArchiveReader::new(&recipe, &blob).map_err(|e| damaged(e.to_string()))?;
    let mut hashed = Hashed {
        reader,
        hasher: Hasher::default(),
    };
    output.file(&blob_path(&layer.diff_id), size, &mut hashed)?;
    let actual = hashed.hasher.finish();
    if actual == layer.diff_id {
        Ok(())
    } else {
        Err(damaged(format!("the layer's digest is {actual}")))
    }
}

struct Hashed<R> {
    reader: R,
    hasher: Hasher,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        Ok(count)
    }
}
