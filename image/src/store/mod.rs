//! The images on disk, by digest.
//!
//! ```text
//! DATA/index.json              names → images, replaced atomically under index.lock
//! DATA/blobs/sha256/HEX        manifests and configurations
//! DATA/layers/HEX.erofs        a layer's blob, by diff id
//! DATA/layers/HEX.recipe       how to get the layer's archive back from the blob, byte by byte
//! DATA/rootfs/HEX.erofs        merged metadata, by chain id; locked by leases
//! DATA/use.lock                shared by who adds files, exclusive for who removes them
//! DATA/tmp/                    unfinished files, each locked by its writer
//! ```
//!
//! Lock order: use.lock, a file in tmp/, index.lock.

mod collect;
mod derive;
mod files;
mod image;
mod index;
mod install;
mod options;

use std::collections::HashMap;
use std::path::Path;

use oci_spec::distribution::Reference;
use oci_spec::image::ImageConfiguration;
use serde::Deserialize;
use serde_json::Value;

use crate::archive::SavedLayer;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::reference::{key, parse_reference};

use files::Paths;
use index::{Index, Record};

pub(crate) use files::Partial;
pub(crate) use install::{Config, UseLock};

pub use image::{Image, Lease, Pruned, Removed, RootfsDisk};
pub use options::{LoadOptions, LoadSource, PullOptions, PullPolicy, SaveTarget};

/// A store of images in a directory. Cheap to open and to clone; several processes may share the directory.
#[derive(Clone, Debug)]
pub struct Store {
    paths: Paths,
    /// Images that something needs, and what.
    needed: HashMap<Digest, String>,
}

impl Store {
    /// Opens the store in `data_dir`, laying its directories (0700) if they aren't there.
    pub fn open(data_dir: impl AsRef<Path>) -> Result<Self> {
        Ok(Self {
            paths: Paths::create(data_dir.as_ref())?,
            needed: HashMap::new(),
        })
    }

    /// The same store, whose `remove` and `prune` keep the images of these ids though nothing runs on them; each with the reason.
    pub fn keeping(self, needed: HashMap<Digest, String>) -> Self {
        Self { needed, ..self }
    }

    /// The image of this name (`debian`, `debian@sha256:…`), id, or unique beginning of an id.
    pub fn find(&self, name_or_id: &str) -> Result<Option<Image>> {
        let index = Index::read(&self.paths)?;
        find(&index, name_or_id)?
            .map(|record| self.image(record))
            .transpose()
    }

    /// Every image, newest first.
    pub fn list(&self) -> Result<Vec<Image>> {
        let index = Index::read(&self.paths)?;
        let mut images = index
            .images
            .iter()
            .map(|record| self.image(record))
            .collect::<Result<Vec<_>>>()?;
        images.sort_by(|a, b| {
            b.created
                .cmp(&a.created)
                .then_with(|| a.names.cmp(&b.names))
        });
        Ok(images)
    }

    /// Gives `name_or_id` a further name; a name that stood for another image moves.
    pub fn tag(&self, name_or_id: &str, new_name: &Reference) -> Result<Image> {
        let record = Index::update(&self.paths, |index| {
            let mut record = require(index, name_or_id)?.clone();
            record.names = vec![new_name.whole()];
            let id = record.id;
            index.add(record);
            require(index, &id.to_string()).cloned()
        })?;
        self.image(&record)
    }

    /// An image with its configuration read and verified.
    fn image(&self, record: &Record) -> Result<Image> {
        let Record {
            id,
            manifest,
            names,
            repo_digests,
            platform,
            created,
            size,
            layers,
        } = record;
        let (config, healthcheck) = self.configuration(id)?;
        Ok(Image {
            id: *id,
            names: names.clone(),
            repo_digests: repo_digests.clone(),
            digest: *manifest,
            created: created.clone(),
            size: *size,
            platform: platform.clone(),
            layers: layers.clone(),
            config,
            healthcheck,
        })
    }

    fn configuration(&self, id: &Digest) -> Result<(ImageConfiguration, Option<Value>)> {
        let path = self.paths.document(id);
        let bytes = files::read(&path)?;
        let damaged = |reason: String| Error::Damaged {
            path: path.clone(),
            reason,
        };
        if Digest::of(&bytes) != *id {
            return Err(damaged("wrong digest".into()));
        }
        let unreadable = |e: serde_json::Error| damaged(e.to_string());
        let of_docker: OfDocker = serde_json::from_slice(&bytes).map_err(unreadable)?;
        let config = serde_json::from_slice(&bytes).map_err(unreadable)?;
        Ok((config, of_docker.config.and_then(|c| c.healthcheck)))
    }
}

/// What a configuration document holds beyond OCI's.
#[derive(Deserialize)]
struct OfDocker {
    config: Option<DockerConfig>,
}

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(rename = "Healthcheck")]
    healthcheck: Option<Value>,
}

/// Names come before ids: an image may be called `beef`.
fn find<'a>(index: &'a Index, name_or_id: &str) -> Result<Option<&'a Record>> {
    let by_name = parse_reference(name_or_id)
        .ok()
        .and_then(|name| index.by_name(&key(&name)));
    if by_name.is_some() {
        return Ok(by_name);
    }
    match index.by_id(name_or_id).as_slice() {
        [] => Ok(None),
        [record] => Ok(Some(record)),
        several => Err(Error::Ambiguous {
            prefix: name_or_id.to_owned(),
            ids: several.iter().map(|record| record.id.short()).collect(),
        }),
    }
}

/// What `save` needs of an image.
pub(crate) struct Saved {
    pub(crate) id: Digest,
    pub(crate) config: Vec<u8>,
    pub(crate) names: Vec<String>,
    pub(crate) layers: Vec<SavedLayer>,
}

impl Store {
    /// Images to save: by name with that name, by id with all its names.
    pub(crate) fn saved(&self, names_or_ids: &[&str]) -> Result<Vec<Saved>> {
        let index = Index::read(&self.paths)?;
        let mut all: Vec<Saved> = Vec::new();
        for text in names_or_ids {
            let record = require(&index, text)?;
            let name = parse_reference(text).ok().map(|name| name.whole());
            let names = match name.filter(|name| record.names.contains(name)) {
                Some(name) => vec![name],
                None => record.names.clone(),
            };
            if let Some(same) = all.iter_mut().find(|saved| saved.id == record.id) {
                same.names.extend(names);
                same.names.sort();
                same.names.dedup();
                continue;
            }
            self.configuration(&record.id)?;
            let layer = |diff_id: &Digest| SavedLayer {
                diff_id: *diff_id,
                blob: self.paths.layer(diff_id),
                recipe: self.paths.recipe(diff_id),
            };
            all.push(Saved {
                id: record.id,
                config: files::read(&self.paths.document(&record.id))?,
                names,
                layers: record.layers.iter().map(layer).collect(),
            });
        }
        Ok(all)
    }
}

fn require<'a>(index: &'a Index, name_or_id: &str) -> Result<&'a Record> {
    find(index, name_or_id)?.ok_or_else(|| Error::NotFound {
        name: name_or_id.to_owned(),
    })
}
